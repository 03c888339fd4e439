# SPDX-License-Identifier: Apache-2.0
"""Errors that may cross a boundary: what happened, why, what to do, and a stable code.

Everything else that escapes a handler is logged and becomes INTERNAL; its text never leaves the process.
The catalogue in `docs/errors.md` is generated from `Code`; a test keeps codes unique and texts present.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Kind(enum.Enum):
    """What sort of failure it is: gives the gRPC status and the CLI's exit code."""

    USAGE = "usage"  # the caller's request cannot be right
    NOT_FOUND = "not-found"
    EXISTS = "exists"
    DENIED = "denied"  # understood, and refused by policy or identity
    UNAUTHENTIC = "unauthentic"  # evidence, a token or a sealed file that does not verify
    STATE = "state"  # right request, wrong moment
    UNAVAILABLE = "unavailable"  # a peer is away; trying again may help
    EXHAUSTED = "exhausted"  # a limit, a quota, a full disk
    DEADLINE = "deadline"
    INTERNAL = "internal"


# grpc.StatusCode names, as text: this module must not import grpc.
GRPC_STATUS: dict[Kind, str] = {
    Kind.USAGE: "INVALID_ARGUMENT",
    Kind.NOT_FOUND: "NOT_FOUND",
    Kind.EXISTS: "ALREADY_EXISTS",
    Kind.DENIED: "PERMISSION_DENIED",
    Kind.UNAUTHENTIC: "UNAUTHENTICATED",
    Kind.STATE: "FAILED_PRECONDITION",
    Kind.UNAVAILABLE: "UNAVAILABLE",
    Kind.EXHAUSTED: "RESOURCE_EXHAUSTED",
    Kind.DEADLINE: "DEADLINE_EXCEEDED",
    Kind.INTERNAL: "INTERNAL",
}

# Exit codes of the command line; documented in docs/cli.md.
EXIT_CODE: dict[Kind, int] = {
    Kind.INTERNAL: 1,
    Kind.USAGE: 2,
    Kind.DENIED: 3,
    Kind.UNAUTHENTIC: 3,
    Kind.UNAVAILABLE: 4,
    Kind.DEADLINE: 4,
    Kind.NOT_FOUND: 5,
    Kind.EXISTS: 6,
    Kind.STATE: 6,
    Kind.EXHAUSTED: 7,
}


@dataclass(frozen=True, slots=True)
class CodeInfo:
    """One row of the catalogue."""

    number: int
    kind: Kind
    summary: str


