# SPDX-License-Identifier: Apache-2.0
"""TLS to a server that is known beforehand: by its CA, its certificate, or its public key."""

from __future__ import annotations

import hashlib
import hmac
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import CloisterError, Code


def pinned_context(ca_file: Path | None, pins: frozenset[bytes]) -> ssl.SSLContext:
    """Return a client's context that accepts what is under `ca_file`, if given, and has one of `pins`, if given.

    Raises ValueError when neither is given, CloisterError(CONFIG_INVALID) when the file is no certificate.
    """
    if ca_file is None and not pins:
        raise ValueError("a server that nothing identifies")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # EHSM makes itself a certificate of X.509 version 1, which strict verification (Python 3.13) takes for no anchor.
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    # A server's own certificate is an anchor, too.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    if ca_file is None:
        # The key is what counts: names and dates are whatever the server wrote.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        try:
            context.load_verify_locations(cafile=ca_file)
        except OSError as error:  # ssl.SSLError is one
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"{ca_file} cannot be used to recognise the back end",
                why=error.strerror or "it holds no certificates in PEM",
                todo="name a PEM file with the certificate of its CA, or its own, as ca",
            ) from error
    if pins:
        context.sslobject_class = _pinned_class(pins)
    return context


def _pinned_class(pins: frozenset[bytes]) -> type[ssl.SSLObject]:
    class PinnedObject(ssl.SSLObject):
        """Ends the handshake when the peer's key is another: before a byte of a request is sent."""

        def do_handshake(self) -> None:
            super().do_handshake()
            certificate = self.getpeercert(binary_form=True)
            if certificate is None or not _is_pinned(certificate, pins):
                raise ssl.SSLCertVerificationError("the server's public key is not a pinned one")

    return PinnedObject


def _is_pinned(certificate: bytes, pins: frozenset[bytes]) -> bool:
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
        digest = hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest()
    except ValueError:
        return False
    return any(hmac.compare_digest(digest, pin) for pin in pins)
