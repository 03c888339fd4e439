# SPDX-License-Identifier: Apache-2.0
"""The development server's TLS certificate: self-signed, for loopback, made once and renewed under the same key."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code

_LIFE: Final = timedelta(days=365)
_RENEW_BEFORE: Final = timedelta(days=30)


def server_context(directory: Path, now: datetime) -> tuple[ssl.SSLContext, Path]:
    """Return the server's TLS context and the file with its certificate, for clients; raise CloisterError."""
    key_file, certificate_file = directory / "server.key", directory / "server.pem"
    try:
        if not key_file.exists():
            key = ec.generate_private_key(ec.SECP256R1())
            write_atomically(key_file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
        loaded = load_pem_private_key(key_file.read_bytes(), password=None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError("not an EC key")
        if not certificate_file.exists() or _ends(certificate_file) - now < _RENEW_BEFORE:
            certificate = _self_signed(loaded, now or datetime.now(UTC))
            write_atomically(certificate_file, certificate.public_bytes(Encoding.PEM), mode=0o644)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(certificate_file, key_file)
        return context, certificate_file
    except (OSError, ValueError) as error:
        raise CloisterError(
            Code.IO_FAILED,
            what=f"the TLS certificate in {directory} cannot be used",
            why=str(error),
            todo="remove server.key and server.pem: others are made at the next start",
        ) from error


def _ends(path: Path) -> datetime:
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ehsm")])
    names = [x509.DNSName("localhost"), *(x509.IPAddress(ip_address(text)) for text in ("127.0.0.1", "::1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=10))
        .not_valid_after(now + _LIFE)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, SHA256())
    )
