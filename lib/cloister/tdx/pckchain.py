# SPDX-License-Identifier: Apache-2.0
"""The PCK certificate chain of a quote, down to a configured root (rows P1 to P8)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, NameOID

from cloister.errors import CloisterError, Code
from cloister.tdx.check import Check
from cloister.tdx.der import BIT_STRING, SEQUENCE, DerError, DerReader
from cloister.tdx.pckextension import SGX_EXTENSION_OID, PckExtension
from cloister.tdx.quote import QuoteRejected

ROOT_NAME: Final = "Intel SGX Root CA"
CA_NAMES: Final = ("Intel SGX PCK Platform CA", "Intel SGX PCK Processor CA")
LEAF_NAME: Final = "Intel SGX PCK Certificate"
ECDSA_SHA256: Final = ec.ECDSA(SHA256())

# Lines of 64 (RFC 7468, 3), or of 76 as Intel wrote them in the early days.
_PEM: Final = re.compile(
    rb"-----BEGIN CERTIFICATE-----\n"
    rb"((?:[A-Za-z0-9+/]{64}\n)*[A-Za-z0-9+/=]{1,64}|(?:[A-Za-z0-9+/]{76}\n)*[A-Za-z0-9+/=]{1,76})\n"
    rb"-----END CERTIFICATE-----\n?"
)
_CHAIN_LENGTH: Final = 3
# AlgorithmIdentifier {ecdsa-with-SHA256} without parameters (RFC 5758, 3.2).
_ECDSA_SHA256_DER: Final = bytes.fromhex("300a06082a8648ce3d040302")
# SubjectPublicKeyInfo of an uncompressed P-256 point, up to x || y (RFC 5480).
_P256_SPKI_PREFIX: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
_SERIAL_END: Final = 1 << 160  # RFC 5280, 4.1.2.2: positive, 20 octets; Intel's have the highest bit set
_KNOWN_CRITICAL: Final = frozenset({ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.KEY_USAGE})
# What `cryptography` raises about a certificate that it cannot read.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


@dataclass(frozen=True, slots=True)
class _Certificate:
    """A certificate whose frame was read strictly, with the raw names that link it to others."""

    x509: x509.Certificate
    what: str  # "leaf", "CA", "root"
    issuer_der: bytes
    subject_der: bytes
    spki_der: bytes
    key: ec.EllipticCurvePublicKey
    valid_from: datetime
    valid_until: datetime


@dataclass(frozen=True, slots=True)
class TrustRoot:
    """A root CA that quotes may come from. Only its own bytes are used, never a root that came with a quote."""

    certificate_der: bytes
    simulated: bool  # true for a development root: everything under it says so
    certificate: _Certificate = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            # P1, P3, P4, P5 and P8 of the root, once and for all.
            certificate = _load(self.certificate_der, "root")
            _require_issuer(certificate, depth=1)
            _require_name(certificate, (ROOT_NAME,))
        except QuoteRejected as error:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what="a trust root is not usable",
                why=error.reason,
                todo=f"configure a certificate of {ROOT_NAME!r}, P-256, as PEM",
            ) from None
        object.__setattr__(self, "certificate", certificate)

    @classmethod
    def from_pem(cls, pem: bytes, *, simulated: bool) -> TrustRoot:
        """Read one PEM certificate; raise CloisterError(CONFIG_INVALID) when it cannot be a root."""
        try:
            certificate_der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        except _UNREADABLE:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what="a trust root is not usable",
                why="the file holds no PEM certificate",
                todo="configure the root CA's certificate as PEM",
            ) from None
        return cls(certificate_der, simulated)

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the certificate (32 bytes)."""
        return hashlib.sha256(self.certificate_der).digest()


@dataclass(frozen=True, slots=True)
class VerifiedChain:
    """What a chain says once it leads to a configured root."""

    root: TrustRoot
    pck_key: ec.EllipticCurvePublicKey
    pck: PckExtension
    checks: tuple[Check, ...]


