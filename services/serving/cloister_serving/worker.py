# SPDX-License-Identifier: Apache-2.0
"""Drive one stock TorchServe worker over its Unix socket: load once, then one batch in flight.

The worker (`ts/model_service_worker.py` of PyPI `torchserve`) runs a handler's code, so nothing it sends is
trusted: a reply that is malformed, or answers another request than the one in flight, ends the connection, and a
worker whose connection ended is down for good. A request whose deadline passes while it queues is never sent; one
that is already running cannot be recalled, so its caller leaves and the next request waits for the reply.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from cloister.errors import CloisterError, Code
from cloister_serving import otf

_CONNECT_PAUSE_S: Final = 0.02
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid (unix(7), SO_PEERCRED)


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """How much one worker is asked to do at a time."""

    waiting: int = 64  # requests in the queue: at some 10 ms each, more would expire there anyway
    hang_s: float = 60.0  # a prediction that runs longer will not come back: the worker is given up
    # One request goes out at a time, so one prediction comes back; more would be parsed again with every chunk.
    reply: otf.OtfLimits = field(default_factory=lambda: otf.OtfLimits(items=1))


class _Connection(asyncio.Protocol):
    """Bytes of one connection to replies; hands each to the one future that waits."""

    def __init__(self, limits: otf.OtfLimits, on_down: Callable[[str], None] | None) -> None:
        self._limits = limits
        self._on_down = on_down
        self._buffer = bytearray()
        self._waiting: asyncio.Future[otf.Reply] | None = None
        self.transport: asyncio.Transport | None = None
        self.down_reason = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's own class does not say that it is one

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        try:
            found = otf.decode_reply(self._buffer, self._limits)
        except otf.OtfError as error:
            self.abort(f"the worker broke the protocol: {error}")
            return
        if found is None:
            return
        reply, size = found
        if self._waiting is None or size != len(self._buffer):
            self.abort("the worker sent what nobody asked for")
            return
        self._buffer.clear()
        waiting, self._waiting = self._waiting, None
        waiting.set_result(reply)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.abort("the worker ended")

    def abort(self, reason: str) -> None:
        """Give the worker up; the reason of the first call stays."""
        if self.down_reason:
            return
        self.down_reason = reason
        if self.transport is not None:
            self.transport.abort()
        if self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            waiting.set_exception(_down(reason))
        if self._on_down is not None:
            self._on_down(reason)

    def ask(self, message: bytes) -> asyncio.Future[otf.Reply]:
        """Send a message and return the future of its reply; the caller holds the turn."""
        if self.down_reason or self.transport is None:
            raise _down(self.down_reason)
        reply: asyncio.Future[otf.Reply] = asyncio.get_running_loop().create_future()
        # Nobody may be left to await it: its caller's deadline can pass first.
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting = reply
        self.transport.write(message)
        return reply


class Worker:
    """A connected worker. Times are those of the running event loop."""

    def __init__(self, limits: WorkerLimits, on_down: Callable[[str], None] | None) -> None:
        self._limits = limits
        self._connection = _Connection(limits.reply, on_down)
        self._turn = asyncio.Lock()
        self.queued = 0  # requests that wait or run

    @classmethod
    async def connect(
        cls,
        directory: Path,
        socket_name: str,
        *,
        pid: int,
        timeout_s: float,
        on_down: Callable[[str], None] | None = None,
        limits: WorkerLimits | None = None,
    ) -> Worker:
        """Connect as soon as the process `pid` listens on the socket in the directory.

        Raises CloisterError(MODEL_LOAD_FAILED) when it does not within the time, or when another process does.
        """
        worker = cls(limits or WorkerLimits(), on_down)
        loop = asyncio.get_running_loop()
        # The address of a Unix socket holds 107 bytes and a directory's name may be longer: go through its descriptor.
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                        path = f"/proc/self/fd/{descriptor}/{socket_name}"
                        transport, _ = await loop.create_unix_connection(lambda: worker._connection, path)
                        worker._check_peer(transport, pid)
                        return worker
                    await asyncio.sleep(_CONNECT_PAUSE_S)
        except TimeoutError:
            raise CloisterError(
                Code.MODEL_LOAD_FAILED,
                what="the model's worker did not start",
                why=f"it did not listen within {timeout_s:g} s",
                todo="see the gateway's log; on a busy machine, deploy again",
            ) from None
        finally:
            os.close(descriptor)

    @property
    def down_reason(self) -> str:
        """Why the worker is down; empty while it is up."""
        return self._connection.down_reason

    async def load(self, *, name: str, path: str, handler: str, timeout_s: float) -> None:
        """Make the worker load a model; raise CloisterError(MODEL_LOAD_FAILED) with the reason when it does not."""
        async with self._turn:
            reply = self._connection.ask(otf.encode_load(name=name, path=path, handler=handler))
            await asyncio.wait({reply}, timeout=timeout_s)
        if not reply.done():
            self.abort(f"the model did not load within {timeout_s:g} s")
        why = self.down_reason
        if not why:
            answer = reply.result()
            if answer.code == otf.LOAD_OK:
                return
            why = f"the handler answered {answer.code}: {printable(answer.message)}"
        raise CloisterError(
            Code.MODEL_LOAD_FAILED,
            what=f"model {name} could not be loaded",
            why=why,
            todo="check the archive's handler and the model's files",
        )

    async def predict(
        self, body: bytes, *, request_id: str, deadline: float, content_type: str = "application/json"
    ) -> bytes:
        """Run one request and return the handler's answer.

        The deadline is a time of the event loop. Raises CloisterError: BACKEND_DOWN, PREDICTION_FAILED,
        DEADLINE_EXCEEDED, RATE_LIMITED.
        """
        if self.down_reason:
            raise _down(self.down_reason)
        if self.queued > self._limits.waiting:
            raise CloisterError(
                Code.RATE_LIMITED,
                what="too many requests wait for this model",
                why=f"at most {self._limits.waiting} requests queue for one backend",
                todo="send fewer at a time, or again in a moment",
            )
        self.queued += 1
        try:
            parameter = otf.InferParameter("body", content_type, body)
            reply = await self._run(otf.InferRequest(request_id, (parameter,)), deadline)
        finally:
            self.queued -= 1
        return self._accept(reply, request_id)

    def abort(self, reason: str) -> None:
        """Give the worker up, for the reason given."""
        self._connection.abort(reason)

    def _check_peer(self, transport: asyncio.BaseTransport, pid: int) -> None:
        """Refuse whatever else listens there: the kernel says who called listen(2)."""
        found, _, _ = _UCRED.unpack(
            transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        )
        if found != pid:
            self.abort("another process listens on the worker's socket")
            raise CloisterError(
                Code.MODEL_LOAD_FAILED,
                what="the model's worker cannot be used",
                why=self.down_reason,
                todo="look for a process that writes into the gateway's state directory",
            )

    async def _run(self, request: otf.InferRequest, deadline: float) -> otf.Reply:
        loop = asyncio.get_running_loop()
        message = otf.encode_infer([request])
        try:
            async with asyncio.timeout_at(deadline):
                await self._turn.acquire()
        except TimeoutError:
            raise _expired("it was still queued, and was not run") from None
        try:
            if loop.time() >= deadline:
                raise _expired("it was still queued, and was not run")
            reply = self._connection.ask(message)
        except CloisterError:
            self._turn.release()
            raise
        # The turn ends with the reply, not with the caller: a caller that leaves must not let a second batch in.
        watchdog = loop.call_later(self._limits.hang_s, self.abort, f"a prediction ran for {self._limits.hang_s:g} s")
        reply.add_done_callback(lambda _: watchdog.cancel())
        reply.add_done_callback(lambda _: self._turn.release())
        await asyncio.wait({reply}, timeout=max(0.0, deadline - loop.time()))
        if not reply.done():
            raise _expired("it was running; its answer is dropped")
        return reply.result()

    def _accept(self, reply: otf.Reply, request_id: str) -> bytes:
        if [item.request_id for item in reply.items] != [request_id]:
            self.abort("the worker answered another request than the one it was given")
            raise _down(self.down_reason)
        item = reply.items[0]
        if item.headers.get(otf.STREAM_HEADER) == "true":
            self.abort("the handler streams its answer, which this gateway does not take")
            raise _down(self.down_reason)
        if reply.code != otf.PREDICT_OK or item.status != otf.PREDICT_OK:
            raise prediction_failed(f"it answered {reply.code}: {printable(reply.message)}")
        return item.body


def prediction_failed(why: str) -> CloisterError:
    """Return the error of a handler that failed on one request; the backend stays usable."""
    return CloisterError(
        Code.PREDICTION_FAILED,
        what="the model's handler failed on this request",
        why=why,
        todo="check the request against what the model expects; the model's owner has its handler",
    )


def printable(text: str, *, limit: int = 300) -> str:
    """Return untrusted text as one line that cannot drive a terminal or forge a log line."""
    return "".join(c if c.isprintable() else " " for c in text[:limit]).strip()


def _down(reason: str) -> CloisterError:
    return CloisterError(
        Code.BACKEND_DOWN,
        what="the model's backend is not running",
        why=reason or "it is not connected",
        todo="remove the model and deploy it again",
    )


def _expired(why: str) -> CloisterError:
    return CloisterError(
        Code.DEADLINE_EXCEEDED,
        what="the prediction did not end within its deadline",
        why=why,
        todo="allow more time, or send fewer texts in one request",
    )
