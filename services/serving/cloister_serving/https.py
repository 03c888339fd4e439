# SPDX-License-Identifier: Apache-2.0
"""HTTPS in and out, for clients without gRPC: the same identities, the same tenants, the same errors, as JSON.

    POST /predictions/{model}         {"texts": ["...", "..."]}, or one text as text/plain
    POST /v1/models/{model}:predict   the same; also {"instances": [...]}, as clients of that interface write it
    GET  /models                      the caller's models
    GET  /ping                        200 when every model of the caller answers, 503 otherwise

Certificates are required by TLS itself; who the caller is comes from the certificate alone.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Final

from aiohttp import web

from cloister.errors import CloisterError, Code, Kind
from cloister.identity import Role
from cloister.runtime.address import bind_error, split_address
from cloister.runtime.caller import (
    Caller,
    bind_caller,
    bind_request_id,
    caller_of_tls,
    current_caller,
    current_request_id,
)
from cloister.runtime.credentials import CredentialSource, server_ssl_context
from cloister.runtime.logging import get_logger
from cloister.runtime.status import internal_error
from cloister_serving import router
from cloister_serving.gateway import Gateway
from cloister_serving.router import State
from cloister_serving.service import DEFAULT_DEADLINE_S

MAX_BODY: Final = 4 << 20  # bytes; what the gRPC side takes
_BODY_S: Final = 30.0  # for a whole request to arrive
_SHUTDOWN_S: Final = 10.0
_REQUEST_ID: Final = "X-Request-Id"
_STATUS: Final = {
    Kind.USAGE: 400,
    Kind.UNAUTHENTIC: 401,
    Kind.DENIED: 403,
    Kind.NOT_FOUND: 404,
    Kind.EXISTS: 409,
    Kind.STATE: 409,
    Kind.EXHAUSTED: 429,
    Kind.INTERNAL: 500,
    Kind.UNAVAILABLE: 503,
    Kind.DEADLINE: 504,
}
_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpsServer:
    """The HTTPS side of the gateway."""

    def __init__(self, gateway: Gateway, *, listen: str, credentials: CredentialSource) -> None:
        self._gateway = gateway
        self._listen = listen
        self._credentials = credentials
        self._runner: web.AppRunner | None = None
        self.endpoint = ""

    async def start(self) -> None:
        """Listen; raise CloisterError(PORT_TAKEN)."""
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.add_routes(
            [
                web.post("/predictions/{model}", self._predict),
                web.post("/v1/models/{model}:predict", self._predict),
                web.get("/models", self._models),
                web.get("/ping", self._ping),
            ]
        )
        host, port = split_address(self._listen)
        # A client that leaves cancels its handler, and with it a request that still queues.
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        context = server_ssl_context(self._credentials, (Role.USER,))
        try:
            await web.TCPSite(runner, host, port, ssl_context=context).start()
        except OSError as error:
            await runner.cleanup()
            raise bind_error(self._listen, error) from None
        self._runner = runner
        self.endpoint = f"{host}:{runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Take no more requests and let those in flight end."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @web.middleware
    async def _guard(self, request: web.Request, handler: _Handler) -> web.StreamResponse:
        """Do for HTTP what the gRPC guard does: request id, caller, errors, one log line, never a payload."""
        request_id = bind_request_id(request.headers.get(_REQUEST_ID, ""))
        started = asyncio.get_running_loop().time()
        caller: Caller | None = None
        try:
            caller = self._caller(request)
            bind_caller(caller)
            response = await handler(request)
        except CloisterError as error:
            response = _error(error, request_id)
        except web.HTTPException as error:
            response = _error(_of_http(error), request_id)
        except Exception as error:  # noqa: BLE001 - the guard of this side: its text must not leave
            get_logger().error("handler failed", route=_route(request), exc_info=error)
            response = _error(internal_error(request_id), request_id)
        response.headers[_REQUEST_ID] = request_id
        get_logger().info(
            "http",
            route=_route(request),
            status=response.status,
            caller=str(caller.spiffe_id) if caller else "",
            duration_ms=round((asyncio.get_running_loop().time() - started) * 1000, 2),
        )
        return response

    def _caller(self, request: web.Request) -> Caller:
        connection = request.transport.get_extra_info("ssl_object") if request.transport else None
        if not isinstance(connection, ssl.SSLObject):
            raise CloisterError(Code.CALLER_UNKNOWN, what="the connection is gone", todo="connect again")
        trusted = self._credentials.current()
        caller = caller_of_tls(
            connection, request.remote or "", trusted.bundle, datetime.now(UTC), revoked=trusted.revoked
        )
        if caller.spiffe_id.role is not Role.USER:
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what="this is for users only",
                why=f"the caller's role is {caller.spiffe_id.role}",
                todo="use a user's certificate",
            )
        return caller

    async def _predict(self, request: web.Request) -> web.Response:
        deadline = asyncio.get_running_loop().time() + DEFAULT_DEADLINE_S
        model, predictions = await self._gateway.predict(
            current_caller().spiffe_id.tenant,
            request.match_info["model"],
            await _texts(request),
            request_id=current_request_id(),
            deadline=deadline,
        )
        document = {
            "model": model.name,
            "archive": f"sha384:{model.archive_digest.hex()}",
            "predictions": [{"label": one.label, "probability": one.probability} for one in predictions],
        }
        return web.json_response(document)

    async def _models(self, _request: web.Request) -> web.Response:
        models = [
            {
                "name": model.name,
                "state": model.state,
                "reason": model.reason,
                "archive": f"sha384:{model.archive_digest.hex()}",
                "cores": list(model.cores),
            }
            for model in self._gateway.list(current_caller().spiffe_id.tenant)
        ]
        return web.json_response({"models": models})

    async def _ping(self, _request: web.Request) -> web.Response:
        states = [model.state for model in self._gateway.list(current_caller().spiffe_id.tenant)]
        counts = {state.value: states.count(state) for state in State}
        healthy = counts[State.READY] == len(states)
        document: dict[str, Any] = {"status": "Healthy" if healthy else "Unhealthy", "models": counts}
        return web.json_response(document, status=200 if healthy else 503)


async def _texts(request: web.Request) -> list[str]:
    try:
        async with asyncio.timeout(_BODY_S):
            body = await request.read()
    except TimeoutError:
        raise CloisterError(
            Code.DEADLINE_EXCEEDED, what="the request did not arrive in time", why=f"{_BODY_S:g} s were not enough"
        ) from None
    match request.content_type:
        case "application/json":
            return router.texts_from_json(body)
        case "text/plain":
            try:
                return [body.decode()]
            except UnicodeDecodeError:
                why = "the text is not UTF-8"
        case other:
            why = f"its content type is {other}"
    raise CloisterError(
        Code.ARGUMENT_INVALID,
        what="this request cannot be answered",
        why=why,
        todo='send application/json with {"texts": [...]}, or one text as text/plain in UTF-8',
    )


def _of_http(error: web.HTTPException) -> CloisterError:
    match error.status:
        case 404:
            code, what = Code.MODEL_NOT_FOUND, "there is nothing under this path"
        case 413:
            code, what = Code.MESSAGE_TOO_LARGE, f"the body is longer than {MAX_BODY} bytes"
        case _:
            code, what = Code.ARGUMENT_INVALID, f"the request is not understood: {error.reason}"
    return CloisterError(code, what=what, todo="POST /predictions/{model}, GET /models, GET /ping")


def _error(error: CloisterError, request_id: str) -> web.Response:
    status = 413 if error.code is Code.MESSAGE_TOO_LARGE else _STATUS[error.kind]
    document = {
        "code": error.code.text,
        "what": error.what,
        "why": error.why,
        "todo": error.todo,
        "request_id": request_id,
    }
    headers = {"Retry-After": "1"} if status in (429, 503) else {}
    return web.json_response({"error": document}, status=status, headers=headers)


def _route(request: web.Request) -> str:
    """Return the route, not the path: a path holds names that callers choose."""
    resource = request.match_info.route.resource
    return f"{request.method} {resource.canonical}" if resource else request.method
