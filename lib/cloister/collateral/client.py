# SPDX-License-Identifier: Apache-2.0
"""One request to a collateral server: bounded in size and time, over TLS, to no other host.

The server is not trusted, and neither is what it calls its answers: content types are ignored, caching headers are
ignored, redirects are not followed, compression is not accepted (16 KB of it can be 16 MB).
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Final, Self

import aiohttp

from cloister.collateral.decode import MAX_CHAIN_BYTES, Answer
from cloister.collateral.failures import Failure, FetchFailed, kind_text
from cloister.collateral.resources import CollateralServer, DocumentKind, Resource, origin
from cloister.errors import CloisterError, Code
from cloister.tdx.crl import MAX_CRL_SIZE

Clock = Callable[[], datetime]
_DIGITS: Final = re.compile(r"[0-9]{1,9}")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9-]{1,64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """Bounds of one request."""

    # TCB info has 20 KB today, QE identity 1 KB.
    max_json_bytes: int = 1024 * 1024
    # What is read of a CRL at most, in hexadecimal.
    max_crl_bytes: int = 2 * MAX_CRL_SIZE
    connect_s: float = 5.0
    # From the first byte sent to the last received: a server that drips does not get more.
    total_s: float = 30.0
    # Connections at once; a burst of cold families waits in line instead of earning a 429.
    max_connections: int = 4
    # A Retry-After beyond this is a mistake, or a way to keep us from refreshing.
    max_retry_after: timedelta = timedelta(hours=6)


class CollateralClient:
    """Fetch documents of one server. Use inside the event loop that it is made for, and close it."""

    def __init__(
        self,
        server: CollateralServer,
        *,
        clock: Clock = lambda: datetime.now(UTC),
        limits: ClientLimits | None = None,
    ) -> None:
        self.server = server
        self._clock = clock
        self._limits = limits or ClientLimits()
        self._tls = _tls_context(server)
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; a request after this opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def fetch(self, resource: Resource) -> Answer:
        """Return the answer to one GET; raise FetchFailed."""
        if origin(resource.url) not in self.server.origins:
            raise FetchFailed(Failure.HOST_NOT_ALLOWED, "the URL is not of the configured collateral server")
        what = kind_text(resource.kind)
        try:
            async with (
                asyncio.timeout(self._limits.total_s),
                self._open().get(resource.url, allow_redirects=False) as response,
            ):
                self._require_ok(response, what)
                return Answer(await self._read(response, resource.kind, what), _chain_header(response, resource.kind))
        except TimeoutError:
            raise FetchFailed(
                Failure.TIMED_OUT, f"the server did not send the {what} within {self._limits.total_s:g} seconds"
            ) from None
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise FetchFailed(
                Failure.TLS, f"the server's TLS certificate was not accepted: {_tls_text(error)}"
            ) from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise FetchFailed(
                Failure.UNREACHABLE, f"the connection to the server failed ({type(error).__name__})"
            ) from None
        except aiohttp.ClientError as error:
            raise FetchFailed(
                Failure.NOT_COLLATERAL, f"the answer is not valid HTTP, or was cut off ({type(error).__name__})"
            ) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=self._tls, limit=self._limits.max_connections),
                timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=self._limits.connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity", "User-Agent": "cloister"},
                auto_decompress=False,
                trust_env=False,  # the environment is the operator's to set; it must not choose where we connect
                max_line_size=8 * 1024,
                max_field_size=3 * MAX_CHAIN_BYTES,  # URL-encoded, a byte may take three
            )
        return self._session

    def _require_ok(self, response: aiohttp.ClientResponse, what: str) -> None:
        status = response.status
        if status == 200:
            return
        failure, text = _STATUS.get(status, (None, ""))
        if failure is None:
            failure, text = _status_class(status)
        asked_for = self._retry_after(response) if failure in {Failure.THROTTLED, Failure.BUSY} else None
        request_id = response.headers.get("Request-ID", "")
        suffix = f", request {request_id}" if _REQUEST_ID.fullmatch(request_id) else ""
        raise FetchFailed(failure, f"{what}: {text} (HTTP {status}{suffix})", retry_after=asked_for)

    def _retry_after(self, response: aiohttp.ClientResponse) -> timedelta | None:
        """Return the wait that the server asked for, in seconds or as a date (RFC 9110, 10.2.3), within bounds."""
        value = response.headers.get("Retry-After", "").strip()
        if _DIGITS.fullmatch(value):
            wait = timedelta(seconds=int(value))
        else:
            try:
                at = parsedate_to_datetime(value)
                wait = (at if at.tzinfo else at.replace(tzinfo=UTC)) - self._clock()
            except (ValueError, OverflowError):
                return None
        return min(max(wait, timedelta(0)), self._limits.max_retry_after)

    async def _read(self, response: aiohttp.ClientResponse, kind: DocumentKind, what: str) -> bytes:
        """Read a body in pieces and stop at the limit, whatever length was announced."""
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise FetchFailed(Failure.NOT_COLLATERAL, f"the {what} came compressed, which was not asked for")
        limit = self._limits.max_crl_bytes if kind.is_crl else self._limits.max_json_bytes
        too_large = FetchFailed(Failure.TOO_LARGE, f"the {what} is larger than {limit} bytes")
        if response.content_length is not None and response.content_length > limit:
            raise too_large
        body = bytearray()
        async for piece in response.content.iter_any():
            body += piece
            if len(body) > limit:
                raise too_large
        return bytes(body)


_STATUS: Final[dict[int, tuple[Failure, str]]] = {
    400: (Failure.BAD_REQUEST, "the server does not understand the request"),
    401: (Failure.UNAUTHORIZED, "the server wants credentials"),
    403: (Failure.UNAUTHORIZED, "the server refuses this machine"),
    404: (Failure.NOT_FOUND, "the server has none for this platform family and edition"),
    410: (Failure.GONE, "the server no longer has this evaluation number"),
    429: (Failure.THROTTLED, "the server asks for fewer requests"),
    503: (Failure.BUSY, "the server is busy"),
}


def _status_class(status: int) -> tuple[Failure, str]:
    if 300 <= status < 400:
        return Failure.REDIRECTED, "the server redirects elsewhere, which is not followed"
    if status >= 500:
        return Failure.SERVER_ERROR, "the server failed"
    return Failure.UNEXPECTED_STATUS, "an answer that was not expected"


def _chain_header(response: aiohttp.ClientResponse, kind: DocumentKind) -> str | None:
    if kind.chain_header is None:
        return None
    found = response.headers.getall(kind.chain_header, [])
    # Two chains are as good as none: which of them did the server mean?
    return found[0] if len(found) == 1 else None


def _tls_context(server: CollateralServer) -> ssl.SSLContext:
    """Return a context that verifies names and chains, under the configured CAs alone if there are any."""
    try:
        context = ssl.create_default_context(cafile=str(server.ca_file) if server.ca_file else None)
    except OSError as error:  # ssl.SSLError is one
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{server.ca_file} cannot be used to verify the collateral server",
            why=error.strerror or "it holds no PEM certificates",
            todo="name a PEM file with the certificate of the CA, or of the server itself",
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _tls_text(error: BaseException) -> str:
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return str(getattr(inner, "verify_message", "") or type(inner).__name__)
