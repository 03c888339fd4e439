# SPDX-License-Identifier: Apache-2.0
"""Serve simulated TDs on a Unix socket: one connection is one TD, and its registers die with it.

    frame    u32 big-endian length, body
    request  op byte, payload
    answer   status byte (0: fine, 1: refused, text follows), payload

    L  image digest (48)               -> boot event log, JSON        once, first
    E  register u8 (2 or 3), digest (48) -> its new value (48)
    Q  report data (64)                -> quote

A frame that is none of these is answered and ends its connection; a request that the TD cannot make is refused and
does not.
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister_sim.platform import DIGEST_SIZE, REPORT_DATA_SIZE, SimulatedPlatform, SimulatedTd, SimulationError

MAX_TDS: Final = 256  # connections at once; more than one machine ever simulates
MAX_REQUEST_SIZE: Final = 1 + REPORT_DATA_SIZE  # bytes: the longest request is Q
BODY_TIMEOUT_S: Final = 5.0  # for the rest of a frame once its length was read

_PAYLOAD_SIZE: Final = {b"L": DIGEST_SIZE, b"E": 1 + DIGEST_SIZE, b"Q": REPORT_DATA_SIZE}
_FINE: Final = b"\0"
_REFUSED: Final = b"\1"


class BadFrame(Exception):
    """A frame that no request can be read from."""


class SimulatorServer:
    """A listening socket and the TDs behind it."""

    def __init__(self, platform: SimulatedPlatform, path: Path) -> None:
        self._platform = platform
        self._path = path
        self._connections: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._inode = -1

    async def start(self) -> None:
        """Listen; the socket appears under its name when it accepts. Raise CloisterError when it cannot."""
        listener, self._inode = _listen(self._path)
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, backlog=MAX_TDS)

    async def stop(self) -> None:
        """Close the socket and end every TD."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        # Unless another process has put its own socket there.
        if self._path.exists() and self._path.stat().st_ino == self._inode:
            self._path.unlink()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if len(self._connections) > MAX_TDS:
                await _answer(writer, _REFUSED, f"{MAX_TDS} TDs run already".encode())
                return
            try:
                await self._run_td(reader, writer)
            except BadFrame as error:
                await _answer(writer, _REFUSED, str(error).encode())
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            pass  # the TD's owner went away in the middle of something: so does the TD
        finally:
            writer.close()

    async def _run_td(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        td = _Td(self._platform)
        while (request := await _read_frame(reader)) is not None:
            try:
                status, payload = _FINE, td.handle(request)
            except SimulationError as error:
                status, payload = _REFUSED, str(error).encode()
            await _answer(writer, status, payload)


class _Td:
    """One connection's TD, launched or not."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        self._platform = platform
        self._td: SimulatedTd | None = None

    def handle(self, request: bytes) -> bytes:
        op, payload = request[:1], request[1:]
        if len(payload) != _PAYLOAD_SIZE.get(op, -1):
            raise BadFrame(f"no request of operation {op!r} has {len(payload)} bytes")
        if op == b"L":
            if self._td is not None:
                raise SimulationError("this TD is launched already; one connection is one TD")
            self._td = self._platform.launch(payload)
            return self._td.boot_log
        if self._td is None:
            raise SimulationError("this TD is not launched yet")
        if op == b"E":
            return self._td.extend(payload[0], payload[1:])
        return self._td.quote(payload)


async def _read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """Return the next body, or None at the end between two frames."""
    try:
        header = await reader.readexactly(4)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    size = int.from_bytes(header, "big")
    if not 1 <= size <= MAX_REQUEST_SIZE:
        raise BadFrame(f"a request has 1 to {MAX_REQUEST_SIZE} bytes, not {size}")
    async with asyncio.timeout(BODY_TIMEOUT_S):
        return await reader.readexactly(size)


async def _answer(writer: asyncio.StreamWriter, status: bytes, payload: bytes) -> None:
    body = status + payload
    writer.write(len(body).to_bytes(4, "big") + body)
    await writer.drain()


def _listen(path: Path) -> tuple[socket.socket, int]:
    """Return a listening socket of mode 0600 and its inode; refuse to take a live one's place."""
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Bound under another name first: whoever sees the name can connect, and what a killed process left is replaced.
    new = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if probe.connect_ex(os.fspath(path)) == 0:
            raise CloisterError(
                Code.STACK_RUNNING,
                what=f"a simulated platform already serves {path}",
                why="it accepts connections",
                todo="stop it, or name another socket",
            )
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(new))
        finally:
            os.umask(before)
        listener.listen(MAX_TDS)
        inode = new.stat().st_ino
        new.rename(path)
        return listener, inode
    except OSError as error:
        listener.close()
        raise CloisterError(
            Code.IO_FAILED,
            what=f"cannot listen on {path}",
            why=error.strerror or str(error),
            todo="name a socket of at most 100 bytes in a directory that this user can write",
        ) from error
    except CloisterError:
        listener.close()
        raise
    finally:
        probe.close()
