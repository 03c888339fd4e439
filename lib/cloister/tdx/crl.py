# SPDX-License-Identifier: Apache-2.0
"""Certificate revocation lists (rows R1 to R6): DER, PEM or hex in, a verified list out.

A list that is missing or cannot be read is a rejection, never "unknown, so fine".
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtensionOID

from cloister.tdx.certificate import ECDSA_SHA256, ECDSA_SHA256_DER, UNREADABLE, Certificate, Window
from cloister.tdx.der import BIT_STRING, SEQUENCE, DerError, DerReader
from cloister.tdx.quote import QuoteRejected

MAX_CRL_SIZE: Final = 3 * 1024 * 1024  # bytes of DER: 80,000 revoked certificates; Intel's have 100

_PEM: Final = re.compile(rb"-----BEGIN X509 CRL-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END X509 CRL-----\s*\0?")
_KNOWN_CRITICAL: Final = (ExtensionOID.AUTHORITY_KEY_IDENTIFIER, ExtensionOID.CRL_NUMBER)


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list that its issuer signed; it holds at all times inside its window."""

    crl: x509.CertificateRevocationList
    issuer_der: bytes
    number: int | None  # increases with every list of this issuer; Intel's all have one
    window: Window

    def require_not_revoked(self, certificate: Certificate, check: str) -> None:
        """Raise QuoteRejected(check) when the list names this certificate; serials are compared as numbers."""
        try:
            entry = self.crl.get_revoked_certificate_by_serial_number(certificate.x509.serial_number)
        except UNREADABLE:
            raise QuoteRejected("R6", "an entry of a revocation list does not parse") from None
        if entry is not None:
            _reject(check, f"the {certificate.what} certificate is revoked since {entry.revocation_date_utc:%Y-%m-%d}")


def to_der(data: bytes, what: str) -> bytes:
    """Return DER for a list in DER, PEM or hex; raise QuoteRejected R6, or X2 when it is too large."""
    if not data:
        _reject("R6", f"the {what} is missing")
    if len(data) > 2 * MAX_CRL_SIZE + 2:
        _reject("X2", f"the {what} has {len(data)} bytes; at most {MAX_CRL_SIZE} of DER are read")
    if data[:5] == b"-----":
        block = _PEM.fullmatch(data)
        if block is None:
            _reject("R6", f"the {what} is not one PEM block")
        try:
            der = base64.b64decode(block[1].translate(None, b"\r\n"), validate=True)
        except binascii.Error:
            raise QuoteRejected("R6", f"the {what} is PEM that is not base64") from None
    elif data[:1] == b"\x30" and data[1:2] >= b"\x80":  # a list has over 127 bytes; hex has no such byte
        der = data
    else:
        try:
            der = bytes.fromhex(data.rstrip(b"\0").decode("ascii"))
        except ValueError:
            raise QuoteRejected("R6", f"the {what} is neither DER, PEM nor hex") from None
    if len(der) > MAX_CRL_SIZE:
        _reject("X2", f"the {what} has {len(der)} bytes; at most {MAX_CRL_SIZE} are read")
    return der


def verify_crl(der: bytes, issuer: Certificate, *, check: str, what: str) -> RevocationList:
    """Verify a list of this issuer; raise QuoteRejected: R6 when it is not one, `check` when it is not right."""
    issuer_der, crl = _load(der, check, what)
    # The issuer of the list is the issuer of the certificates it is about, and signed it.
    if issuer_der != issuer.subject_der:
        _reject(check, f"the {what} is of another issuer")
    try:
        issuer.key.verify(crl.signature, crl.tbs_certlist_bytes, ECDSA_SHA256)
    except InvalidSignature:
        raise QuoteRejected(check, f"the {what} is not signed by its issuer") from None
    number = _extensions(crl, check, what)
    try:
        start: datetime = crl.last_update_utc
        end = crl.next_update_utc
    except UNREADABLE:
        raise QuoteRejected("R6", f"the {what} has no readable times") from None
    if end is None:
        _reject(check, f"the {what} does not say when the next one comes")
    return RevocationList(crl, issuer_der, number, Window(check, what, start, end))


def _load(der: bytes, check: str, what: str) -> tuple[bytes, x509.CertificateRevocationList]:
    """Read the frame strictly, compare its algorithms, and return the issuer's raw name and the list."""
    try:
        if len(der) >= 1 << 24:  # three length bytes are all that the reader takes
            raise DerError("too long")
        outer = DerReader(der)
        listing = outer.enter()
        outer.finish()
        tbs = listing.enter()
        outer_algorithm = listing.take_whole(SEQUENCE)
        if listing.take(BIT_STRING)[:1] != b"\0":
            raise DerError("a signature that is not whole bytes")
        listing.finish()
        if tbs.integer() != 1:
            raise DerError("not a version 2 list")
        inner_algorithm = tbs.take_whole(SEQUENCE)
        issuer_der = tbs.take_whole(SEQUENCE)
    except DerError as error:
        raise QuoteRejected("R6", f"the {what} is not DER: {error}") from None
    if not inner_algorithm == outer_algorithm == ECDSA_SHA256_DER:
        _reject(check, f"the {what} is not signed with ECDSA and SHA-256, inside and outside")
    try:
        return issuer_der, x509.load_der_x509_crl(der)
    except UNREADABLE:
        raise QuoteRejected("R6", f"the {what} does not parse") from None


def _extensions(crl: x509.CertificateRevocationList, check: str, what: str) -> int | None:
    """Return the CRL number, if any; refuse unknown critical extensions, which would narrow what the list is about."""
    try:
        extensions = crl.extensions
    except UNREADABLE:
        raise QuoteRejected(check, f"the {what} has an extension twice, or one that does not parse") from None
    number = None
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_CRITICAL:
            _reject(check, f"the {what} has unknown critical extension {extension.oid.dotted_string}")
        if isinstance(extension.value, x509.CRLNumber):
            number = extension.value.crl_number
    return number


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