def verify_pck_chain(pem: bytes, *, roots: Sequence[TrustRoot], now: datetime) -> VerifiedChain:
    """Verify leaf, CA and root; raise QuoteRejected P1 to P8. `now` is aware."""
    # P1: exactly three certificates, leaf first.
    leaf_der, ca_der, root_der = _split(pem)

    # P2: the last one is a configured root, which from here on stands in for it.
    root = _configured_root(root_der, roots)
    leaf = _load(leaf_der, "leaf")
    ca = _load(ca_der, "CA")

    # P3: P-256 keys, ECDSA-SHA256 signatures, each by the next one's key.
    _verify_signature(ca, root.certificate.key)
    _verify_signature(leaf, ca.key)

    # P4: who may issue, and who may not. The root was looked at when it was configured.
    _require_issuer(ca, depth=0)
    _require_end_entity(leaf)

    # P5: roles by name and by position.
    ca_name = _require_name(ca, CA_NAMES)
    _require_name(leaf, (LEAF_NAME,))
    if leaf.issuer_der != ca.subject_der or ca.issuer_der != root.certificate.subject_der:
        _reject("P5", "a certificate of the chain names another issuer than the one above it")

    # P6: all three are valid now.
    for certificate in (leaf, ca, root.certificate):
        start, end = certificate.valid_from, certificate.valid_until
        if not start <= now <= end:
            _reject("P6", f"the {certificate.what} certificate is valid from {start:%F %T} to {end:%F %T}, not now")
    ends = min(leaf.valid_until, ca.valid_until, root.certificate.valid_until)

    # P7: one SGX extension, exactly as specified. P8 was seen to with the extensions of P4.
    pck = _sgx_extension(leaf)

    checks = (
        Check("P1", True, "three certificates, leaf to root", f"{len(pem)} bytes of PEM"),
        Check("P2", True, "a configured root", f"SHA-256 {root.fingerprint.hex()}"),
        Check("P3", True, "ECDSA P-256 with SHA-256, each signed by the next", "all verify"),
        Check("P4", True, "CAs that may issue, a leaf that may not", "as wanted"),
        Check("P5", True, f"{LEAF_NAME} under a PCK CA under {ROOT_NAME}", f"under {ca_name}"),
        Check("P6", True, f"valid at {now:%Y-%m-%dT%H:%M:%SZ}", f"until {ends:%Y-%m-%dT%H:%M:%SZ}"),
        Check("P7", True, "one SGX extension, strict DER", f"FMSPC {pck.fmspc.hex()}"),
        Check("P8", True, "no unknown critical and no duplicate extension", "none"),
    )
    return VerifiedChain(root, leaf.key, pck, checks)


def _split(pem: bytes) -> tuple[bytes, bytes, bytes]:
    """Return the DER of exactly three PEM blocks with nothing around them but one NUL at the end (P1)."""
    end = len(pem) - 1 if pem.endswith(b"\0") else len(pem)
    ders: list[bytes] = []
    offset = 0
    while offset < end:
        block = _PEM.match(pem, offset, end)
        if block is None or len(ders) == _CHAIN_LENGTH:
            _reject("P1", f"not exactly {_CHAIN_LENGTH} PEM certificates")
        text = block[1].replace(b"\n", b"")
        try:
            der = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise QuoteRejected("P1", "a PEM certificate is not base64") from None
        if base64.b64encode(der) != text:
            _reject("P1", "a PEM certificate is not canonical base64")
        ders.append(der)
        offset = block.end()
    if len(ders) != _CHAIN_LENGTH:
        _reject("P1", f"{len(ders)} PEM certificates, not {_CHAIN_LENGTH}")
    leaf, ca, root = ders
    return leaf, ca, root


def _configured_root(der: bytes, roots: Sequence[TrustRoot]) -> TrustRoot:
    """Return the configured root that this certificate is, or is another edition of (P2).

    Intel has issued the certificate of its root more than once; quotes of 2022 carry one of path length 0. An edition
    has the same name and key and is signed by that key. What else it says does not matter: it is not used.
    """
    root = next((root for root in roots if root.certificate_der == der), None)
    if root is not None:
        return root
    edition = _load(der, "root")
    wanted = (edition.subject_der, edition.spki_der)
    root = next((root for root in roots if (root.certificate.subject_der, root.certificate.spki_der) == wanted), None)
    if root is None:
        fingerprint = hashlib.sha256(der).hexdigest()
        _reject("P2", f"the chain ends in a root that is not configured here (SHA-256 {fingerprint})")
    _verify_signature(edition, root.certificate.key)
    return root


