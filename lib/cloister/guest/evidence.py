# SPDX-License-Identifier: Apache-2.0
"""Is this evidence authentic and acceptable, and whose keys are these? The one answer, for attest and for owners.

`EvidenceVerifier.verify`, in this order, each step recorded:
1. form: sizes, key encodings, a role that a TD can have
2. addressed to the verifier: trust domain, audience, nonce
3. platform: the quote is well formed, and its PCK chain leads to the root
4. collateral for that platform is there, and current
5. quote: signatures, revocation, TCB (cloister.tdx.verify); of a TD
6. event log: replays to RTMR0..3, and RTMR3 reads as one workload of the role
7. report_data: recomputed from the keys in the evidence
8. policy: platform, TD, measurements (cloister.appraisal.judge)

Who the workload is, and whether it is registered, is for attest to say. But for step 4 there is no I/O, and time is a
parameter: `verify` gives the same answer for the same inputs at any time.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn, TypeVar, TypeVarTuple, Unpack

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cloister.api.common.v1 import evidence_pb2
from cloister.appraisal.checklist import Checklist, EvidenceRefused, short
from cloister.appraisal.judge import TdAppraisal, appraise_td
from cloister.appraisal.policy import STRICT, TdPolicy
from cloister.appraisal.references import ReferenceSet
from cloister.collateral.family import PckCa, Tee
from cloister.collateral.source import CollateralSource
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519, PUBLIC_KEY_SIZE
from cloister.identity import Role
from cloister.tdx.body import TdBody
from cloister.tdx.check import Check
from cloister.tdx.collateral import Collateral
from cloister.tdx.eventlog import MAX_LOG_SIZE, EventLog, EventLogRejected
from cloister.tdx.pckchain import CA_NAMES, load_pck_chain
from cloister.tdx.quote import MAX_QUOTE_SIZE, Quote, QuoteRejected
from cloister.tdx.reportdata import report_data
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import Verdict
from cloister.tdx.workload import Workload, read_workload

__all__ = [
    "Checklist",
    "EvidenceRefused",
    "EvidenceVerifier",
    "Expected",
    "Trail",
    "VerifiedEvidence",
    "load_ed25519_spki",
    "load_p256_spki",
    "report_data_of",
    "short",
]

_MAX_SPKI: Final = 512  # a P-256 SubjectPublicKeyInfo has 91 bytes
_NONCE_SIZES: Final = (32, 48)
_TRUST_BUNDLE_SIZES: Final = (0, 48)
_MAX_PLATFORMS: Final = 4096  # whose family is remembered; about 100 bytes each
_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")
_Family = tuple[bytes, PckCa]  # FMSPC and CA
_CAS: Final = dict(zip(CA_NAMES, (PckCa.PLATFORM, PckCa.PROCESSOR), strict=True))


@dataclass(frozen=True, slots=True)
class Expected:
    """What evidence must be about: the verifier's nonce (32 or 48 bytes), its name, and its trust domain."""

    nonce: bytes
    audience: str
    trust_domain: str


@dataclass(frozen=True, slots=True)
class VerifiedEvidence:
    """Evidence that is authentic, of a TD that the policy accepts."""

    verdict: Verdict
    body: TdBody
    log: EventLog
    workload: Workload
    appraisal: TdAppraisal
    role: Role
    tls_spki_der: bytes
    hpke_public_key: bytes
    receipt_spki_der: bytes  # empty when the role signs no receipts
    trust_bundle: bytes  # digest of the trust bundle it holds now, 48 bytes; what it started with is the workload's


@dataclass(slots=True)
class Trail:
    """What a verification used besides its arguments, whether it succeeded or not."""

    platform: _Family | None = None  # FMSPC and CA, once the quote's chain has verified
    collateral: Collateral | None = None
    unavailable: CloisterError | None = None  # why there was no collateral


