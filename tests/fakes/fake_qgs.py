# SPDX-License-Identifier: Apache-2.0
"""A quote generation service on a Unix socket: Intel's framing, quotes by a simulated platform.

`corrupt` gets each whole answer (length prefix included) and returns the pieces to send instead; a `None` among them
means: wait until the client has gone.
"""

from __future__ import annotations

import socket
import struct
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cloister_sim import SimulatedPlatform
from fakes.tdx_guest_device import read_td_report

HEADER = struct.Struct("<HHIII")
SIZES = struct.Struct("<II")
KEY_ID = bytes(range(16))


def answer(quote: bytes, *, key_id: bytes = KEY_ID, error: int = 0, kind: int = 1, major: int = 1) -> bytes:
    """Return one framed answer."""
    body = SIZES.pack(0, 0) if error else SIZES.pack(len(key_id), len(quote)) + key_id + quote
    message = HEADER.pack(major, 1, kind, HEADER.size + len(body), error) + body
    return len(message).to_bytes(4, "big") + message


@dataclass
class FakeQgs:
    """What the service was asked, and how it misbehaves."""

    platform: SimulatedPlatform
    address: str = ""
    corrupt: Callable[[bytes], Iterable[bytes | None]] = lambda whole: [whole]
    requests: list[bytes] = field(default_factory=list)

    def answer_to(self, request: bytes) -> bytes:
        """Answer one message (without its length) as qgs_msg_lib and the quoting enclave do."""
        major, _, kind, size, error = HEADER.unpack_from(request)
        report_size, ids_size = SIZES.unpack_from(request, HEADER.size)
        if (major, kind, error) != (1, 0, 0) or size != len(request) != 24 + report_size + ids_size:
            return answer(b"", error=0x12003)
        body = read_td_report(request[24 : 24 + report_size])
        return answer(b"", error=0x12001) if body is None else answer(self.platform.sign(body))

    def serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as incoming:
            request = incoming.read(int.from_bytes(incoming.read(4), "big"))
            if len(request) < HEADER.size + SIZES.size:
                return
            self.requests.append(request)
            try:
                for part in self.corrupt(self.answer_to(request)):
                    connection.sendall(part) if part is not None else incoming.read(1)
            except OSError:
                pass  # the client had enough


@contextmanager
def fake_qgs(platform: SimulatedPlatform) -> Iterator[FakeQgs]:
    """Serve until the block ends; `address` is for ?qgs=."""
    with tempfile.TemporaryDirectory(prefix="qgs-") as directory, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(directory) / "qgs.socket")
        listener.bind(path)
        listener.listen()
        service = FakeQgs(platform, address=f"unix:{path}")

        def accept() -> None:
            while True:
                connection, _ = listener.accept()
                if done.is_set():
                    connection.close()
                    return
                service.serve(connection)

        done = threading.Event()
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield service
        finally:
            done.set()
            with socket.socket(socket.AF_UNIX) as waker:
                waker.connect(path)
            thread.join()
