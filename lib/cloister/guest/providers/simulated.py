# SPDX-License-Identifier: Apache-2.0
"""A TD of a simulated platform: one connection to its Unix socket is one TD.

Frames are a 4-byte big-endian length and a body: op byte and payload to the platform, status byte (0 is good) and
payload back.
"""

from __future__ import annotations

import socket
import threading
from typing import Final, NoReturn

from cloister.errors import CloisterError
from cloister.guest.providers.base import DIGEST_SIZE, failed, reason
from cloister.tdx.quote import MAX_QUOTE_SIZE
from cloister.tdx.reportdata import REPORT_DATA_SIZE

_TIMEOUT_S: Final = 10.0  # a quote takes milliseconds
_MAX_ANSWER: Final = 1024 * 1024 + 1  # a boot event log of 1 MiB behind its status byte


class SimulatedProvider:
    """A TD of a simulated platform, over its Unix socket. Safe from several threads."""

    def __init__(self, path: str, image_digest: bytes) -> None:
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_TIMEOUT_S)
        try:
            self._socket.connect(path)
            self._boot_log = self._call(b"L" + image_digest)
        except (OSError, CloisterError) as error:
            self._socket.close()
            if isinstance(error, CloisterError):
                raise
            self._fail(reason(error))

    @property
    def boot_log(self) -> bytes:
        return self._boot_log

    def extend(self, index: int, digest: bytes) -> bytes:
        return self._call(b"E" + bytes([index]) + digest, size=DIGEST_SIZE)

    def quote(self, report_data: bytes) -> bytes:
        if len(report_data) != REPORT_DATA_SIZE:
            raise ValueError(f"report data has {REPORT_DATA_SIZE} bytes, not {len(report_data)}")
        quote = self._call(b"Q" + report_data)
        if len(quote) > MAX_QUOTE_SIZE:
            self._fail(f"a quote of {len(quote)} bytes")
        return quote

    def close(self) -> None:
        self._socket.close()

    def _call(self, body: bytes, *, size: int | None = None) -> bytes:
        with self._lock:
            try:
                self._socket.sendall(len(body).to_bytes(4, "big") + body)
                length = int.from_bytes(self._receive(4), "big")
                if not 0 < length <= _MAX_ANSWER:
                    self._fail(f"an answer of {length} bytes")
                answer = self._receive(length)
            except OSError as error:
                self._fail(reason(error))
        if answer[0] != 0:
            self._fail(answer[1:501].decode("utf-8", "replace"))
        if size is not None and len(answer) != size + 1:
            self._fail(f"{len(answer) - 1} bytes where {size} were due")
        return answer[1:]

    def _receive(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            part = self._socket.recv(size - len(parts))
            if not part:
                self._fail("the platform closed the connection")
            parts += part
        return bytes(parts)

    def _fail(self, why: str) -> NoReturn:
        raise failed(
            "the simulated platform gave no answer that can be used",
            why=why,
            todo="check that the platform process runs and that guest.provider names its socket",
        )
