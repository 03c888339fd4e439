# SPDX-License-Identifier: Apache-2.0
"""Is a quote authentic? The algorithm, its rows numbered as in errors and reports.

1. X1      the time is one at which TDX exists, and has a zone
2. H1-H9   size, header, and nothing behind the signature data
   D1-D4   the signature data: types and sizes, exactly
3. P1-P8   the PCK chain leads to a configured root, and is valid now
4. E4      signatures and key are numbers that ECDSA P-256 allows
5. E1      the PCK key signed the quoting enclave's report
   E2      that report names the attestation key
   Q7      the quoting enclave is not a debug enclave
6. E3      the attestation key signed header and body

A quote that passes is of a platform that Intel (or the development root) certified. Whether that platform is up to
date is the business of the collateral (rows R, T, Q), which comes between 5 and 6; whether the TD is acceptable
(rows A) is decided elsewhere, by policy.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from typing import Final, NoReturn

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from cloister.tdx.check import Check
from cloister.tdx.pckchain import ECDSA_SHA256, TrustRoot, verify_pck_chain
from cloister.tdx.quote import QeReport, Quote, QuoteRejected

__all__ = ["Check", "QuoteRejected", "TrustRoot", "VerifiedQuote", "verify_quote"]

_EARLIEST: Final = datetime(2018, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(2100, 1, 1, tzinfo=UTC)
# FIPS 186-5, P-256.
_FIELD: Final = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
_ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551

_WITNESS: Final = object()


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A quote that is authentic: only `verify_quote` makes one."""

    quote: Quote
    simulated: bool  # it comes from under a development root
    fmspc: bytes  # 6
    pceid: bytes  # 2
    ppid: bytes  # 16
    platform_instance_id: bytes  # 16, or empty
    root_fingerprint: bytes  # 32, SHA-256 of the root's certificate
    checks: tuple[Check, ...]  # all of them passed
    # An InitVar, so that dataclasses.replace() cannot make an altered one either.
    witness: InitVar[object]

    def __post_init__(self, witness: object) -> None:
        if witness is not _WITNESS:
            raise TypeError("only verify_quote makes a VerifiedQuote")


def verify_quote(data: bytes, *, roots: Sequence[TrustRoot], now: datetime) -> VerifiedQuote:
    """Verify a TD quote against the configured roots at the time `now` (aware).

    Raise QuoteRejected, with the row of the first check that fails, for everything else.
    """
    # 1. X1: a clock that was never set must not make old certificates valid.
    if now.tzinfo is None or not _EARLIEST <= now < _LATEST:
        _reject("X1", "the time of verification has no zone or is not between 2018 and 2100")
    now = now.astimezone(UTC)

    # 2. H1-H9, D1-D4: well formed.
    quote = Quote.parse(data)
    signature = quote.signature
    checks = [
        Check("H1-H9", True, "one TD quote of version 4", f"version {quote.version}, {len(data)} bytes"),
        Check(
            "D1-D4", True, "a QE report and a PCK chain, sizes exact", f"{len(signature.pck_chain_pem)} bytes of PEM"
        ),
    ]

    # 3. P1-P8: the chain.
    chain = verify_pck_chain(signature.pck_chain_pem, roots=roots, now=now)
    checks += chain.checks

    # 4. E4: before E1 to E3, which compute with these numbers. High s is valid.
    attestation_key = _attestation_key(signature.attestation_key)
    report_signature = _der_signature(signature.qe_report_signature, "QE report")
    quote_signature = _der_signature(signature.signature, "quote")
    checks.append(Check("E4", True, "0 < r, s < n; a key on the curve", "as wanted"))

    # 5. E1: the platform vouches for its quoting enclave, ...
    _verify("E1", chain.leaf.key, report_signature, signature.qe_report, "the PCK key did not sign the QE report")
    checks.append(Check("E1", True, "QE report signed by the PCK key", "verifies"))
    # E2: ... which vouches for the attestation key.
    report = QeReport.parse(signature.qe_report)
    wanted = hashlib.sha256(signature.attestation_key + signature.qe_auth_data).digest() + bytes(32)
    if not hmac.compare_digest(report.report_data, wanted):
        _reject("E2", "the QE report is about another attestation key")
    checks.append(Check("E2", True, "attestation key named by the QE report", wanted[:32].hex()))
    # Q7: a debug enclave's memory is open to its host. No identity mask can hide that here.
    if report.debug:
        _reject("Q7", "the quoting enclave is a debug enclave")
    checks.append(Check("Q7", True, "no debug quoting enclave", f"attributes {report.attributes.hex()}"))

    # R, T, Q: collateral is evaluated here, on chain.pck, report and quote.body, and adds its own checks.

    # 6. E3: the quoting enclave vouches for header and body.
    _verify("E3", attestation_key, quote_signature, quote.signed_bytes(), "the attestation key did not sign this quote")
    checks.append(Check("E3", True, "quote signed by the attestation key", "verifies"))

    return VerifiedQuote(
        quote=quote,
        simulated=chain.root.simulated,
        fmspc=chain.pck.fmspc,
        pceid=chain.pck.pce_id,
        ppid=chain.pck.ppid,
        platform_instance_id=chain.pck.platform_instance_id,
        root_fingerprint=chain.root.fingerprint,
        checks=tuple(checks),
        witness=_WITNESS,
    )


def _attestation_key(point: bytes) -> ec.EllipticCurvePublicKey:
    x, y = int.from_bytes(point[:32], "big"), int.from_bytes(point[32:], "big")
    if x >= _FIELD or y >= _FIELD:
        _reject("E4", "a coordinate of the attestation key is not below p")
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), b"\x04" + point)
    except ValueError:
        raise QuoteRejected("E4", "the attestation key is not a point on P-256") from None


def _der_signature(signature: bytes, what: str) -> bytes:
    """Return r || s as DER, which is what `cryptography` verifies."""
    r, s = int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big")
    if not (0 < r < _ORDER and 0 < s < _ORDER):
        _reject("E4", f"r or s of the {what}'s signature is not between 1 and n - 1")
    return encode_dss_signature(r, s)


def _verify(check: str, key: ec.EllipticCurvePublicKey, signature: bytes, message: bytes, reason: str) -> None:
    try:
        key.verify(signature, message, ECDSA_SHA256)
    except InvalidSignature:
        raise QuoteRejected(check, reason) from None


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
