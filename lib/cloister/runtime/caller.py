# SPDX-License-Identifier: Apache-2.0
"""Who is calling: the identity of a peer's certificate, for the handler that runs on its behalf."""

from __future__ import annotations

import hmac
import re
import secrets
import ssl
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import NOTHING_REVOKED, Revoked, TlsMaterial, spiffe_id_of
from cloister.runtime.pem import PemInvalid, is_leaf_of, read_leaf

REQUEST_ID_KEY: Final = "x-request-id"
# From outside, and bound for logs: short, and nothing that could end a line or a field.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{8,64}")


@dataclass(frozen=True, slots=True)
class Caller:
    """The authenticated peer of one call."""

    spiffe_id: SpiffeId
    certificate_der: bytes
    certificate_sha256: bytes
    tls_version: str  # "TLSv1.3"
    key_exchange_group: str  # "X25519MLKEM768"; empty where the TLS library does not say
    peer: str  # transport address; for logs only


_caller: ContextVar[Caller | None] = ContextVar("cloister_caller", default=None)
_request_id: ContextVar[str] = ContextVar("cloister_request_id", default="")


def current_caller() -> Caller:
    """Return the caller of the RPC being handled; raise CloisterError(CALLER_UNKNOWN) when there is none."""
    caller = _caller.get()
    if caller is None:
        _unknown("nobody is authenticated on this call")
    return caller


def bind_caller(caller: Caller | None) -> None:
    """Make `caller` the current one for the rest of this task."""
    _caller.set(caller)


def current_request_id() -> str:
    """Return the id that ties the log lines of one request together across services; empty outside a request."""
    return _request_id.get()


def new_request_id() -> str:
    """Return an id for a request that begins here."""
    return secrets.token_hex(8)


def bind_request_id(offered: str = "") -> str:
    """Adopt the id a caller offers, if it is well-formed, or make one; return it."""
    request_id = offered if _REQUEST_ID.fullmatch(offered) else new_request_id()
    _request_id.set(request_id)
    return request_id


def caller_of_grpc(
    auth_context: Mapping[str, Iterable[bytes]],
    peer: str,
    bundle: TrustBundle,
    now: datetime,
    *,
    revoked: Revoked = NOTHING_REVOKED,
) -> Caller:
    """Read the caller off a gRPC auth context; raise CloisterError when it is not exactly one of ours, in force.

    gRPC leaves `peer_spiffe_id` out when a certificate has two URI names: absent means nobody. `revoked` are
    certificates that are not in force any more.
    """
    first = {name: next(iter(values), b"") for name, values in auth_context.items()}
    caller = _caller_of(
        first.get("x509_pem_cert", b""),
        bundle,
        now,
        revoked,
        tls_version=_ascii(first.get("ssl_tls_version", b"")),
        key_exchange_group=_ascii(first.get("ssl_negotiated_key_exchange_group", b"")),
        peer=peer,
    )
    if not hmac.compare_digest(first.get("peer_spiffe_id", b""), str(caller.spiffe_id).encode()):
        _unknown("the transport and the certificate do not agree on one SPIFFE id")
    return caller


def caller_of_tls(
    connection: ssl.SSLObject | ssl.SSLSocket,
    peer: str,
    bundle: TrustBundle,
    now: datetime,
    *,
    revoked: Revoked = NOTHING_REVOKED,
) -> Caller:
    """Read the caller off an HTTPS connection; same rules as for gRPC."""
    der = connection.getpeercert(binary_form=True)
    return _caller_of(
        ssl.DER_cert_to_PEM_cert(der).encode("ascii") if der else b"",
        bundle,
        now,
        revoked,
        tls_version=connection.version() or "",
        key_exchange_group="",
        peer=peer,
    )


def _caller_of(
    leaf_pem: bytes,
    bundle: TrustBundle,
    now: datetime,
    revoked: Revoked,
    *,
    tls_version: str,
    key_exchange_group: str,
    peer: str,
) -> Caller:
    if not leaf_pem:
        _unknown("no certificate was shown")
    try:
        leaf = read_leaf(leaf_pem)
    except PemInvalid:
        _unknown("the certificate does not parse")
    spiffe_id = spiffe_id_of(leaf)
    if spiffe_id.trust_domain != bundle.trust_domain:
        _unknown(f"the certificate is of another trust domain than {bundle.trust_domain}")
    # TLS accepted any CA of the bundle; this holds each CA to its own role. It also ends connections that began
    # under a CA which the bundle has dropped since, and the next checks those that outlive their certificate.
    if not is_leaf_of(leaf_pem, bundle.intermediate(spiffe_id.role)):
        _unknown(f"the CA for the role {spiffe_id.role} did not issue this certificate")
    if leaf.not_after <= now:
        raise CloisterError(
            Code.CERTIFICATE_EXPIRED,
            what="the certificate has expired",
            why=f"it was valid until {leaf.not_after:%Y-%m-%d %H:%M:%S} UTC",
            todo="enrol again",
        )
    if revoked.names(leaf):
        raise no_longer_in_force()
    return Caller(spiffe_id, leaf.der, leaf.sha256, tls_version, key_exchange_group, peer)


def is_revoked(caller: Caller, trusted: TlsMaterial, now: datetime) -> bool:
    """Say whether a caller of before is none any more, although its certificate has time left or had when it called.

    A certificate that runs out in the middle of a call is no news: the call was begun in time. The same goes for its
    CA, which leaves the bundle when all that it issued has run out.
    """
    leaf_pem = ssl.DER_cert_to_PEM_cert(caller.certificate_der).encode("ascii")
    leaf = read_leaf(leaf_pem)
    known = is_leaf_of(leaf_pem, trusted.bundle.intermediate(caller.spiffe_id.role))
    return trusted.revoked.names(leaf) or (not known and leaf.not_after > now)


def no_longer_in_force() -> CloisterError:
    """Return what a caller with a revoked certificate is told."""
    return CloisterError(
        Code.DENY_LISTED,
        what="this certificate is not in force any more",
        why="attest has revoked it",
        todo="enrol again; if that is refused, ask an operator",
    )


def _ascii(value: bytes) -> str:
    return value.decode("ascii", "replace")


def _unknown(why: str) -> NoReturn:
    raise CloisterError(
        Code.CALLER_UNKNOWN,
        what="the caller is not known here",
        why=why,
        todo="use a certificate that attest issued",
    )