class Code(enum.Enum):
    """Stable codes. A number is never reused; thousands group by room."""

    # 1000: configuration, command line, files
    CONFIG_INVALID = CodeInfo(
        1001, Kind.USAGE, "a configuration file does not parse or holds a value that is not allowed"
    )
    ARGUMENT_INVALID = CodeInfo(1002, Kind.USAGE, "an argument or a field of a request is not allowed")
    FILE_NOT_FOUND = CodeInfo(1003, Kind.NOT_FOUND, "a file or directory is not there")
    FILE_EXISTS = CodeInfo(1004, Kind.EXISTS, "a file that would be written is already there")
    DISK_FULL = CodeInfo(1005, Kind.EXHAUSTED, "the disk is full; what was there before is unchanged")
    IO_FAILED = CodeInfo(1006, Kind.INTERNAL, "the operating system refused to read or write a file")
    STACK_NOT_RUNNING = CodeInfo(1007, Kind.UNAVAILABLE, "no local stack runs in this state directory")
    STACK_RUNNING = CodeInfo(1008, Kind.STATE, "a local stack already runs in this state directory")
    PORT_TAKEN = CodeInfo(1009, Kind.STATE, "another process listens on this port")
    PROCESS_DIED = CodeInfo(1010, Kind.INTERNAL, "a service of the local stack ended unexpectedly")
    DATA_INVALID = CodeInfo(1011, Kind.USAGE, "a row of a data file is broken")
    INTERRUPTED = CodeInfo(1012, Kind.STATE, "stopped by the user")
    PREREQUISITE_MISSING = CodeInfo(1013, Kind.STATE, "a program or package that is needed is not installed")
    # 1100: transport and identity
    UNREACHABLE = CodeInfo(1101, Kind.UNAVAILABLE, "the service cannot be reached")
    DEADLINE_EXCEEDED = CodeInfo(1102, Kind.DEADLINE, "the service did not answer in time")
    CALLER_UNKNOWN = CodeInfo(1103, Kind.DENIED, "the certificate has no SPIFFE id, or not exactly one")
    CALLER_NOT_ALLOWED = CodeInfo(1104, Kind.DENIED, "this identity may not call this method")
    RATE_LIMITED = CodeInfo(1105, Kind.EXHAUSTED, "too many requests")
    TLS_FAILED = CodeInfo(1106, Kind.UNAVAILABLE, "the TLS handshake failed")
    CERTIFICATE_EXPIRED = CodeInfo(1107, Kind.DENIED, "the certificate has expired and could not be renewed")
    MESSAGE_TOO_LARGE = CodeInfo(1108, Kind.EXHAUSTED, "a message is larger than the service accepts")
    INTERNAL = CodeInfo(1199, Kind.INTERNAL, "an unexpected error; the service's log has it under the request id")
    # 1200: attestation
    QUOTE_REJECTED = CodeInfo(1201, Kind.UNAUTHENTIC, "the quote is malformed or does not verify")
    NONCE_UNKNOWN = CodeInfo(
        1202, Kind.UNAUTHENTIC, "the nonce was not given out here, has expired, or was used before"
    )
    REPORT_DATA_MISMATCH = CodeInfo(
        1203, Kind.UNAUTHENTIC, "the quote is over other keys, or another nonce, than the request's"
    )
    EVENT_LOG_MISMATCH = CodeInfo(1204, Kind.UNAUTHENTIC, "the event log does not replay to the quoted registers")
    CSR_INVALID = CodeInfo(1205, Kind.UNAUTHENTIC, "the certificate request is not under the quoted TLS key")
    APPRAISAL_FAILED = CodeInfo(1206, Kind.DENIED, "the evidence is authentic but not acceptable here")
    WORKLOAD_NOT_REGISTERED = CodeInfo(1207, Kind.DENIED, "no registered workload has these measurements")
    USER_NOT_REGISTERED = CodeInfo(1208, Kind.DENIED, "this public key belongs to no registered user")
    EVIDENCE_UNEXPECTED = CodeInfo(1209, Kind.UNAUTHENTIC, "a service's evidence is not what was expected of it")
    QUOTE_PROVIDER_FAILED = CodeInfo(1210, Kind.UNAVAILABLE, "no quote could be had from this platform")
    TOKEN_INVALID = CodeInfo(
        1211, Kind.UNAUTHENTIC, "the attestation result does not verify or is not for this channel"
    )
    BUNDLE_INVALID = CodeInfo(1212, Kind.UNAUTHENTIC, "the trust bundle is malformed or not the expected one")
    WORKLOAD_EXISTS = CodeInfo(1213, Kind.EXISTS, "a workload of this name is registered, and is another or closed")
    VERDICT_INVALID = CodeInfo(1214, Kind.UNAUTHENTIC, "a verdict bundle is malformed, or its verdict is another")
    VERDICT_NOT_FOUND = CodeInfo(1215, Kind.NOT_FOUND, "no such verdict, or its evidence is not kept")
    DENY_LISTED = CodeInfo(1216, Kind.DENIED, "this identity, platform or measurement is not let in any more")
    REFERENCES_REJECTED = CodeInfo(
        1217, Kind.UNAUTHENTIC, "a reference set is not signed by those who have to sign it, or older than one seen"
    )
    BUNDLE_STALE = CodeInfo(
        1225, Kind.STATE, "this TD trusts a CA epoch that has ended; it must learn of its successor"
    )
    EPOCH_CHANGING = CodeInfo(1218, Kind.STATE, "the CA is changing already, or is sealed")
    EPOCH_NOT_FOUND = CodeInfo(1219, Kind.NOT_FOUND, "no such CA epoch is trusted now")
    COLLATERAL_EXPIRED = CodeInfo(1220, Kind.STATE, "the collateral of this platform family is past its time")
    COLLATERAL_NOT_YET_VALID = CodeInfo(1221, Kind.STATE, "collateral was issued after what this machine's clock says")
    COLLATERAL_NOT_FOUND = CodeInfo(1222, Kind.NOT_FOUND, "there is no collateral for this platform family")
    COLLATERAL_UNAVAILABLE = CodeInfo(1223, Kind.UNAVAILABLE, "collateral could not be fetched")
    COLLATERAL_INVALID = CodeInfo(1224, Kind.UNAUTHENTIC, "collateral does not verify, or is older than known")
    SHARE_INVALID = CodeInfo(
        1240, Kind.UNAUTHENTIC, "a recovery share is damaged, forged, of another set, or was given twice"
    )
    SHARES_MISSING = CodeInfo(1241, Kind.STATE, "more recovery shares are needed")
    SEALED_ROOT_INVALID = CodeInfo(
        1242, Kind.UNAUTHENTIC, "a sealed root was edited, or does not open under this recovery key"
    )
    IDENTITY_EXISTS = CodeInfo(1243, Kind.EXISTS, "this identity, or this key, is registered already")
    IDENTITY_NOT_FOUND = CodeInfo(1244, Kind.NOT_FOUND, "no such identity is registered")
    REGISTER_DAMAGED = CodeInfo(1245, Kind.INTERNAL, "attest's register of identities was edited by somebody else")
    # 1300: keys
    KEY_NOT_FOUND = CodeInfo(1301, Kind.NOT_FOUND, "no such key of yours")
    KEY_EXISTS = CodeInfo(1302, Kind.EXISTS, "a key of this name exists")
    KEY_DISABLED = CodeInfo(1303, Kind.DENIED, "the key is disabled")
    RELEASE_DENIED = CodeInfo(1304, Kind.DENIED, "the key's release policy does not allow this")
    POLICY_INVALID = CodeInfo(1305, Kind.USAGE, "the policy does not parse")
    POLICY_VERSION = CodeInfo(1306, Kind.STATE, "the policy is not the successor of the one in force")
    WRAPPED_KEY_INVALID = CodeInfo(1307, Kind.UNAUTHENTIC, "the wrapped data key is not of this key")
    RECEIPT_INVALID = CodeInfo(1308, Kind.UNAUTHENTIC, "the broker's receipt does not verify")
    KEY_URI_INVALID = CodeInfo(1309, Kind.USAGE, "not a key URI")
    STORE_DAMAGED = CodeInfo(1310, Kind.INTERNAL, "the key store is damaged or under another root key")
    ENVELOPE_INVALID = CodeInfo(1311, Kind.USAGE, "a signed envelope does not parse, or holds another kind of document")
    SIGNATURE_INVALID = CodeInfo(1312, Kind.UNAUTHENTIC, "a signature does not verify, or is not by who has to sign")
    KEY_STATE = CodeInfo(1313, Kind.STATE, "the key is in a state that does not allow this")
    KEY_QUOTA = CodeInfo(1314, Kind.EXHAUSTED, "the tenant has as many keys, or the key as many versions, as allowed")
    DATASET_VERSION = CodeInfo(1315, Kind.STATE, "the version of a data set does not follow the newest one known")
    CASE_FAILED = CodeInfo(1320, Kind.USAGE, "an example case of the policy does not come out as it says")
    APPROVALS_MISSING = CodeInfo(1321, Kind.DENIED, "not enough of those whom the policy names have approved")
    APPROVAL_INVALID = CodeInfo(
        1322, Kind.UNAUTHENTIC, "an approval has expired, is of nobody whom the policy names, or for another policy"
    )
    LEASE_ENDED = CodeInfo(1323, Kind.DENIED, "the lease on a key ended and was not renewed")
    CUSTODIAN_UNAVAILABLE = CodeInfo(1340, Kind.UNAVAILABLE, "the back end behind the key broker cannot be reached")
    CUSTODIAN_REFUSED = CodeInfo(1341, Kind.STATE, "the back end refuses the key broker's credentials or its request")
    CUSTODIAN_KEY_LOST = CodeInfo(1342, Kind.STATE, "the back end does not have its part of a key any more")
    CUSTODIAN_ANSWER_INVALID = CodeInfo(1343, Kind.INTERNAL, "the back end answered what it cannot have meant")
    CUSTODIAN_KEY_EXPIRING = CodeInfo(1344, Kind.STATE, "the back end is about to delete its part of a key")
    CUSTODIAN_BUSY = CodeInfo(1345, Kind.EXHAUSTED, "the back end is asked too much at once")
    BACKEND_NOT_CONFIGURED = CodeInfo(1346, Kind.STATE, "a key is kept by a back end that is not configured")
    BROKER_SEALED = CodeInfo(1360, Kind.UNAVAILABLE, "the key broker is sealed: it answers when its root key is known")
    SEAL_STATE = CodeInfo(1361, Kind.STATE, "the key broker's root key is in a state that does not allow this")
    UNSEAL_REFUSED = CodeInfo(1362, Kind.DENIED, "this does not unseal the key broker")
    BACKUP_INVALID = CodeInfo(1363, Kind.UNAUTHENTIC, "a backup is cut, damaged, or of another store")
    DECISION_NOT_FOUND = CodeInfo(1380, Kind.NOT_FOUND, "no such decision of yours in the log")
    LOG_INVALID = CodeInfo(1381, Kind.UNAUTHENTIC, "a log, a receipt, a checkpoint or a proof does not verify")
    LOG_CONTRADICTED = CodeInfo(
        1382, Kind.UNAUTHENTIC, "the log shrank, forked or was replaced: it is not the one that was seen before"
    )
    # 1400: sealed files
    SEALED_FILE_INVALID = CodeInfo(
        1401, Kind.UNAUTHENTIC, "a sealed file is damaged, cut, or not the one it claims to be"
    )
    MANIFEST_INVALID = CodeInfo(1402, Kind.UNAUTHENTIC, "the manifest of a sealed directory is damaged or forged")
    SEALED_DIRECTORY_MISMATCH = CodeInfo(
        1403, Kind.UNAUTHENTIC, "a sealed directory does not hold what its manifest says"
    )
    NOT_SEALED = CodeInfo(1404, Kind.USAGE, "this is not a sealed file or directory")
    PLAINTEXT_REFUSED = CodeInfo(1407, Kind.DENIED, "plaintext would have left a trust domain")
    KEYRING_MISSING = CodeInfo(1406, Kind.USAGE, "sealed data was opened where no key can be found by itself")
    # 1500: training
    JOB_NOT_FOUND = CodeInfo(1501, Kind.NOT_FOUND, "no such job of yours")
    JOB_SPEC_INVALID = CodeInfo(1502, Kind.USAGE, "the job cannot be run as it is described")
    JOB_FAILED = CodeInfo(1503, Kind.STATE, "the job failed")
    JOB_ENDED = CodeInfo(1504, Kind.STATE, "the job has already ended")
    CORES_INSUFFICIENT = CodeInfo(1505, Kind.EXHAUSTED, "there are not enough cores to pin what was asked for")
    RANK_FAILED = CodeInfo(1506, Kind.INTERNAL, "a rank ended with an error")
    CHECKPOINT_FAILED = CodeInfo(1507, Kind.EXHAUSTED, "a checkpoint could not be written; the previous one is whole")
    PEER_LOST = CodeInfo(1508, Kind.UNAVAILABLE, "another rank of the job went away in the middle of a step")
    CHECKPOINT_ROLLED_BACK = CodeInfo(1510, Kind.UNAUTHENTIC, "storage holds older checkpoints than were written")
    # 1600: serving
    MODEL_NOT_FOUND = CodeInfo(1601, Kind.NOT_FOUND, "no such model of yours")
    MODEL_EXISTS = CodeInfo(1602, Kind.EXISTS, "a model of this name is deployed")
    MODEL_LOAD_FAILED = CodeInfo(1603, Kind.STATE, "the model could not be loaded")
    BACKEND_DOWN = CodeInfo(1604, Kind.UNAVAILABLE, "the model's backend is not running")
    ARCHIVE_INVALID = CodeInfo(1605, Kind.USAGE, "the model archive is not one that can be served")
    PREDICTION_FAILED = CodeInfo(1606, Kind.INTERNAL, "the model's handler failed on this request")
    PIN_FAILED = CodeInfo(1607, Kind.STATE, "a process could not be pinned to the cores asked for")

    @property
    def text(self) -> str:
        """The code as users see it: CLO-1203."""
        return f"CLO-{self.value.number}"

    @property
    def kind(self) -> Kind:
        return self.value.kind


