# SPDX-License-Identifier: Apache-2.0
"""One HTTPS exchange with EHSM: bounded in size and time, on connections that are still open, to nobody else.

What matters to a caller is whether a request can have been done: `sent` of a failure says that.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp

from cloister_keybroker.backends import Clock
from cloister_keybroker.backends.ehsm.answers import MAX_ANSWER, Answer, AnswerInvalid
from cloister_keybroker.backends.ehsm.options import EhsmOptions
from cloister_keybroker.backends.ehsm.pinning import pinned_context

_OVERLOADED: Final = frozenset({429, 502, 503, 504})  # of a proxy; EHSM itself answers with 200


class ExchangeFailed(Exception):
    """No answer; the text is public."""

    def __init__(self, why: str, *, sent: bool) -> None:
        super().__init__(why)
        self.why = why
        self.sent = sent  # the request may have been done


class NotTheServer(ExchangeFailed):
    """What answers there is not the configured server."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """An answer, and how far EHSM's clock is ahead of this machine's (None when it did not say)."""

    answer: Answer
    skew_s: float | None


class Transport:
    """Connections for one kind of call. Use in one event loop, and close."""

    def __init__(self, options: EhsmOptions, *, connections: int, clock: Clock) -> None:
        self._options = options
        self._clock = clock
        self._connections = connections
        self._tls = pinned_context(options.ca_file, options.pins)
        self._session: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close all connections; an exchange after this opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def get(self, action: str) -> Exchange:
        """Ask an open action; raise ExchangeFailed or AnswerInvalid."""
        return await self._exchange("GET", action, None, MAX_ANSWER)

    async def post(self, action: str, body: bytes, *, limit: int = MAX_ANSWER) -> Exchange:
        """Send a signed request; raise ExchangeFailed or AnswerInvalid. Cancelling it leaves open what was done."""
        return await self._exchange("POST", action, body, limit)

    async def _exchange(self, method: str, action: str, body: bytes | None, limit: int) -> Exchange:
        try:
            async with self._open().request(
                method,
                f"{self._options.url}/ehsm",
                params={"Action": action},
                data=body,
                server_hostname=self._options.server_name,
                allow_redirects=False,
            ) as response:
                data = await _read(response, limit)
                if response.status in _OVERLOADED:
                    raise ExchangeFailed(f"something in front of it answers with HTTP {response.status}", sent=True)
                if response.status != 200:
                    raise AnswerInvalid(f"its HTTP status is {response.status}, where EHSM's is 200")
                return Exchange(Answer.parse(data, limit=limit), self._skew(response.headers.get("Date", "")))
        except (aiohttp.ClientSSLError, ssl.SSLError) as error:
            raise NotTheServer(f"its certificate is not the configured one ({_tls_text(error)})", sent=False) from None
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise ExchangeFailed("there is no connection to it", sent=False) from None
        except (aiohttp.ClientConnectionError, TimeoutError, OSError):
            raise ExchangeFailed("the connection to it ended before its answer", sent=True) from None
        except aiohttp.ClientError:
            raise AnswerInvalid("it is not valid HTTP, or was cut off") from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            limits = self._options.limits
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    ssl=self._tls, limit=self._connections, keepalive_timeout=limits.idle_s, ttl_dns_cache=30
                ),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={
                    "Accept-Encoding": "identity",
                    "Content-Type": "application/json",
                    "User-Agent": "cloister",
                },
                auto_decompress=False,
                trust_env=False,  # a proxy of the environment would end TLS, and it is the operator's to set
            )
        return self._session

    def _skew(self, date: str) -> float | None:
        try:
            then = parsedate_to_datetime(date)
        except ValueError:
            return None
        if then.tzinfo is None:
            return None
        return (then.astimezone(UTC) - self._clock()).total_seconds()


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read a body in pieces and stop at the limit, whatever length was announced."""
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise AnswerInvalid("it is compressed, which was not asked for")
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > limit:
            raise AnswerInvalid(f"it is longer than {limit} bytes")
    return bytes(body)


def _tls_text(error: BaseException) -> str:
    inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None) or error
    return str(getattr(inner, "verify_message", "") or type(inner).__name__)