class EvidenceVerifier:
    """Judge evidence under one root, by one policy, with collateral from one source. Belongs to one event loop."""

    def __init__(
        self,
        root: TrustRoot,
        source: CollateralSource,
        *,
        policy: TdPolicy = STRICT,
        references: Iterable[ReferenceSet] = (),
        quotes: Verifier | None = None,
        workers: Executor | None = None,
    ) -> None:
        """`quotes` verifies under the same root; `workers` run what costs CPU time, by default the loop's threads."""
        self.root = root
        self.policy = policy
        self.references = {found.name: found for found in references}
        self._source = source
        self._verifier = quotes or Verifier([root])
        self._workers = workers
        # Families by the SHA-256 of a chain that verified: a success holds at all times, since it only names.
        self._platforms: dict[bytes, _Family] = {}

    async def verify(
        self,
        evidence: evidence_pb2.Evidence,
        expected: Expected,
        *,
        now: datetime,
        checklist: Checklist,
        trail: Trail | None = None,
    ) -> VerifiedEvidence:
        """Return what the evidence proves; raise EvidenceRefused with all checks made so far."""
        trail = trail or Trail()
        role, quote, family = await self._aside(self._platform, evidence, expected, checklist)
        trail.platform = family
        collateral = await self._collateral(family, checklist, trail)
        return await self._aside(self._judge, evidence, role, quote, collateral, now, checklist)

    async def _aside(self, work: Callable[[Unpack[_Args]], _T], *args: *_Args) -> _T:
        """Run `work` on a worker, never on the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *args)

    def _platform(
        self, evidence: evidence_pb2.Evidence, expected: Expected, checklist: Checklist
    ) -> tuple[Role, Quote, _Family]:
        """Take steps 1 to 3: nothing is asked of a collateral server for what has no genuine chain."""
        role = _form(evidence, checklist)  # 1
        _addressed(evidence, expected, checklist)  # 2
        try:  # 3
            quote = Quote.parse(evidence.quote)
            pem = quote.signature.pck_chain_pem
            key = hashlib.sha256(pem).digest()
            found = self._platforms.get(key)
            if found is None:
                chain = load_pck_chain(pem, roots=[self.root])
                found = (chain.pck.fmspc, _CAS[chain.ca_name])
                if len(self._platforms) >= _MAX_PLATFORMS:
                    self._platforms.clear()
                self._platforms[key] = found
        except QuoteRejected as error:
            _refuse_quote(error, checklist)
        return role, quote, found

    async def _collateral(self, family: _Family, checklist: Checklist, trail: Trail) -> Collateral:
        """Take step 4."""
        fmspc, ca = family
        wanted = f"current collateral for FMSPC {fmspc.hex()}"
        try:
            collateral = await self._source.get(fmspc, ca, Tee.TDX)
        except CloisterError as error:
            trail.unavailable = error
            got = f"{error.what}: {error.why}"
            checklist.refuse("collateral.available", error.code, wanted=wanted, got=got, todo=error.todo)
        checklist.require("collateral.available", True, Code.COLLATERAL_UNAVAILABLE, wanted=wanted, got="as wanted")
        trail.collateral = collateral
        return collateral

    def _judge(
        self,
        evidence: evidence_pb2.Evidence,
        role: Role,
        quote: Quote,
        collateral: Collateral,
        now: datetime,
        checklist: Checklist,
    ) -> VerifiedEvidence:
        """Take steps 5 to 8."""
        try:  # 5
            verdict = self._verifier.verify(evidence.quote, collateral, now=now)
        except QuoteRejected as error:
            _refuse_quote(error, checklist)
        checks = (Check(f"quote.{check.name}", check.ok, check.wanted, check.got) for check in verdict.checks)
        checklist.require_all(checks, Code.QUOTE_REJECTED)
        body = quote.body
        log, workload = _workload(evidence.event_log, body.rtmrs, role, checklist)  # 6
        wanted = report_data_of(evidence)
        checklist.require_equal("report-data", Code.REPORT_DATA_MISMATCH, wanted=wanted, got=body.report_data)  # 7
        appraisal = appraise_td(  # 8
            verdict, log, workload, policy=self.policy, references=self.references, now=now
        )
        checklist.require_all(appraisal.checks, Code.APPRAISAL_FAILED)
        return VerifiedEvidence(
            verdict=verdict,
            body=body,
            log=log,
            workload=workload,
            appraisal=appraisal,
            role=role,
            tls_spki_der=evidence.tls_spki_der,
            hpke_public_key=evidence.hpke_public_key,
            receipt_spki_der=evidence.receipt_spki_der,
            trust_bundle=evidence.trust_bundle or workload.trust_bundle,
        )


def report_data_of(evidence: evidence_pb2.Evidence) -> bytes:
    """Return the 64 bytes that the quote must carry for the other fields of this evidence."""
    return report_data(
        role=evidence.role,
        trust_domain=evidence.trust_domain,
        audience=evidence.audience,
        nonce=evidence.nonce,
        tls_spki_der=evidence.tls_spki_der,
        hpke_kem_id=evidence.hpke_kem_id,
        hpke_public_key=evidence.hpke_public_key,
        receipt_spki_der=evidence.receipt_spki_der,
        trust_bundle=evidence.trust_bundle,
    )


def load_p256_spki(der: bytes) -> ec.EllipticCurvePublicKey | None:
    """Return a P-256 key from its one canonical SubjectPublicKeyInfo, or None for anything else."""
    key = _load_spki(der)
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    return None


def load_ed25519_spki(der: bytes) -> ed25519.Ed25519PublicKey | None:
    """Return an Ed25519 key from its one canonical SubjectPublicKeyInfo, or None for anything else."""
    key = _load_spki(der)
    return key if isinstance(key, ed25519.Ed25519PublicKey) else None


def _load_spki(der: bytes) -> object:
    if len(der) > _MAX_SPKI:
        return None
    try:
        key = load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    # One key, one encoding: digests are taken over these bytes.
    return key if key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == der else None


def _form(evidence: evidence_pb2.Evidence, checklist: Checklist) -> Role:
    def require(name: str, ok: bool, wanted: object, got: object) -> None:
        checklist.require(f"evidence.{name}", ok, Code.ARGUMENT_INVALID, wanted=wanted, got=got)

    roles = [str(role) for role in Role if role.is_workload]
    require("role", evidence.role in roles, f"one of {', '.join(roles)}", repr(evidence.role[:32]))
    size = len(evidence.quote)
    require("quote-size", size <= MAX_QUOTE_SIZE, f"at most {MAX_QUOTE_SIZE} bytes", f"{size} bytes")
    size = len(evidence.event_log)
    require("log-size", size <= MAX_LOG_SIZE, f"at most {MAX_LOG_SIZE} bytes", f"{size} bytes")
    require("nonce-size", len(evidence.nonce) in _NONCE_SIZES, "32 or 48 bytes", f"{len(evidence.nonce)} bytes")
    tls = load_p256_spki(evidence.tls_spki_der)
    require("tls-key", tls is not None, "a P-256 key", "a P-256 key" if tls else "something else")
    kem = (evidence.hpke_kem_id, len(evidence.hpke_public_key))
    require(
        "hpke-key",
        kem == (KEM_MLKEM768_X25519, PUBLIC_KEY_SIZE),
        f"KEM {KEM_MLKEM768_X25519:#06x}, {PUBLIC_KEY_SIZE} bytes",
        f"KEM {kem[0]:#06x}, {kem[1]} bytes",
    )
    receipt = not evidence.receipt_spki_der or load_ed25519_spki(evidence.receipt_spki_der) is not None
    require("receipt-key", receipt, "an Ed25519 key or none", "as wanted" if receipt else "something else")
    size = len(evidence.trust_bundle)
    require("trust-bundle-size", size in _TRUST_BUNDLE_SIZES, "48 bytes or none", f"{size} bytes")
    return Role(evidence.role)


def _addressed(evidence: evidence_pb2.Evidence, expected: Expected, checklist: Checklist) -> None:
    code = Code.REPORT_DATA_MISMATCH
    for name, wanted, got in (
        ("trust-domain", expected.trust_domain, evidence.trust_domain),
        ("audience", expected.audience, evidence.audience),
    ):
        checklist.require(f"evidence.{name}", wanted == got, code, wanted=wanted, got=got)
    checklist.require_equal("evidence.nonce", code, wanted=expected.nonce, got=evidence.nonce)


def _refuse_quote(error: QuoteRejected, checklist: Checklist) -> NoReturn:
    checklist.refuse(f"quote.{error.check}", Code.QUOTE_REJECTED, wanted="an authentic TD quote", got=error.reason)


def _workload(
    data: bytes, rtmrs: tuple[bytes, bytes, bytes, bytes], role: Role, checklist: Checklist
) -> tuple[EventLog, Workload]:
    code = Code.EVENT_LOG_MISMATCH
    try:
        log = EventLog.parse(data)
    except EventLogRejected as error:
        checklist.refuse("event-log.form", code, wanted="an event log", got=error.reason)
    for index, (quoted, replayed) in enumerate(zip(rtmrs, log.replay(), strict=True)):
        checklist.require_equal(f"event-log.rtmr{index}", code, wanted=quoted, got=replayed)
    try:
        workload = read_workload(log)
    except EventLogRejected as error:
        checklist.refuse("event-log.workload", code, wanted="the events of one workload", got=error.reason)
    checklist.require("event-log.role", workload.role is role, code, wanted=role, got=workload.role)
    return log, workload
