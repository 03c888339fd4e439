# SPDX-License-Identifier: Apache-2.0
"""A small CA for tests: root, one intermediate per role, and certificates right or wrong in one named way."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cloister.identity import Role, SpiffeId
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import StaticCredentials, TlsMaterial
from cloister.secret import SecretBytes

TRUST_DOMAIN = "cloister.test"


def some_id(role: Role, trust_domain: str = TRUST_DOMAIN) -> SpiffeId:
    """Return a plausible SPIFFE id of a role."""
    match role:
        case Role.RANK:
            return SpiffeId.of_rank(trust_domain, tenant="hospital-a", job="job-1", rank=0)
        case Role.BACKEND:
            return SpiffeId.of_backend(trust_domain, tenant="hospital-a", model="reviews", backend="b1")
        case Role.USER:
            return SpiffeId.of_user(trust_domain, tenant="hospital-a", user="alice")
        case _:
            return SpiffeId.service(trust_domain, role)


class TestCa:
    """`TestCa().credentials(Role.USER)` is all most tests need."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    def __init__(self, trust_domain: str = TRUST_DOMAIN, epoch: str = "test-1") -> None:
        self.trust_domain = trust_domain
        self.epoch = epoch
        self.now = datetime.now(UTC)
        self._root_key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._authority("root", None)
        self._keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in Role}
        self.intermediates = {role: self._authority(f"{role} CA", role) for role in Role}
        self.token_key = ec.generate_private_key(ec.SECP256R1())
        self.token_key_id = f"{epoch}-token"

    @property
    def bundle(self) -> TrustBundle:
        return self.bundle_with()

    def bundle_with(self, *others: TestCa) -> TrustBundle:
        """Return a bundle that trusts this CA and, as while CAs change, others."""
        authorities = (self, *others)
        return TrustBundle(
            trust_domain=self.trust_domain,
            epoch=self.epoch,
            root_pem=b"".join(_pem(ca.root) for ca in authorities),
            intermediates={role: b"".join(_pem(ca.intermediates[role]) for ca in authorities) for role in Role},
            token_keys=tuple(_jwk(ca.token_key, ca.token_key_id) for ca in authorities),
        )

    def credentials(self, who: Role | SpiffeId, **changes: object) -> StaticCredentials:
        return StaticCredentials(self.material(who, **changes))  # type: ignore[arg-type]

    def material(
        self,
        who: Role | SpiffeId,
        *,
        life: timedelta = timedelta(hours=1),
        age: timedelta = timedelta(minutes=5),
        uris: Sequence[str] | None = None,
        dns: str | None = None,
        issued_by: Role | None = None,
        bundle: TrustBundle | None = None,
    ) -> TlsMaterial:
        """Issue a certificate that expires in `life` (negative: it has expired) and began `age` before now.

        `uris`, `dns` and `issued_by` make it wrong; the material then still names the identity it should have had.
        """
        spiffe_id = some_id(who, self.trust_domain) if isinstance(who, Role) else who
        key = ec.generate_private_key(ec.SECP256R1())
        issuer = issued_by or spiffe_id.role
        end = self.now + life
        names: list[x509.GeneralName] = [
            x509.UniformResourceIdentifier(uri) for uri in (uris if uris is not None else [str(spiffe_id)])
        ]
        if dns or spiffe_id.role.is_service:
            names.append(x509.DNSName(dns or spiffe_id.dns_name))
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(f"test {spiffe_id.role}"))
            .issuer_name(self.intermediates[issuer].subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(self.now, end) - age)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(ca=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
                critical=False,
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._keys[issuer].public_key()), critical=False
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        leaf = builder.sign(self._keys[issuer], hashes.SHA256())
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        return TlsMaterial(
            private_key_pem=SecretBytes(key_pem),
            chain_pem=_pem(leaf) + _pem(self.intermediates[issuer]),
            bundle=bundle or self.bundle,
            spiffe_id=spiffe_id,
            not_after=leaf.not_valid_after_utc,
        )

    def _authority(self, name: str, role: Role | None) -> x509.Certificate:
        key = self._root_key if role is None else self._keys[role]
        return (
            x509.CertificateBuilder()
            .subject_name(_name(f"{name} {self.epoch}"))
            .issuer_name(_name(f"root {self.epoch}"))
            .public_key(key.public_key())
            .serial_number(int.from_bytes(secrets.token_bytes(16), "big") >> 1)
            .not_valid_before(self.now - timedelta(days=1))
            .not_valid_after(self.now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=1 if role is None else 0), critical=True)
            .add_extension(_usage(ca=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._root_key.public_key()), critical=False
            )
            .sign(self._root_key, hashes.SHA256())
        )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


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


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _jwk(key: ec.EllipticCurvePrivateKey, kid: str) -> dict[str, str]:
    numbers = key.public_key().public_numbers()

    def encode(value: int) -> str:
        return base64.urlsafe_b64encode(value.to_bytes(32, "big")).rstrip(b"=").decode()

    return {"kty": "EC", "crv": "P-256", "x": encode(numbers.x), "y": encode(numbers.y), "kid": kid, "alg": "ES256"}
