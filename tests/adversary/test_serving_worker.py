# SPDX-License-Identifier: Apache-2.0
"""A worker that lies on the wire is given up: no answer of it reaches anybody."""

from __future__ import annotations

import asyncio
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister_serving.worker import Worker

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def lp(value: bytes) -> bytes:
    return struct.pack("!i", len(value)) + value


def reply(request_id: bytes = b"r", *, headers: tuple[tuple[bytes, bytes], ...] = (), body: bytes = b"[]") -> bytes:
    pairs = b"".join(lp(key) + lp(value) for key, value in headers)
    item = lp(request_id) + lp(b"") + struct.pack("!i", 200) + lp(b"") + struct.pack("!i", len(headers)) + pairs
    return struct.pack("!i", 200) + lp(b"ok") + item + lp(body) + struct.pack("!i", -1)


@asynccontextmanager
async def connected(directory: Path, behaviour: Behaviour) -> AsyncIterator[tuple[Worker, asyncio.Event]]:
    down = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await behaviour(reader, writer)
            await down.wait()
        finally:
            writer.close()

    server = await asyncio.start_unix_server(serve, directory / "w.0")
    async with server:
        worker = await Worker.connect(directory, "w.0", pid=os.getpid(), timeout_s=5, on_down=lambda reason: down.set())
        yield worker, down
        worker.abort("the test is over")


async def code_of(worker: Worker) -> Code:
    with pytest.raises(CloisterError) as caught:
        await worker.predict(b"{}", request_id="r", deadline=asyncio.get_running_loop().time() + 5)
    return caught.value.code


def answering(data: bytes) -> Behaviour:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(data)

    return behave


async def test_the_reply_that_the_others_differ_from_is_taken(tmp_path: Path) -> None:
    async with connected(tmp_path, answering(reply(body=b"[1]"))) as (worker, _):
        deadline = asyncio.get_running_loop().time() + 5
        assert await worker.predict(b"{}", request_id="r", deadline=deadline) == b"[1]"


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("an answer to another request", reply(b"another")),
        ("no answer at all", struct.pack("!i", 200) + lp(b"ok") + struct.pack("!i", -1)),
        ("two replies", reply() + reply()),
        ("a reply with bytes behind it", reply() + b"x"),
        ("bytes of another protocol", b"HTTP/1.1 200 OK\r\n\r\n" * 4),
        ("a stream", reply(headers=((b"ts_stream_next", b"true"),))),
        ("a body that claims a gigabyte", reply()[:-10] + struct.pack("!i", 1 << 30)),
    ],
)
async def test_a_worker_that_sends_something_else_is_given_up(tmp_path: Path, what: str, data: bytes) -> None:
    async with connected(tmp_path, answering(data)) as (worker, down):
        assert await code_of(worker) is Code.BACKEND_DOWN
        assert down.is_set()
        assert await code_of(worker) is Code.BACKEND_DOWN


async def test_a_worker_that_speaks_unasked_is_given_up_before_a_request(tmp_path: Path) -> None:
    async def behave(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply())

    async with connected(tmp_path, behave) as (worker, down), asyncio.timeout(5):
        await down.wait()
        assert await code_of(worker) is Code.BACKEND_DOWN


async def test_a_worker_that_never_ends_its_reply_does_not_fill_memory(tmp_path: Path) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(struct.pack("!i", 200) + lp(b"ok"))
        item = reply(body=bytes(1 << 20))[10:-4]
        while not writer.transport.is_closing():
            writer.write(item)
            await writer.drain()

    async with connected(tmp_path, behave) as (worker, _):
        assert await code_of(worker) is Code.BACKEND_DOWN
        assert "more than 1 predictions" in worker.down_reason


async def test_another_process_that_listens_on_the_socket_is_not_loaded(tmp_path: Path) -> None:
    async def behave(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        return

    async with await asyncio.start_unix_server(behave, tmp_path / "w.0"):
        with pytest.raises(CloisterError, match="another process listens") as caught:
            await Worker.connect(tmp_path, "w.0", pid=1, timeout_s=5)
        assert caught.value.code is Code.MODEL_LOAD_FAILED


async def test_a_worker_that_never_listens_is_an_error_in_time(tmp_path: Path) -> None:
    with pytest.raises(CloisterError, match="did not start") as caught:
        await Worker.connect(tmp_path, "w.0", pid=1, timeout_s=0.1)
    assert caught.value.code is Code.MODEL_LOAD_FAILED
