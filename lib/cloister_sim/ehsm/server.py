# SPDX-License-Identifier: Apache-2.0
"""The HTTPS side of the development server: paths, methods, sizes and statuses as EHSM has them."""

from __future__ import annotations

import asyncio
import html
import json
from datetime import UTC, datetime
from email.utils import formatdate
from pathlib import Path
from typing import Final, Self

from aiohttp import web

from cloister import ehsm
from cloister.errors import CloisterError
from cloister.runtime.address import bind_error, split_address
from cloister_sim.ehsm.certificate import server_context
from cloister_sim.ehsm.faults import Fault, Faults
from cloister_sim.ehsm.service import Clock, EhsmService, Generation, system_clock
from cloister_sim.ehsm.wire import Answer

_NIGHT_S: Final = 86_400.0
_SAVE_S: Final = 1.0  # what a killed server forgets of the requests it has seen
_IDLE_S: Final = 6.0  # after which EHSM closes an idle connection
_SHUTDOWN_S: Final = 0.5
_HTML: Final = "text/html; charset=utf-8"


class EhsmServer:
    """A server and what it keeps below one directory; `faults` make it fail on purpose."""

    def __init__(
        self,
        directory: Path,
        *,
        listen: str = "127.0.0.1:0",
        clock: Clock = system_clock,
        generation: Generation = Generation.CURRENT,
    ) -> None:
        self.faults = Faults()
        self.service = EhsmService.open(directory, clock=clock, generation=generation)
        self._directory = directory
        self._listen = listen
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.certificate_file = directory / "server.pem"
        self.url = ""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; raise CloisterError when that cannot be."""
        await self.service.load()
        context, self.certificate_file = server_context(self._directory, datetime.now(UTC))
        application = web.Application(client_max_size=ehsm.MAX_BODY)
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(
            application, access_log=None, keepalive_timeout=_IDLE_S, shutdown_timeout=_SHUTDOWN_S
        )
        await self._runner.setup()
        host, port = split_address(self._listen)
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=context).start()
        except OSError as error:
            await self.stop()
            raise bind_error(self._listen, error) from None
        self.url = f"https://{host}:{self._runner.addresses[0][1]}"
        self._tasks = [asyncio.create_task(work) for work in (self._every_night(), self._every_second())]

    async def stop(self) -> None:
        """Close connections and storage; what is kept stays on disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.service.close()

    async def _every_night(self) -> None:
        while True:
            await asyncio.sleep(_NIGHT_S)
            await self.service.sweep()
            self.service.publish_collateral()

    async def _every_second(self) -> None:
        while True:
            await asyncio.sleep(_SAVE_S)
            await self.service.save()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path not in ("/ehsm", "/ehsm/") or request.method not in ("GET", "POST"):
            return _page(404, f"Cannot {request.method} {request.path}")
        action = request.query.get("Action", "")
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        fault = self.faults.take(action, peer)
        if fault is not None and (response := await _before(fault, request)) is not None:
            return response
        try:
            answer = await self._act(request, action)
        except web.HTTPRequestEntityTooLarge:
            return _page(413, "PayloadTooLargeError: request entity too large")
        except CloisterError:  # of the storage
            answer = Answer(400, {}, {})
        body = answer.to_json()
        if fault is not None:
            if fault.answer_gate is not None:
                await fault.answer_gate.wait()
            if fault.drop_answer:
                return _dropped(request)
            if fault.change is not None:
                changed = fault.change({"code": answer.code, "message": answer.message, "result": answer.result})
                body = json.dumps(changed).encode()
        response = web.Response(body=body, content_type="application/json", charset="utf-8")
        response.headers["Date"] = formatdate(self.service.now_ms / 1000, usegmt=True)
        if answer.message == "Invalid JSON":
            response.force_close()
        return response

    async def _act(self, request: web.Request, action: str) -> Answer:
        if request.method == "GET":
            return await self.service.get(action)
        body = await request.read()
        if request.content_type != "application/json":
            body = b"{}"  # ignored, as at EHSM
        return await self.service.post(action, body)


async def _before(fault: Fault, request: web.Request) -> web.StreamResponse | None:
    """Do what a fault does before a request is looked at; return its answer, if it has one."""
    await asyncio.sleep(fault.delay_s)
    if fault.gate is not None:
        await fault.gate.wait()
    if fault.drop:
        return _dropped(request)
    if fault.body is not None:
        return web.Response(body=fault.body, status=fault.status, content_type="application/json")
    return None


def _dropped(request: web.Request) -> web.StreamResponse:
    """End the connection without a word."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _page(status: int, text: str) -> web.Response:
    return web.Response(
        status=status, body=f"<!DOCTYPE html><pre>{html.escape(text)}</pre>".encode(), headers={"Content-Type": _HTML}
    )
