# SPDX-License-Identifier: Apache-2.0
"""One X.509 certificate of Intel's SGX PKI, read strictly, and what it may do (rows P1, P3, P4, P5, P6, P8).

Nothing here knows the time: a certificate has a `Window`, and whoever uses it asks whether `now` is inside.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import ExtensionOID

from cloister.tdx.der import (
    BIT_STRING,
    OBJECT_IDENTIFIER,
    PRINTABLE_STRING,
    SEQUENCE,
    SET,
    UTF8_STRING,
    DerError,
    DerReader,
)
from cloister.tdx.quote import QuoteRejected

ECDSA_SHA256: Final = ec.ECDSA(SHA256())
# AlgorithmIdentifier {ecdsa-with-SHA256} without parameters (RFC 5758, 3.2).
ECDSA_SHA256_DER: Final = bytes.fromhex("300a06082a8648ce3d040302")
# What `cryptography` raises about a certificate or CRL that it cannot read.
UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)

# Lines of 64 (RFC 7468, 3), or of 76 as Intel wrote them in the early days.
_PEM: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----\n"
    rb"((?:[A-Za-z0-9+/]{64}\n)*[A-Za-z0-9+/=]{1,64}|(?:[A-Za-z0-9+/]{76}\n)*[A-Za-z0-9+/=]{1,76})\n"
    rb"-----END CERTIFICATE-----\n?"
)
# SubjectPublicKeyInfo of an uncompressed P-256 point, up to x || y (RFC 5480).
_P256_SPKI_PREFIX: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_COMMON_NAME: Final = bytes.fromhex("550403")  # the contents of object identifier 2.5.4.3
_SERIAL_END: Final = 1 << 160  # RFC 5280, 4.1.2.2: positive, 20 octets; Intel's have the highest bit set
_KNOWN_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})


@dataclass(frozen=True, slots=True)
class Window:
    """When something signed is valid, both ends included."""

    check: str  # the row that is violated outside
    what: str
    start: datetime
    end: datetime


def require_within(windows: Iterable[Window], now: datetime) -> None:
    """Raise QuoteRejected with the row of the first window that `now` is outside of."""
    for window in windows:
        if not window.start <= now <= window.end:
            span = f"{window.start:%Y-%m-%dT%H:%M:%SZ} to {window.end:%Y-%m-%dT%H:%M:%SZ}"
            when = "not valid yet" if now < window.start else "expired"
            _reject(window.check, f"the {window.what} is {when} at {now:%Y-%m-%dT%H:%M:%SZ}: valid from {span}")


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate whose frame was read strictly, with the raw names that link it to others."""

    der: bytes
    x509: x509.Certificate
    what: str  # "leaf", "CA", "root", "TCB signing"
    issuer_der: bytes
    subject_der: bytes
    spki_der: bytes
    key: ec.EllipticCurvePublicKey
    valid_from: datetime
    valid_until: datetime

    def window(self, check: str) -> Window:
        return Window(check, f"{self.what} certificate", self.valid_from, self.valid_until)


def split_pem(pem: bytes, count: int) -> list[bytes]:
    """Return the DER of exactly `count` PEM blocks with nothing around them but one NUL at the end (P1)."""
    end = len(pem) - 1 if pem.endswith(b"\0") else len(pem)
    ders: list[bytes] = []
    offset = 0
    while offset < end:
        block = _PEM.match(pem, offset, end)
        if block is None or len(ders) == count:
            _reject("P1", f"not exactly {count} PEM certificates")
        text = block[1].replace(b"\n", b"")
        try:
            der = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise QuoteRejected("P1", "a PEM certificate is not base64") from None
        if base64.b64encode(der) != text:
            _reject("P1", "a PEM certificate is not canonical base64")
        ders.append(der)
        offset = block.end()
    if len(ders) != count:
        _reject("P1", f"{len(ders)} PEM certificates, not {count}")
    return ders


