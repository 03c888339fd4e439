# SPDX-License-Identifier: Apache-2.0
"""The ways in which collateral can fail to arrive or to be good, and how users are told."""

from __future__ import annotations

import enum
from datetime import datetime, timedelta
from typing import Final

from cloister.collateral.family import Family
from cloister.collateral.resources import DocumentKind
from cloister.errors import CloisterError, Code

FETCH_HINT: Final = "run `cloister collateral fetch`"


class Failure(enum.StrEnum):
    """Why one request gave no document. The words are labels of a metric."""

    BAD_REQUEST = "bad-request"  # 400
    UNAUTHORIZED = "unauthorized"  # 401, 403: a PCCS or a proxy that wants credentials
    NOT_FOUND = "not-found"  # 404
    GONE = "gone"  # 410: this evaluation number is no longer served
    THROTTLED = "throttled"  # 429
    SERVER_ERROR = "server-error"  # 500 and its neighbours
    BUSY = "busy"  # 503
    UNEXPECTED_STATUS = "unexpected-status"
    REDIRECTED = "redirected"  # 3xx: never followed
    TOO_LARGE = "too-large"
    NOT_COLLATERAL = "not-collateral"  # HTML, a missing issuer chain, something cut off
    TIMED_OUT = "timed-out"
    UNREACHABLE = "unreachable"
    TLS = "tls"  # the server's certificate does not verify
    HOST_NOT_ALLOWED = "host-not-allowed"
    # Of documents that arrived:
    UNAUTHENTIC = "unauthentic"  # a signature, a chain, a name
    REVOKED = "revoked"  # the signer, by the root's list
    EXPIRED = "expired"  # authentic, and past its time
    NOT_YET_VALID = "not-yet-valid"  # authentic, and from after what our clock says
    OLDER = "older"  # authentic, and older than what is known already


class FetchFailed(Exception):
    """A request, or the document that it brought, is no good. The reason is public text of ours, never a server's."""

    def __init__(self, failure: Failure, reason: str, *, retry_after: timedelta | None = None) -> None:
        super().__init__(reason)
        self.failure = failure
        self.reason = reason
        self.retry_after = retry_after  # what a 429 or 503 asked for


_CODES: Final = {
    Failure.NOT_FOUND: Code.COLLATERAL_NOT_FOUND,
    Failure.GONE: Code.COLLATERAL_NOT_FOUND,
    Failure.BAD_REQUEST: Code.COLLATERAL_NOT_FOUND,
    Failure.UNAUTHENTIC: Code.COLLATERAL_INVALID,
    Failure.REVOKED: Code.COLLATERAL_INVALID,
    Failure.OLDER: Code.COLLATERAL_INVALID,
    Failure.NOT_YET_VALID: Code.COLLATERAL_NOT_YET_VALID,
    Failure.EXPIRED: Code.COLLATERAL_EXPIRED,
}
_TODO: Final = {
    Failure.BAD_REQUEST: "check the FMSPC, and that the server speaks version 4 of the API",
    Failure.UNAUTHORIZED: "let this machine read from the PCCS or the proxy",
    Failure.NOT_FOUND: "check the FMSPC and the edition; a PCCS must be filled with `pccsadmin` first",
    Failure.GONE: "configure an evaluation number that is still served, or none",
    Failure.TLS: "name the CA of a private PCCS with `ca_file`",
    Failure.HOST_NOT_ALLOWED: "check the URL of the collateral server",
    Failure.REDIRECTED: "configure the address that the server redirects to, if it is yours",
    Failure.NOT_COLLATERAL: "check the URL of the collateral server, and what stands between",
    Failure.UNAUTHENTIC: "check which server this is; do not use what it serves",
    Failure.REVOKED: "refresh the PCCS, or fetch from Intel",
    Failure.NOT_YET_VALID: "set this machine's clock",
    Failure.OLDER: "refresh the PCCS; to accept the older collateral on purpose, reset the family first",
    Failure.EXPIRED: "refresh the PCCS, or fetch from Intel; check this machine's clock",
}


def not_available(family: Family, failed: FetchFailed) -> CloisterError:
    """Return the error of a family that cannot be had, and of which nothing usable is stored."""
    return CloisterError(
        _CODES.get(failed.failure, Code.COLLATERAL_UNAVAILABLE),
        what=f"no collateral for {family}",
        why=failed.reason,
        todo=_TODO.get(failed.failure, "try again later, or import a bundle with `cloister collateral import`"),
    )


def expired(family: Family, at: datetime, now: datetime, why: str = "") -> CloisterError:
    """Return the error of a family whose stored collateral is past its time."""
    return CloisterError(
        Code.COLLATERAL_EXPIRED,
        what=f"collateral for {family} expired {age(now - at)} ago",
        why=why or f"it was valid until {at:%Y-%m-%d %H:%M} UTC",
        todo=FETCH_HINT,
    )


def not_yet_valid(what: str, since: datetime, now: datetime) -> CloisterError:
    """Return the error of a clock that is behind something that was signed already."""
    return CloisterError(
        Code.COLLATERAL_NOT_YET_VALID,
        what=f"{what} is not valid yet",
        why=f"it was issued at {since:%Y-%m-%d %H:%M} UTC, and this machine's clock says {now:%Y-%m-%d %H:%M}",
        todo="set the clock",
    )


def age(span: timedelta) -> str:
    """Return a time span as people say it: "3 days", "1 hour"."""
    seconds = max(0, int(span.total_seconds()))
    for name, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size:
            count = seconds // size
            return f"{count} {name}{'s' if count != 1 else ''}"
    return "less than a minute"


def kind_text(kind: DocumentKind) -> str:
    """Return what people call a document."""
    return {
        DocumentKind.TCB_INFO: "TCB info",
        DocumentKind.QE_IDENTITY: "QE identity",
        DocumentKind.PCK_CRL: "PCK CRL",
        DocumentKind.ROOT_CRL: "root CA CRL",
    }[kind]
