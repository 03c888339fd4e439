# SPDX-License-Identifier: Apache-2.0
"""The user's own identity: a key made once on this machine, and short-lived certificates for it from attest.

A certificate is renewed when half of its life is over, or when attest's certificate authority is another one than
the one that issued it. The private key never leaves its file; attest knows its digest from its configuration.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.cli.privatekey import read_private_key, unusable_key, write_private_key
from cloister.cli.state import StateDirectory
from cloister.errors import CloisterError, Code
from cloister.identity import Role

if TYPE_CHECKING:
    from cloister.runtime.bundle import TrustBundle

_TIMEOUT_S: Final = 10.0
_WHAT: Final = "the user's key"


def make_user_key(state: StateDirectory) -> ec.EllipticCurvePrivateKey:
    """Return the user's P-256 key; make it, readable by its owner only, when there is none yet."""
    if not state.user_key.exists():
        write_private_key(state.user_key, ec.generate_private_key(ec.SECP256R1()))
    return load_user_key(state)


def load_user_key(state: StateDirectory) -> ec.EllipticCurvePrivateKey:
    """Return the user's key; raise CloisterError when it is missing, readable by others, or not a P-256 key."""
    key = read_private_key(
        state.user_key,
        what=_WHAT,
        todo="`cloister dev up` makes one; name the right state directory with --state",
    )
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise unusable_key(state.user_key, "it is not a P-256 key", what=_WHAT)
    return key


def write_user_key(path: Path) -> tuple[Path, Path]:
    """Write a new P-256 key (0600) and a request under it (FILE.csr); overwrite nothing. Return both paths."""
    from cloister.atomicfile import write_atomically

    request = path.with_name(f"{path.name}.csr")
    for file in (path, request):
        if file.exists():
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"{file} is already there",
                why="a key that is registered could not be used any more",
                todo="use it, or name another file",
            )
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    write_atomically(path, pem, mode=0o600)
    write_atomically(request, csr.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return path, request


def read_key_or_request(path: Path) -> tuple[bytes, bytes]:
    """Return a public key (DER) and the request it came in (DER), empty when it came alone; raise CloisterError."""
    data = path.read_bytes()[: 1 << 16]
    der, spki = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        if b"CERTIFICATE REQUEST" in data:
            request = x509.load_pem_x509_csr(data)
            return request.public_key().public_bytes(der, spki), request.public_bytes(der)
        return serialization.load_pem_public_key(data).public_bytes(der, spki), b""
    except (ValueError, UnsupportedAlgorithm):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"{path} is neither a request nor a public key",
            why="wanted PEM: CERTIFICATE REQUEST or PUBLIC KEY",
            todo="have the user make one: cloister identity key FILE",
        ) from None


def spki_sha256(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the digest by which attest's configuration names the user (hex)."""
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


@dataclass(frozen=True, slots=True)
class UserCertificate:
    """The present certificate and the intermediate that signed it."""

    leaf: x509.Certificate
    issuer: x509.Certificate

    @classmethod
    def read(cls, state: StateDirectory) -> UserCertificate | None:
        """Return the certificate of the state directory, or None when there is none that could be used."""
        try:
            leaf, issuer, *_ = x509.load_pem_x509_certificates(state.user_chain.read_bytes())
        except (OSError, ValueError):
            return None
        return cls(leaf, issuer)

    @property
    def spiffe_id(self) -> str:
        names = self.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return names.get_values_for_type(x509.UniformResourceIdentifier)[0]

    @property
    def not_after(self) -> datetime:
        return self.leaf.not_valid_after_utc

    def is_due(self, *, bundle: TrustBundle, key: ec.EllipticCurvePrivateKey, now: datetime) -> bool:
        """Say whether to fetch a new one: half its life is over, or its issuer or key is not the present one."""
        start, end = self.leaf.not_valid_before_utc, self.leaf.not_valid_after_utc
        trusted = x509.load_pem_x509_certificates(bundle.intermediate(Role.USER))
        half_over = now >= start + (end - start) / 2
        return half_over or self.issuer not in trusted or self.leaf.public_key() != key.public_key()


def read_bundle(state: StateDirectory) -> TrustBundle:
    """Return the trust bundle that attest wrote into the state directory."""
    from cloister.runtime.bundle import TrustBundle

    try:
        return TrustBundle.parse(state.bundle.read_bytes())
    except OSError as error:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"the trust bundle {state.bundle} cannot be read",
            why=error.strerror or str(error),
            todo="attest writes it at its start: cloister dev up",
        ) from error


async def ensure_certificate(
    state: StateDirectory, *, enrolment: str, force: bool = False, now: datetime | None = None
) -> UserCertificate:
    """Return a user certificate with at least half of its life to go; fetch one from attest when there is none."""
    bundle = read_bundle(state)
    key = load_user_key(state)
    present = UserCertificate.read(state)
    if present is not None and not force and not present.is_due(bundle=bundle, key=key, now=now or datetime.now(UTC)):
        return present
    return await _fetch(state, key, bundle=bundle, enrolment=enrolment)


async def _fetch(
    state: StateDirectory, key: ec.EllipticCurvePrivateKey, *, bundle: TrustBundle, enrolment: str
) -> UserCertificate:
    from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
    from cloister.atomicfile import write_atomically
    from cloister.runtime.channel import invoke, open_enrolment_channel

    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    channel = open_enrolment_channel(enrolment, bundle=bundle)
    try:
        answer = await invoke(
            attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate,
            attest_pb2.IssueUserCertificateRequest(csr_der=request.public_bytes(serialization.Encoding.DER)),
            timeout_s=_TIMEOUT_S,
            what="fetching your certificate from attest",
        )
    finally:
        await channel.close()
    write_atomically(state.user_chain, answer.certificate_chain_pem, mode=0o600)
    write_atomically(state.gateway_ca, bundle.intermediate(Role.GATEWAY), mode=0o644)
    issued = UserCertificate.read(state)
    if issued is None or issued.leaf.public_key() != key.public_key():
        raise CloisterError(
            Code.EVIDENCE_UNEXPECTED,
            what="attest's answer is not a certificate for your key",
            why="the chain does not parse, or holds another public key",
            todo="check that --state names the stack you mean; cloister doctor",
        )
    return issued
