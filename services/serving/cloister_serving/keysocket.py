# SPDX-License-Identifier: Apache-2.0
"""Hand a model's data key to its worker: over a Unix socket, to one process, once.

The socket lies in a directory that only this user may enter (0700), is 0600 itself, and lives until the key was
taken. The kernel says who connected (SO_PEERCRED); only the very process that the agent started is answered, told
from a later one of the same id by its start time. Everybody else gets a denial, and the key stays for the worker.
No secret ever stands in an argument, an environment variable or a file.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cloister.secret import SecretBytes
from cloister.tlv import tlv
from cloister_serving.stockworker import ProcessIdentity

MESSAGE_LABEL: Final = "cloister-model-key-v1"
DENIED: Final = b"denied"
_UCRED: Final = struct.Struct("3i")  # pid, uid, gid (unix(7), SO_PEERCRED)


def key_message(
    *, data_key: SecretBytes, wrapped: bytes, key_uri: str, key_version: int, manifest: bytes
) -> SecretBytes:
    """Return the one packet a worker gets: the key, what it is, and which manifest (48 bytes) was measured."""
    return SecretBytes(tlv(MESSAGE_LABEL, data_key.reveal(), wrapped, key_uri, key_version, manifest))


class KeySocket:
    """A listening socket in a private directory; made before the worker is."""

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)
        descriptor = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        before = os.umask(0o177)
        try:
            self._socket.bind(f"/proc/self/fd/{descriptor}/{name}")
        finally:
            os.umask(before)
            os.close(descriptor)
        self._socket.listen(8)

    async def hand_out(
        self, worker: ProcessIdentity, message: SecretBytes, *, on_denied: Callable[[int], None] | None = None
    ) -> None:
        """Give the message to the worker and close; returns once it was sent, and never sends it twice."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                connection, _ = await loop.sock_accept(self._socket)
                with connection:
                    if self._is(worker, connection):
                        await loop.sock_sendall(connection, message.reveal())
                        return
                    if on_denied is not None:
                        on_denied(_peer(connection)[0])
                    await self._deny(connection)
        finally:
            self.close()

    def close(self) -> None:
        """Stop listening and remove the socket's name."""
        self._socket.close()
        self._path.unlink(missing_ok=True)

    @staticmethod
    def _is(worker: ProcessIdentity, connection: socket.socket) -> bool:
        pid, uid = _peer(connection)
        if pid != worker.pid or uid != worker.uid or uid != os.getuid():
            return False
        try:
            return ProcessIdentity.of(pid) == worker
        except FileNotFoundError:
            return False

    @staticmethod
    async def _deny(connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(connection, DENIED)
        except OSError:
            return  # it left without waiting for the answer


def _peer(connection: socket.socket) -> tuple[int, int]:
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid
