# SPDX-License-Identifier: Apache-2.0
"""The keys of attestation results over HTTPS, as a JWK set (RFC 7517): for JWT libraries outside the stack.

    GET /.well-known/jwks.json

The same keys stand in the trust bundle, which is what services use. No client certificate is asked for: the keys are
public, and whoever reads a token with them must already trust the certificate that this port shows.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable
from typing import Final

from aiohttp import web

from cloister.runtime.address import bind_error, split_address
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import CredentialSource, load_own_chain

PATH: Final = "/.well-known/jwks.json"
_MAX_BODY: Final = 1  # bytes: no request has one
_MAX_LINE: Final = 1024
_KEEPALIVE_S: Final = 5.0
_MAX_AGE_S: Final = 60  # a new epoch is announced minutes before its key signs


class JwksServer:
    """One document on one port."""

    def __init__(self, *, listen: str, credentials: CredentialSource, bundle: Callable[[], TrustBundle]) -> None:
        """`bundle` is asked again for every request."""
        self._listen = listen
        self._credentials = credentials
        self._bundle = bundle
        self._runner: web.AppRunner | None = None
        self.endpoint = ""

    async def start(self) -> None:
        """Listen; raise CloisterError(PORT_TAKEN)."""
        app = web.Application(client_max_size=_MAX_BODY)
        app.add_routes([web.get(PATH, self._keys)])
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=_KEEPALIVE_S, max_line_size=_MAX_LINE)
        await runner.setup()
        host, port = split_address(self._listen)
        try:
            await web.TCPSite(runner, host, port, ssl_context=_server_context(self._credentials)).start()
        except OSError as error:
            await runner.cleanup()
            raise bind_error(self._listen, error) from None
        self._runner = runner
        self.endpoint = f"{host}:{runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _keys(self, _request: web.Request) -> web.Response:
        body = json.dumps({"keys": [dict(key) for key in self._bundle().token_keys]}, sort_keys=True).encode()
        headers = {"Cache-Control": f"max-age={_MAX_AGE_S}", "X-Content-Type-Options": "nosniff"}
        return web.Response(body=body, content_type="application/jwk-set+json", headers=headers)


def _server_context(credentials: CredentialSource) -> ssl.SSLContext:
    """Return a TLS 1.3 context that shows the newest certificate and asks for none."""
    generation = [_context(credentials)]

    def refresh() -> None:
        generation[0] = _context(credentials)

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        connection.context = generation[0]

    outer = _context(credentials)
    outer.sni_callback = choose
    credentials.on_change(refresh)
    return outer


def _context(credentials: CredentialSource) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_own_chain(context, credentials.current())
    return context