def _load(der: bytes, what: str) -> _Certificate:
    """Load one certificate; its frame is read strictly first (P1), and its algorithms are compared (P3)."""
    try:
        outer = DerReader(der)
        certificate = outer.enter()
        outer.finish()
        tbs = certificate.enter()
        outer_algorithm = certificate.take_whole(SEQUENCE)
        certificate.take(BIT_STRING)
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
    if not inner_algorithm == outer_algorithm == _ECDSA_SHA256_DER:
        _reject("P3", f"the {what} certificate is not signed with ECDSA and SHA-256, inside and outside")
    if len(public_key_info) != len(_P256_SPKI_PREFIX) + 64 or not public_key_info.startswith(_P256_SPKI_PREFIX):
        _reject("P3", f"the {what} certificate's key is not an uncompressed P-256 point")
    try:
        loaded = x509.load_der_x509_certificate(der)
        canonical = loaded.public_bytes(Encoding.DER)
        valid_from, valid_until = loaded.not_valid_before_utc, loaded.not_valid_after_utc
    except _UNREADABLE:
        raise QuoteRejected("P1", f"the {what} certificate does not parse") from None
    if canonical != der:
        _reject("P1", f"the {what} certificate is not canonical DER")
    try:
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), public_key_info[-65:])
    except ValueError:
        raise QuoteRejected("P3", f"the {what} certificate's key is not a point on P-256") from None
    return _Certificate(loaded, what, issuer_der, subject_der, public_key_info, key, valid_from, valid_until)


def _verify_signature(certificate: _Certificate, key: ec.EllipticCurvePublicKey) -> None:
    try:
        key.verify(certificate.x509.signature, certificate.x509.tbs_certificate_bytes, ECDSA_SHA256)
    except InvalidSignature:
        raise QuoteRejected("P3", f"the {certificate.what} certificate is not signed by the key above it") from None


def _constraints(certificate: _Certificate) -> tuple[x509.BasicConstraints, x509.KeyUsage]:
    """Return the two extensions that must be there; none is unknown and critical, none is there twice (P8)."""
    what = certificate.what
    try:
        extensions = certificate.x509.extensions
    except x509.DuplicateExtension as error:
        raise QuoteRejected("P8", f"the {what} certificate has extension {error.oid.dotted_string} twice") from None
    except _UNREADABLE:
        raise QuoteRejected("P8", f"an extension of the {what} certificate does not parse") from None
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_CRITICAL:
            _reject("P8", f"the {what} certificate has unknown critical extension {extension.oid.dotted_string}")
    try:
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        return constraints.value, extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        raise QuoteRejected("P4", f"the {what} certificate lacks basicConstraints or keyUsage") from None


def _require_issuer(certificate: _Certificate, *, depth: int) -> None:
    """Require a CA with room for `depth` CAs below it (P4)."""
    constraints, usage = _constraints(certificate)
    if not constraints.ca or not usage.key_cert_sign:
        _reject("P4", f"the {certificate.what} certificate may not issue certificates")
    if constraints.path_length is not None and constraints.path_length < depth:
        _reject("P4", f"the {certificate.what} certificate has path length {constraints.path_length}, below {depth}")


def _require_end_entity(leaf: _Certificate) -> None:
    constraints, usage = _constraints(leaf)
    if constraints.ca or usage.key_cert_sign or usage.crl_sign or not usage.digital_signature:
        _reject("P4", "the leaf certificate is a CA, or may not sign")


def _require_name(certificate: _Certificate, names: tuple[str, ...]) -> str:
    try:
        subject = certificate.x509.subject
    except _UNREADABLE:
        raise QuoteRejected("P1", f"the {certificate.what} certificate's subject does not parse") from None
    found = [name.value for name in subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(found) != 1 or found[0] not in names:
        _reject("P5", f"the {certificate.what} certificate is of {found}, not of {' or '.join(names)}")
    return str(found[0])


def _sgx_extension(leaf: _Certificate) -> PckExtension:
    try:
        value = leaf.x509.extensions.get_extension_for_oid(SGX_EXTENSION_OID).value
    except x509.ExtensionNotFound:
        raise QuoteRejected("P7", "the leaf certificate has no SGX extension") from None
    if not isinstance(value, x509.UnrecognizedExtension):
        _reject("P7", "the SGX extension is not one")
    try:
        return PckExtension.parse(value.value)
    except DerError as error:
        raise QuoteRejected("P7", f"SGX extension: {error}") from None


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
