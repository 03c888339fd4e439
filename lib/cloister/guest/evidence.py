# SPDX-License-Identifier: Apache-2.0
"""Is this evidence authentic, and of a TD whose keys these are? The one answer, for attest and for owners alike.

`verify_evidence`, in this order, each step recorded:
1. form: sizes, key encodings, a role that a TD can have
2. addressed to the verifier: trust domain, audience, nonce
3. quote: its chain down to a configured root, its signatures
4. TD attributes: debug, profiling and migratable TDs are refused
5. event log: replays to RTMR0..3, and RTMR3 reads as one workload of the role
6. report_data: recomputed from the keys in the evidence

It says nothing about whether the workload is welcome: that is appraisal. No I/O; time is a parameter.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from cloister.api.common.v1 import evidence_pb2
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519, PUBLIC_KEY_SIZE
from cloister.identity import Role
from cloister.tdx.check import Check
from cloister.tdx.eventlog import MAX_LOG_SIZE, EventLog, EventLogRejected
from cloister.tdx.quote import MAX_QUOTE_SIZE, QuoteRejected
from cloister.tdx.reportdata import report_data
from cloister.tdx.verify import TrustRoot, VerifiedQuote, verify_quote
from cloister.tdx.workload import Workload, read_workload

_MAX_SPKI: Final = 512  # a P-256 SubjectPublicKeyInfo has 91 bytes
_NONCE_SIZES: Final = (32, 48)
# Bits of TD attributes (Intel TDX Module ABI, ATTRIBUTES): 0 debug, 1-7 reserved or profiling under "TD under debug".
_UNDER_DEBUG: Final = 0xFF
_SEPT_VE_DISABLE: Final = 1 << 28  # without it the host can inject #VE at will
_MIGRATABLE: Final = 1 << 29


class EvidenceRefused(Exception):
    """Evidence that failed a check: the last of `checks`."""

    def __init__(self, code: Code, checks: tuple[Check, ...]) -> None:
        super().__init__(f"{checks[-1].name}: wanted {checks[-1].wanted}, got {checks[-1].got}")
        self.code = code
        self.checks = checks

    def public(self, what: str) -> CloisterError:
        """Return the error for whoever sent the evidence."""
        failed = self.checks[-1]
        return CloisterError(
            self.code,
            what=what,
            why=f"{failed.name}: wanted {failed.wanted}, got {failed.got}",
            todo="compare the workload with what is registered; the verdict is on record",
        )


class Checklist:
    """Checks in the order in which they were made; the first that fails ends the matter."""

    def __init__(self) -> None:
        self._checks: list[Check] = []

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(self._checks)

    def require(self, name: str, ok: bool, code: Code, *, wanted: object, got: object) -> None:
        """Record a check; raise EvidenceRefused when it failed."""
        self._checks.append(Check(name, ok, _public(wanted), _public(got)))
        if not ok:
            raise EvidenceRefused(code, self.checks)

    def refuse(self, name: str, code: Code, *, wanted: object, got: object) -> NoReturn:
        """Record a check that failed, and raise."""
        self._checks.append(Check(name, False, _public(wanted), _public(got)))
        raise EvidenceRefused(code, self.checks)

    def require_equal(self, name: str, code: Code, *, wanted: bytes, got: bytes) -> None:
        """Record a comparison of digests, nonces or keys; constant time."""
        self.require(name, hmac.compare_digest(wanted, got), code, wanted=short(wanted), got=short(got))

    def passed(self, checks: Iterable[Check]) -> None:
        """Record checks that somebody else made and that hold."""
        self._checks += checks


@dataclass(frozen=True, slots=True)
class VerifiedEvidence:
    """Evidence that is authentic."""

    quote: VerifiedQuote
    log: EventLog
    workload: Workload
    role: Role
    tls_spki_der: bytes
    hpke_public_key: bytes
    receipt_spki_der: bytes  # empty when the role signs no receipts


def verify_evidence(
    evidence: evidence_pb2.Evidence,
    *,
    nonce: bytes,
    audience: str,
    trust_domain: str,
    roots: Sequence[TrustRoot],
    now: datetime,
    checklist: Checklist,
) -> VerifiedEvidence:
    """Return what the evidence proves; raise EvidenceRefused with all checks made so far."""
    role = _form(evidence, checklist)  # 1
    require = checklist.require
    mismatch = Code.REPORT_DATA_MISMATCH
    require(
        "evidence.trust-domain",
        evidence.trust_domain == trust_domain,
        mismatch,
        wanted=trust_domain,
        got=evidence.trust_domain,
    )
    require("evidence.audience", evidence.audience == audience, mismatch, wanted=audience, got=evidence.audience)
    checklist.require_equal("evidence.nonce", mismatch, wanted=nonce, got=evidence.nonce)  # 2
    try:
        quote = verify_quote(evidence.quote, roots=roots, now=now)  # 3
    except QuoteRejected as error:
        checklist.refuse(f"quote.{error.check}", Code.QUOTE_REJECTED, wanted="an authentic TD quote", got=error.reason)
    checklist.passed(Check(f"quote.{check.name}", check.ok, check.wanted, check.got) for check in quote.checks)
    body = quote.quote.body
    _attributes(int.from_bytes(body.td_attributes, "little"), checklist)  # 4
    log, workload = _workload(evidence.event_log, body.rtmrs, role, checklist)  # 5
    checklist.require_equal("report-data", mismatch, wanted=report_data_of(evidence), got=body.report_data)  # 6
    return VerifiedEvidence(
        quote=quote,
        log=log,
        workload=workload,
        role=role,
        tls_spki_der=evidence.tls_spki_der,
        hpke_public_key=evidence.hpke_public_key,
        receipt_spki_der=evidence.receipt_spki_der,
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


def short(value: bytes) -> str:
    """Return the beginning of a digest or key in hexadecimal, as it stands in verdicts."""
    return value.hex() if len(value) <= 48 else f"{value[:32].hex()}... ({len(value)} bytes)"


def _public(value: object) -> str:
    """Return short printable ASCII: part of it may have been written by the sender."""
    return str(value)[:500].encode("ascii", "backslashreplace").decode("ascii")[:500]


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
    return Role(evidence.role)


def _attributes(attributes: int, checklist: Checklist) -> None:
    code = Code.APPRAISAL_FAILED
    checklist.require(
        "td.debug",
        not attributes & _UNDER_DEBUG,
        code,
        wanted="no debugging, no profiling",
        got=f"attributes {attributes:#018x}",
    )
    checklist.require(
        "td.sept-ve-disable",
        bool(attributes & _SEPT_VE_DISABLE),
        code,
        wanted="set",
        got="set" if attributes & _SEPT_VE_DISABLE else "clear",
    )
    checklist.require(
        "td.migratable",
        not attributes & _MIGRATABLE,
        code,
        wanted="clear",
        got="set" if attributes & _MIGRATABLE else "clear",
    )


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