def load_certificate(der: bytes, what: str) -> Certificate:
    """Load one certificate; its frame is read strictly first (P1), and its algorithms are compared (P3)."""
    try:
        outer = DerReader(der)
        certificate = outer.enter()
        outer.finish()
        tbs = certificate.enter()
        outer_algorithm = certificate.take_whole(SEQUENCE)
        if certificate.take(BIT_STRING)[:1] != b"\0":
            raise DerError("a signature that is not whole bytes")
        certificate.finish()
        version = tbs.enter(0xA0)
        if version.integer() != 2:
            raise DerError("not an X.509 version 3 certificate")
        version.finish()
        if not 0 < tbs.integer() < _SERIAL_END:
            raise DerError("a serial number that is not positive, or longer than 20 bytes")
        inner_algorithm = tbs.take_whole(SEQUENCE)
        issuer_der = tbs.take_whole(SEQUENCE)
        tbs.take(SEQUENCE)  # validity
        subject_der = tbs.take_whole(SEQUENCE)
        public_key_info = tbs.take_whole(SEQUENCE)
    except DerError as error:
        raise QuoteRejected("P1", f"the {what} certificate is not DER: {error}") from None
    if not inner_algorithm == outer_algorithm == ECDSA_SHA256_DER:
        _reject("P3", f"the {what} certificate is not signed with ECDSA and SHA-256, inside and outside")
    if len(public_key_info) != len(_P256_SPKI_PREFIX) + 64 or not public_key_info.startswith(_P256_SPKI_PREFIX):
        _reject("P3", f"the {what} certificate's key is not an uncompressed P-256 point")
    try:
        loaded = x509.load_der_x509_certificate(der)
        valid_from, valid_until = loaded.not_valid_before_utc, loaded.not_valid_after_utc
    except UNREADABLE:
        raise QuoteRejected("P1", f"the {what} certificate does not parse") from None
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public_key_info[-65:])
    except ValueError:
        raise QuoteRejected("P3", f"the {what} certificate's key is not a point on P-256") from None
    return Certificate(der, loaded, what, issuer_der, subject_der, public_key_info, key, valid_from, valid_until)


def verify_signature(certificate: Certificate, key: ec.EllipticCurvePublicKey) -> None:
    try:
        key.verify(certificate.x509.signature, certificate.x509.tbs_certificate_bytes, ECDSA_SHA256)
    except InvalidSignature:
        raise QuoteRejected("P3", f"the {certificate.what} certificate is not signed by the key above it") from None


def _constraints(certificate: Certificate) -> tuple[x509.BasicConstraints, x509.KeyUsage]:
    """Return the two extensions that must be there; none is unknown and critical, none is there twice (P8)."""
    what = certificate.what
    try:
        extensions = certificate.x509.extensions
    except x509.DuplicateExtension as error:
        raise QuoteRejected("P8", f"the {what} certificate has extension {error.oid.dotted_string} twice") from None
    except UNREADABLE:
        raise QuoteRejected("P8", f"an extension of the {what} certificate does not parse") from None
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_CRITICAL:
            _reject("P8", f"the {what} certificate has unknown critical extension {extension.oid.dotted_string}")
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        return constraints.value, extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise QuoteRejected("P4", f"the {what} certificate lacks basicConstraints or keyUsage") from None


def require_issuer(certificate: Certificate, *, depth: int) -> None:
    """Require a CA for certificates and revocation lists, with room for `depth` CAs below it (P4)."""
    constraints, usage = _constraints(certificate)
    if not constraints.ca or not usage.key_cert_sign or not usage.crl_sign:
        _reject("P4", f"the {certificate.what} certificate may not issue certificates and revocation lists")
    if constraints.path_length is not None and constraints.path_length < depth:
        _reject("P4", f"the {certificate.what} certificate has path length {constraints.path_length}, below {depth}")


def require_end_entity(leaf: Certificate) -> None:
    constraints, usage = _constraints(leaf)
    if constraints.ca or usage.key_cert_sign or usage.crl_sign or not usage.digital_signature:
        _reject("P4", "the leaf certificate is a CA, or may not sign")


def require_name(certificate: Certificate, names: tuple[str, ...]) -> str:
    """Require a subject with exactly one common name, one of these, and return it (P5)."""
    try:
        found = [value.decode() for value in _common_names(certificate.subject_der)]
    except (DerError, UnicodeDecodeError):
        raise QuoteRejected("P1", f"the {certificate.what} certificate's subject does not parse") from None
    if len(found) != 1 or found[0] not in names:
        _reject("P5", f"the {certificate.what} certificate is of {found}, not of {' or '.join(names)}")
    return found[0]


def _common_names(name_der: bytes) -> list[bytes]:
    """Return the values of attribute 2.5.4.3 of a Name (RFC 5280, 4.1.2.4); UTF-8 or printable strings only."""
    values: list[bytes] = []
    relative_names = DerReader(name_der).enter()
    while not relative_names.at_end:
        attributes = relative_names.enter(SET)
        while not attributes.at_end:
            attribute = attributes.enter()
            kind = attribute.take(OBJECT_IDENTIFIER)
            value = attribute.take_any()
            attribute.finish()
            if kind == _COMMON_NAME:
                if value[0] not in (UTF8_STRING, PRINTABLE_STRING):
                    raise DerError("a common name that is no text")
                values.append(value[1])
    return values


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
