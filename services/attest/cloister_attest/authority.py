# SPDX-License-Identifier: Apache-2.0
"""The workload CA: a root, one intermediate per role, and the key of attestation results.

All of it is made at start and lives in memory: one process life is one CA epoch, and there is no secret at rest. The
root's key signs the intermediates and is forgotten at once.
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
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister import ear
from cloister.identity import Role, SpiffeId
from cloister.runtime.bundle import TrustBundle

AUTHORITY_LIFE: Final = timedelta(days=90)  # a process that runs longer is restarted, and with it the epoch
MAX_SVID_LIFE: Final = timedelta(hours=1)
MAX_USER_LIFE: Final = timedelta(hours=12)
_BACKDATED: Final = timedelta(seconds=30)  # for peers whose clocks are behind; counts towards the life


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that was issued."""

    spiffe_id: SpiffeId
    chain_pem: bytes  # leaf, then the CA of its role
    leaf_der: bytes
    not_after: datetime


class Authority:
    """One CA epoch."""

    def __init__(self, trust_domain: str, *, now: datetime) -> None:
        self.epoch = f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        self._now = now
        self._keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in Role}
        root_key = ec.generate_private_key(ec.SECP256R1())
        root = self._ca("root", root_key.public_key(), root_key, path_length=1)
        self._intermediates = {
            role: self._ca(role, key.public_key(), root_key, path_length=0) for role, key in self._keys.items()
        }
        self.token_key = ec.generate_private_key(ec.SECP256R1())
        token_jwk = ear.public_jwk(self.token_key.public_key())
        self.token_key_id = token_jwk["kid"]
        self.bundle = TrustBundle(
            trust_domain=trust_domain,
            epoch=self.epoch,
            root_pem=root.public_bytes(Encoding.PEM),
            intermediates={role: ca.public_bytes(Encoding.PEM) for role, ca in self._intermediates.items()},
            token_keys=(token_jwk,),
        )

    def issue(
        self, spiffe_id: SpiffeId, public_key: ec.EllipticCurvePublicKey, *, life: timedelta, now: datetime
    ) -> Issued:
        """Issue a certificate under the CA of the identity's role, for at most an hour (users: 12 hours).

        The name is the caller's decision; nothing of a certificate request comes in here but its key.
        """
        role = spiffe_id.role
        ca = self._intermediates[role]
        not_before = now.replace(microsecond=0) - _BACKDATED
        longest = MAX_USER_LIFE if role is Role.USER else MAX_SVID_LIFE
        not_after = min(now.replace(microsecond=0) + life, not_before + longest, ca.not_valid_after_utc)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(spiffe_id))]
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if role.is_service:
            # Who serves is matched by name, because gRPC clients cannot match the URI; all others only call.
            names.append(x509.DNSName(spiffe_id.dns_name))
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        leaf = (
            x509.CertificateBuilder()
            .subject_name(_name(role))
            .issuer_name(ca.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(not_before)
            .not_valid_after(not_after)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(_issued_by(self._keys[role].public_key()), critical=False)
            .sign(self._keys[role], SHA256())
        )
        chain = leaf.public_bytes(Encoding.PEM) + ca.public_bytes(Encoding.PEM)
        return Issued(spiffe_id, chain, leaf.public_bytes(Encoding.DER), not_after)

    def _ca(
        self, name: str, key: ec.EllipticCurvePublicKey, root_key: ec.EllipticCurvePrivateKey, *, path_length: int
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(_name(f"{name} CA", self.epoch))
            .issuer_name(_name("root CA", self.epoch))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(self._now.replace(microsecond=0) - _BACKDATED)
            .not_valid_after(self._now.replace(microsecond=0) + AUTHORITY_LIFE)
            .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(_issued_by(root_key.public_key()), critical=False)
            .sign(root_key, SHA256())
        )


def _name(common_name: str, epoch: str = "") -> x509.Name:
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Cloister"),
        x509.NameAttribute(NameOID.COMMON_NAME, f"Cloister {common_name}"),
    ]
    if epoch:
        # Two epochs must not have CAs of the same name: chains are found by name.
        attributes.append(x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, epoch))
    return x509.Name(attributes)


def _issued_by(key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )
