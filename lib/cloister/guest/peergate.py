# SPDX-License-Identifier: Apache-2.0
"""A Unix socket that lets processes of one user through to a server, and nobody else.

gRPC in Python does not say which process is at the other end of a Unix socket. So the gate holds the socket that
programs see, asks the kernel who connects (SO_PEERCRED), and passes bytes on to the server's own socket, which lies
in a directory that only this process's user can enter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import socket
import stat
import struct
import tempfile
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger

MAX_CONNECTIONS: Final = 64  # a TD runs a handful of programs
_CHUNK: Final = 64 * 1024
_CREDENTIALS: Final = struct.Struct("3i")  # struct ucred: pid, uid, gid
_MAX_PATH: Final = 100  # bytes; sun_path has 108


class PeerGate:
    """The socket `path` (mode 0600, owned by `uid`), and `inner`, where the server behind it has to listen."""

    def __init__(self, path: Path, uid: int) -> None:
        self._path, self._uid = path, uid
        self._server: asyncio.Server | None = None
        self._inode = -1
        self._relays: set[asyncio.Task[None]] = set()
        try:
            self._private = Path(tempfile.mkdtemp(prefix=".gate-", dir=path.parent))  # mode 0700
        except OSError as error:
            raise unusable(path, error.strerror or str(error)) from None
        if len(os.fsencode(self.inner)) > _MAX_PATH:
            shutil.rmtree(self._private, ignore_errors=True)
            raise unusable(path, f"the path of a socket has at most about {_MAX_PATH - 20} bytes")

    @property
    def inner(self) -> Path:
        return self._private / "inner"

    async def start(self) -> None:
        """Let programs in; raise CloisterError when `path` cannot be had."""
        try:
            listener = self._listen()
        except OSError as error:
            raise unusable(self._path, error.strerror or str(error)) from None
        self._server = await asyncio.start_unix_server(self._accept, sock=listener, limit=_CHUNK)

    async def stop(self) -> None:
        """Take the socket away and end all connections."""
        if self._server is not None:
            self._server.close()
        for relay in self._relays:
            relay.cancel()
        await asyncio.gather(*self._relays, return_exceptions=True)
        with contextlib.suppress(OSError):
            if self._path.lstat().st_ino == self._inode:  # not one that another process has put there since
                self._path.unlink()
        shutil.rmtree(self._private, ignore_errors=True)

    def _listen(self) -> socket.socket:
        self._require_free()
        # Made ready where nobody can reach it, then moved: at no moment can another user connect.
        outer = self._private / "outer"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(os.fspath(outer))
            outer.chmod(0o600)
            if self._uid != os.geteuid():
                os.chown(outer, self._uid, -1)
            listener.listen(MAX_CONNECTIONS)
            self._inode = outer.lstat().st_ino
            outer.rename(self._path)
        except OSError:
            listener.close()
            raise
        return listener

    def _require_free(self) -> None:
        """Refuse to take the place of anything but a dead socket."""
        try:
            mode = self._path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            if probe.connect_ex(os.fspath(self._path)) in (0, errno.EAGAIN):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        credentials = writer.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != self._uid or len(self._relays) >= MAX_CONNECTIONS:
            why = "another user's process" if uid != self._uid else f"{MAX_CONNECTIONS} connections are open"
            get_logger().warning("connection refused", peer_pid=pid, peer_uid=uid, why=why)
            writer.close()
            return
        relay = asyncio.create_task(self._relay(reader, writer), name=f"relay of process {pid}")
        self._relays.add(relay)
        relay.add_done_callback(self._relays.discard)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_unix_connection(self.inner, limit=_CHUNK)
        except OSError:
            writer.close()
            return
        pumps = [asyncio.create_task(_pump(reader, inner_writer)), asyncio.create_task(_pump(inner_reader, writer))]
        try:
            # HTTP/2 has no half-open connections: when one side is done, both are.
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            writer.close()
            inner_writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            writer.write(data)
            await writer.drain()


def unusable(path: Path, why: str) -> CloisterError:
    """Return the error of a socket that cannot be had."""
    return CloisterError(
        Code.IO_FAILED,
        what=f"cannot listen on {path}",
        why=why,
        todo="give a short path in a directory that this user can write, where nothing else listens; "
        "to serve another user, run as root",
    )
