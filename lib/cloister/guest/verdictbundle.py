# SPDX-License-Identifier: Apache-2.0
"""A verdict with everything it was made from, as a file, and the same verdict again from that file alone.

Nothing in a bundle is trusted but its own words about time, root and policy: the quote, the log and the collateral are
verified again, so a change in any of them shows. Checks that asked something else than the evidence (is the nonce
outstanding, is the job registered) cannot be made again; they are carried as they were recorded, before and after.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

import cloister
from cloister.api.common.v1 import evidence_pb2
from cloister.appraisal.checklist import Checklist, EvidenceRefused
from cloister.appraisal.policy import parse_td_policy
from cloister.appraisal.references import parse_reference_set
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import EvidenceVerifier, Expected, VerifiedEvidence
from cloister.tdx.check import Check
from cloister.tdx.collateral import MAX_COLLATERAL_SIZE, Collateral
from cloister.tdx.trustroot import TrustRoot
from cloister.tlv import sha384

FORMAT: Final = "cloister-verdict-1"
VERIFIER_ID: Final = f"cloister-attest/{cloister.__version__}"
MAX_BUNDLE_SIZE: Final = MAX_COLLATERAL_SIZE + 4 * 1024 * 1024  # bytes; real ones have 60 KB
_MAX_CHECKS: Final = 256
_MAX_REFERENCES: Final = 64


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, ser_json_bytes="base64", val_json_bytes="base64"
    )


class RecordedCheck(_Part):
    """One line of a verdict."""

    name: str
    ok: bool
    wanted: str
    got: str

    @classmethod
    def of(cls, check: Check) -> RecordedCheck:
        return cls(name=check.name, ok=check.ok, wanted=check.wanted, got=check.got)

    def check(self) -> Check:
        return Check(self.name, self.ok, self.wanted, self.got)


RecordedChecks = Annotated[tuple[RecordedCheck, ...], Field(max_length=_MAX_CHECKS)]


class RecordedEvidence(_Part):
    """The fields of Evidence (common/v1/evidence.proto)."""

    role: str
    trust_domain: str
    audience: str
    nonce: bytes
    quote: bytes
    event_log: bytes
    tls_spki_der: bytes
    hpke_kem_id: int = Field(ge=0, lt=2**32)
    hpke_public_key: bytes
    receipt_spki_der: bytes
    trust_bundle: bytes = b""

    @classmethod
    def of(cls, evidence: evidence_pb2.Evidence) -> RecordedEvidence:
        return cls(**{name: getattr(evidence, name) for name in cls.model_fields})

    def evidence(self) -> evidence_pb2.Evidence:
        return evidence_pb2.Evidence(**{name: getattr(self, name) for name in type(self).model_fields})


class RecordedExpectation(_Part):
    """What the verifier asked for."""

    nonce: bytes
    audience: str
    trust_domain: str


class RecordedRoot(_Part):
    """The root that quotes could come from."""

    certificate_der: bytes
    simulated: bool


class RecordedError(_Part):
    """Why there was no collateral."""

    code: str
    what: str
    why: str
    todo: str


class VerdictBundle(_Part):
    """One verdict, and what it was made from. Collateral is nine strings; policy and reference sets are their files."""

    format: Literal["cloister-verdict-1"] = FORMAT
    verifier: str  # "cloister-attest/<version>"
    time: AwareDatetime
    root: RecordedRoot
    expected: RecordedExpectation
    evidence: RecordedEvidence
    collateral: dict[str, str] | None
    unavailable: RecordedError | None
    policy: str
    references: Annotated[tuple[str, ...], Field(max_length=_MAX_REFERENCES)]
    before: RecordedChecks  # about the request
    checks: RecordedChecks  # about the evidence: what replay makes again
    after: RecordedChecks  # about the identity
    accepted: bool
    spiffe_id: str
    signature: str = Field(default="", max_length=2048)  # attest's (cloister.guest.verdictsignature)

    @classmethod
    def parse(cls, data: bytes) -> VerdictBundle:
        """Read a bundle; raise CloisterError(VERDICT_INVALID) for anything else."""
        if len(data) > MAX_BUNDLE_SIZE:
            raise _invalid(f"{len(data)} bytes; at most {MAX_BUNDLE_SIZE}")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise _invalid(f"{place}: {first['msg']}") from None

    def to_json(self) -> bytes:
        return self.model_dump_json(indent=1).encode()


@dataclass(frozen=True, slots=True)
class Replayed:
    """The verdict made again."""

    checks: tuple[Check, ...]  # all: recorded before, made again, recorded after
    accepted: bool
    evidence: VerifiedEvidence | None  # None: refused
    differences: tuple[str, ...]  # between the recorded verdict and this one

    @property
    def same(self) -> bool:
        return not self.differences


@functools.lru_cache(maxsize=16)
def collateral_json(collateral: Collateral) -> bytes:
    """Return verified collateral as JSON, revocation lists in hexadecimal: as a bundle holds it."""
    return collateral.to_json()


def collateral_digest(collateral: Collateral) -> bytes:
    """Return SHA-384 of the JSON form (48 bytes): the same whatever form the revocation lists came in."""
    return sha384(collateral_json(collateral))


async def replay(bundle: VerdictBundle, *, verifier_id: str = VERIFIER_ID) -> Replayed:
    """Make a verdict again from its bundle, at the bundle's time; `verifier_id` is what this verifier calls itself.

    Raises CloisterError when policy, reference sets or root of the bundle are not such. Under another version of the
    verifier only outcome and reason must agree: later versions may word checks differently, or make more of them.
    """
    references = [parse_reference_set(text.encode()) for text in bundle.references]
    root = TrustRoot(bundle.root.certificate_der, bundle.root.simulated)
    policy = parse_td_policy(bundle.policy.encode())
    verifier = EvidenceVerifier(root, _Recorded(bundle), policy=policy, references=references)
    expected = Expected(bundle.expected.nonce, bundle.expected.audience, bundle.expected.trust_domain)
    checklist, found = Checklist(), None
    with contextlib.suppress(EvidenceRefused):
        found = await verifier.verify(bundle.evidence.evidence(), expected, now=bundle.time, checklist=checklist)
    before, recorded, after = (
        tuple(one.check() for one in checks) for checks in (bundle.before, bundle.checks, bundle.after)
    )
    # What came after was only asked of evidence that passed.
    made = (*before, *checklist.checks, *(after if found else ()))
    accepted = found is not None and all(check.ok for check in made)
    exact = bundle.verifier == verifier_id
    differences = (*_differences(recorded, checklist.checks, exact=exact), *_outcome(bundle.accepted, accepted))
    return Replayed(made, accepted, found, differences)


def _differences(recorded: tuple[Check, ...], made: tuple[Check, ...], *, exact: bool) -> list[str]:
    if not exact:
        was, now = (next((check.name for check in checks if not check.ok), "") for checks in (recorded, made))
        return [] if was == now else [f"first failure: recorded {was or 'none'}, now {now or 'none'}"]
    differences = [
        f"{new.name}: recorded {_text(old)}, now {_text(new)}"
        for old, new in zip(recorded, made, strict=False)
        if old != new
    ]
    if len(recorded) != len(made):
        differences.append(f"{len(recorded)} checks recorded, {len(made)} made now")
    return differences


def _outcome(recorded: bool, made: bool) -> list[str]:
    words = {True: "accepted", False: "refused"}
    return [] if recorded is made else [f"outcome: recorded {words[recorded]}, now {words[made]}"]


def _text(check: Check) -> str:
    return f"{check.name} {'holds' if check.ok else 'fails'}, wanted {check.wanted}, got {check.got}"


class _Recorded:
    """The collateral of a bundle, or the reason why there was none, as a `CollateralSource`."""

    def __init__(self, bundle: VerdictBundle) -> None:
        self._bundle = bundle

    async def get(self, _fmspc: bytes, _ca: str, _tee: str) -> Collateral:
        error = self._bundle.unavailable
        if error is not None:
            code = Code.__members__.get(error.code, Code.COLLATERAL_UNAVAILABLE)
            raise CloisterError(code, what=error.what, why=error.why, todo=error.todo)
        if self._bundle.collateral is None:
            raise CloisterError(Code.COLLATERAL_NOT_FOUND, what="the bundle holds no collateral")
        return Collateral.of(self._bundle.collateral)


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.VERDICT_INVALID,
        what="this is not a verdict bundle",
        why=why,
        todo="export it again with `cloister attest bundle`",
    )
