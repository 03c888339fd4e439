# SPDX-License-Identifier: Apache-2.0
"""Say why a TLS connection fails: gRPC tells its caller "Socket closed" whatever the reason."""

from __future__ import annotations

import socket
import ssl
from datetime import UTC, datetime
from typing import Final

from cloister.errors import CloisterError
from cloister.identity import Role, dns_name
from cloister.runtime.address import split_address
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import CredentialSource, load_own_chain
from cloister.runtime.pem import PemInvalid, read_leaf

# An alert of the server's, as OpenSSL spells it, and what it means for the one who was refused.
_ALERTS: Final = {
    "CERTIFICATE_REQUIRED": "the server wants a client certificate and none was shown",
    "CERTIFICATE_EXPIRED": "the server refused the client certificate: it has expired",
    "UNKNOWN_CA": "the server refused the client certificate: it does not trust the CA that issued it",
    "BAD_CERTIFICATE": "the server refused the client certificate: it does not verify",
    "CERTIFICATE_UNKNOWN": "the server refused the client certificate: it does not verify",
    "HANDSHAKE_FAILURE": "the server and this client have no TLS parameters in common",
    "PROTOCOL_VERSION": "the server does not speak TLS 1.3",
}


def explain_tls(
    endpoint: str,
    credentials: CredentialSource | None,
    role: Role,
    *,
    bundle: TrustBundle | None = None,
    timeout_s: float = 5.0,
) -> str:
    """Shake hands with plain TLS and return the reason it fails in one line; empty when it succeeds.

    Without `credentials` (enrolment), `bundle` says whom to trust. Blocks for up to `timeout_s` per step.
    """
    trusted = bundle or (credentials.current().bundle if credentials else None)
    if trusted is None:
        raise ValueError("either credentials or a bundle must be given")
    try:
        host, port = split_address(endpoint)
        name = dns_name(role, trusted.trust_domain)
        context = _context(trusted, role, credentials)
    except CloisterError as error:
        return f"{error.what}: {error.why}"
    try:
        with socket.create_connection((host, port), timeout=timeout_s) as plain:
            found = _shake_hands(plain, context, name, endpoint)
            return _why_refused(credentials) if found is None else found
    except ConnectionRefusedError:
        return f"nothing listens on {endpoint}"
    except TimeoutError:
        return f"{endpoint} does not answer"
    except socket.gaierror:
        return f"the name {host} does not resolve"
    except OSError as error:
        return f"{endpoint}: {error.strerror or error}"


def _context(bundle: TrustBundle, role: Role, credentials: CredentialSource | None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    context.load_verify_locations(cadata=bundle.intermediate(role).decode("ascii"))
    if credentials is not None:
        load_own_chain(context, credentials.current())
    return context


def _shake_hands(plain: socket.socket, context: ssl.SSLContext, name: str, endpoint: str) -> str | None:
    """Return a reason, "" for success, or None when the server hung up without a word after our certificate."""
    try:
        with context.wrap_socket(plain, server_hostname=name) as connection:
            # In TLS 1.3 the client is done before the server has looked at its certificate. A gRPC server that is
            # content speaks next (SETTINGS); one that is not sends an alert, or just hangs up.
            return "" if connection.recv(1) else None
    except ssl.SSLCertVerificationError as error:
        if "Hostname mismatch" in error.verify_message:
            return f"the server's certificate is not for {name}"
        return f"the server's certificate is refused: {error.verify_message}; {_who_answers(endpoint)}"
    except ssl.SSLError as error:
        reason = error.reason or ""
        for alert, meaning in _ALERTS.items():
            if reason.endswith(f"ALERT_{alert}") or reason == alert:
                return meaning
        if reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNEXPECTED_EOF_WHILE_READING"):
            return f"{endpoint} does not speak TLS"
        return f"TLS failed: {reason.lower().replace('_', ' ') or error}"
    except ConnectionResetError:
        return None


def _why_refused(credentials: CredentialSource | None) -> str:
    """Find the reason on our side, since gRPC servers hang up without an alert."""
    if credentials is None:
        return "the server wants a client certificate and none was shown"
    material = credentials.current()
    if material.not_after <= datetime.now(UTC):
        return f"our own certificate expired at {material.not_after:%Y-%m-%d %H:%M:%S} UTC"
    return (
        f"the server hung up when it saw our certificate ({material.spiffe_id}): most likely it does not trust the CA "
        "that issued it, because its trust bundle is of another epoch"
    )


def _who_answers(endpoint: str) -> str:
    """Name the identity that answers, for a person to compare; nothing is sent to it and nothing trusted."""
    host, port = split_address(endpoint)
    try:
        uris = read_leaf(ssl.get_server_certificate((host, port), timeout=2.0).encode("ascii")).uris
    except (OSError, PemInvalid, ValueError):
        return "it shows no certificate that can be read"
    return f"it is {', '.join(uris)[:200] or 'a certificate without a SPIFFE id'}"
