# SPDX-License-Identifier: Apache-2.0
"""The development root and the certificates under it: Intel's names and shapes, another organisation, made here.

Names and extensions are those of a real PCK chain, so that one verifier reads both; only the root differs.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID, ObjectIdentifier

from cloister_sim import der

ORGANISATION: Final = "Cloister Simulated Platform"
CPU_SVN: Final = bytes.fromhex("02020202030100030000000000000000")
_SGX_ARC: Final = (1, 2, 840, 113741, 1, 13, 1)
_ROOT_LIFE: Final = timedelta(days=20 * 365)
_CA_LIFE: Final = timedelta(days=15 * 365)
_LEAF_LIFE: Final = timedelta(days=7 * 365)


@dataclass(frozen=True, slots=True)
class PlatformIdentity:
    """What the SGX extension says about the platform."""

    ppid: bytes  # 16, random: one per development platform
    platform_instance_id: bytes  # 16, random
    fmspc: bytes = bytes.fromhex("5109c1000000")  # of no real platform
    pce_id: bytes = bytes(2)
    cpu_svn: bytes = CPU_SVN
    pce_svn: int = 13

    @classmethod
    def generate(cls) -> PlatformIdentity:
        return cls(secrets.token_bytes(16), secrets.token_bytes(16))

    def sgx_extension(self) -> bytes:
        """Return the value of extension 1.2.840.113741.1.13.1 as Intel's Platform CA writes it."""
        tcb = [_member((2, n), der.integer(svn)) for n, svn in enumerate(self.cpu_svn, start=1)]
        tcb.append(_member((2, 17), der.integer(self.pce_svn)))
        tcb.append(_member((2, 18), der.octets(self.cpu_svn)))
        configuration = [_member((7, n), der.boolean(value=True)) for n in (1, 2, 3)]
        return der.sequence(
            _member((1,), der.octets(self.ppid)),
            _member((2,), der.sequence(*tcb)),
            _member((3,), der.octets(self.pce_id)),
            _member((4,), der.octets(self.fmspc)),
            _member((5,), der.enumerated(1)),
            _member((6,), der.octets(self.platform_instance_id)),
            _member((7,), der.sequence(*configuration)),
        )


def make_root(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """Return the self-signed development root."""
    name = _name("Intel SGX Root CA")
    return _issue(name, name, key.public_key(), key, now, _ROOT_LIFE, path_length=1)


def make_ca(
    key: ec.EllipticCurvePrivateKey, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    """Return the PCK intermediate CA under the root."""
    subject = _name("Intel SGX PCK Platform CA")
    return _issue(subject, root.subject, key.public_key(), root_key, now, _CA_LIFE, path_length=0)


def make_pck(
    key: ec.EllipticCurvePrivateKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    identity: PlatformIdentity,
) -> x509.Certificate:
    """Return the platform's PCK certificate."""
    subject = _name("Intel SGX PCK Certificate")
    sgx = x509.UnrecognizedExtension(ObjectIdentifier(".".join(str(arc) for arc in _SGX_ARC)), identity.sgx_extension())
    return _issue(subject, ca.subject, key.public_key(), ca_key, now, _LEAF_LIFE, path_length=None, extra=sgx)


def make_tcb_signer(
    key: ec.EllipticCurvePrivateKey, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    """Return the certificate of whoever signs TCB info and enclave identities."""
    subject = _name("Intel SGX TCB Signing")
    return _issue(subject, root.subject, key.public_key(), root_key, now, _LEAF_LIFE, path_length=None)


def make_crl(
    issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey, now: datetime, *, life: timedelta, number: int
) -> bytes:
    """Return an issuer's revocation list (DER), of nothing."""
    return (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.subject)
        .last_update(now)
        .next_update(now + life)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.CRLNumber(number), critical=False)
        .sign(issuer_key, SHA256())
        .public_bytes(Encoding.DER)
    )


def to_pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _issue(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    life: timedelta,
    *,
    path_length: int | None,
    extra: x509.UnrecognizedExtension | None = None,
) -> x509.Certificate:
    """Issue one certificate; a CA when it has a path length, else an end entity."""
    is_ca = path_length is not None
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=not is_ca,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of one machine and its containers differ
        .not_valid_after(now + life)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(usage, critical=True)
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=path_length), critical=True)
    )
    if extra is not None:
        builder = builder.add_extension(extra, critical=False)
    return builder.sign(issuer_key, SHA256())


def _name(common_name: str) -> x509.Name:
    attributes = ((NameOID.COMMON_NAME, common_name), (NameOID.ORGANIZATION_NAME, ORGANISATION))
    return x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])


def _member(arcs: tuple[int, ...], value: bytes) -> bytes:
    return der.sequence(der.oid(_SGX_ARC + arcs), value)
