# SPDX-License-Identifier: Apache-2.0
"""One epoch of the workload CA: a root, one intermediate per role, and the key of attestation results.

The root's key signs the intermediates at the beginning and trust updates as long as somebody may know no newer root
(`cloister.runtime.trust`). Keys are in memory; what may be written of them is `to_secret`, for sealing.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_der_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister import ear
from cloister.identity import Role, SpiffeId
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.trust import SigningRoot

AUTHORITY_LIFE: Final = timedelta(days=90)
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


@dataclass(frozen=True, slots=True)
class Authority:
    """One CA epoch. `create` makes one; `from_secret` brings one back."""

    epoch: str
    started: datetime
    root: SigningRoot
    token_key: ec.EllipticCurvePrivateKey
    _keys: Mapping[Role, ec.EllipticCurvePrivateKey]
    _intermediates: Mapping[Role, x509.Certificate]

    @classmethod
    def create(cls, *, now: datetime) -> Authority:
        """Draw the keys of a new epoch and sign its CAs, for 90 days."""
        started = now.replace(microsecond=0)
        epoch = f"{started:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
        keys = {role: _new_key() for role in Role}
        root_key = _new_key()
        root = _ca("root", root_key.public_key(), root_key, epoch=epoch, started=started, path_length=1)
        intermediates = {
            role: _ca(role, key.public_key(), root_key, epoch=epoch, started=started, path_length=0)
            for role, key in keys.items()
        }
        return cls(epoch, started, SigningRoot(root, root_key), _new_key(), keys, intermediates)

    @property
    def ends(self) -> datetime:
        """When its CAs run out."""
        return self.root.certificate.not_valid_after_utc

    @property
    def token_jwk(self) -> dict[str, str]:
        return ear.public_jwk(self.token_key.public_key())

    @property
    def token_key_id(self) -> str:
        return self.token_jwk["kid"]

    @property
    def key_ids(self) -> frozenset[bytes]:
        """Key identifiers of its intermediates (20 bytes each), as they stand in what they issued."""
        return frozenset(
            x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest for key in self._keys.values()
        )

    def to_secret(self) -> dict[str, Any]:
        """Return all of it, private keys included, as values for JSON. To be sealed at once."""
        return {
            "epoch": self.epoch,
            "started": int(self.started.timestamp()),
            "root": root_to_secret(self.root),
            "token_key": _private(self.token_key),
            "keys": {str(role): _private(key) for role, key in self._keys.items()},
            "intermediates": {
                str(role): _text(ca.public_bytes(Encoding.DER)) for role, ca in self._intermediates.items()
            },
        }

    @classmethod
    def from_secret(cls, values: Mapping[str, Any]) -> Authority:
        """Return what `to_secret` gave; raise ValueError, KeyError or TypeError for anything else."""
        return cls(
            epoch=str(values["epoch"]),
            started=datetime.fromtimestamp(values["started"], UTC),
            root=root_from_secret(values["root"]),
            token_key=_key(values["token_key"]),
            _keys={role: _key(values["keys"][role]) for role in Role},
            _intermediates={
                role: x509.load_der_x509_certificate(_bytes(values["intermediates"][role])) for role in Role
            },
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


def root_to_secret(root: SigningRoot) -> dict[str, str]:
    """Return a root and its private key as values for JSON."""
    return {"certificate": _text(root.certificate.public_bytes(Encoding.DER)), "key": _private(root.key)}


def root_from_secret(values: Mapping[str, str]) -> SigningRoot:
    """Return what `root_to_secret` gave; errors as for `Authority.from_secret`."""
    return SigningRoot(x509.load_der_x509_certificate(_bytes(values["certificate"])), _key(values["key"]))


def bundle_of(authorities: Iterable[Authority], *, trust_domain: str, sequence: int) -> TrustBundle:
    """Return the bundle that trusts these epochs, the newest first."""
    epochs = list(authorities)
    return TrustBundle(
        trust_domain=trust_domain,
        epoch=epochs[0].epoch,
        sequence=sequence,
        root_pem=b"".join(found.root.certificate.public_bytes(Encoding.PEM) for found in epochs),
        intermediates={
            role: b"".join(found._intermediates[role].public_bytes(Encoding.PEM) for found in epochs) for role in Role
        },
        token_keys=tuple(found.token_jwk for found in epochs),
    )


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _ca(
    name: str,
    key: ec.EllipticCurvePublicKey,
    root_key: ec.EllipticCurvePrivateKey,
    *,
    epoch: str,
    started: datetime,
    path_length: int,
) -> x509.Certificate:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(f"{name} CA", epoch))
        .issuer_name(_name("root CA", epoch))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(started - _BACKDATED)
        .not_valid_after(started + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(_issued_by(root_key.public_key()), critical=False)
        .sign(root_key, SHA256())
    )


def _private(key: ec.EllipticCurvePrivateKey) -> str:
    return _text(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()))


def _key(text: str) -> ec.EllipticCurvePrivateKey:
    key = load_der_private_key(_bytes(text), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("not a P-256 key")
    return key


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: str) -> bytes:
    return base64.b64decode(text, validate=True)


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