class CloisterError(Exception):
    """Tell a caller, in public text, what failed, why, and what to do.

    Never put a secret, another tenant's name or a server-side path into it.
    """

    def __init__(self, code: Code, *, what: str, why: str = "", todo: str = "", block: str = "") -> None:
        super().__init__(what)
        self.code = code
        self.what = what
        self.why = why
        self.todo = todo
        self.block = block  # of a release policy: the first that refused

    @property
    def kind(self) -> Kind:
        return self.code.kind

    def __reduce__(self) -> tuple[object, ...]:
        """Let it travel between processes, as torch's collectives and multiprocessing send errors."""
        return _again, (self.code.text, self.what, self.why, self.todo, self.block)

    def __str__(self) -> str:
        parts = [f"{self.code.text}: {self.what}"]
        parts += [part for part in (self.why, self.todo) if part]
        return "\n".join(parts)


def code_from_text(text: str) -> Code | None:
    """Return the code of "CLO-1203", or None when this version does not know it."""
    for code in Code:
        if code.text == text:
            return code
    return None


def _again(code: str, what: str, why: str, todo: str, block: str) -> CloisterError:
    """Make an error again that came from another process; an unknown code is one of a newer release."""
    return CloisterError(code_from_text(code) or Code.INTERNAL, what=what, why=why, todo=todo, block=block)
