# SPDX-License-Identifier: Apache-2.0
"""A TLS server with the certificate that EHSM makes for itself: X.509 version 1, CN=ehsm, no other name."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cloister_sim import der

_SHA256_RSA = (1, 2, 840, 113549, 1, 1, 11)
_COMMON_NAME = (2, 5, 4, 3)


def version_1_certificate(key: rsa.RSAPrivateKey) -> bytes:
    """Return a self-signed certificate without a version field and without extensions, in DER."""
    name = der.sequence(der.element(0x31, der.sequence(der.oid(_COMMON_NAME), der.element(0x0C, b"ehsm"))))
    algorithm = der.sequence(der.oid(_SHA256_RSA), der.element(0x05, b""))
    now = datetime.now(UTC)
    times = (now - timedelta(hours=1), now + timedelta(days=365))
    validity = der.sequence(*(der.element(0x17, f"{time:%y%m%d%H%M%SZ}".encode()) for time in times))
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    body = der.sequence(der.integer(7), algorithm, name, validity, name, spki)
    signature = key.sign(body, padding.PKCS1v15(), hashes.SHA256())
    certificate = der.sequence(body, algorithm, der.element(0x03, b"\0" + signature))
    assert x509.load_der_x509_certificate(certificate).version is x509.Version.v1
    return certificate


@asynccontextmanager
async def old_server(directory: Path, answer: bytes) -> AsyncIterator[tuple[int, Path, bytes]]:
    """Serve one HTTP answer to everyone; give port, certificate file and SubjectPublicKeyInfo."""
    key = rsa.generate_private_key(65537, 2048)
    certificate = x509.load_der_x509_certificate(version_1_certificate(key))
    certificate_file, key_file = directory / "v1.pem", directory / "v1.key"
    certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
    key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_file, key_file)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(answer), answer))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    try:
        yield server.sockets[0].getsockname()[1], certificate_file, spki
    finally:
        server.close()
        await server.wait_closed()
