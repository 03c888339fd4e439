# SPDX-License-Identifier: Apache-2.0
"""The host's quote generation service: TD reports to quotes, over vsock or a Unix socket.

Wire (Intel TDX DCAP, qgs_msg_lib 1.1): each message behind its 4-byte big-endian length; inside, little-endian,

    header    u16 major, u16 minor, u32 type, u32 size of header and body, u32 error code
    request   type 0: header, u32 report size, u32 size of ids, report, ids
    answer    type 1: header, u32 id size, u32 quote size, id of the chosen key, quote

The service is the operator's. Nothing it says is believed: sizes are bounded and must add up, one deadline covers
the whole exchange, and whether the quote is over this TD's report is checked by who asked.
"""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from cloister.errors import CloisterError, Code
from cloister.guest.providers.base import failed, reason
from cloister.tdx.quote import MAX_QUOTE_SIZE

TDREPORT_SIZE: Final = 1024
TIMEOUT_S: Final = 30.0  # as long as the kernel waits for the same service
_HEADER: Final = struct.Struct("<HHIII")
_SIZES: Final = struct.Struct("<II")
_MAJOR, _MINOR = 1, 1  # only the major version must agree
_GET_QUOTE_REQUEST: Final = 0
_GET_QUOTE_ANSWER: Final = 1
_MAX_ID: Final = 1024  # an attestation key's id has 16 bytes
_MAX_MESSAGE: Final = _HEADER.size + _SIZES.size + _MAX_ID + MAX_QUOTE_SIZE
_PATH: Final = re.compile(r"/[ -~]{1,106}")
_VSOCK: Final = re.compile(r"vsock:([0-9]{1,10}):([0-9]{1,10})")
_ERRORS: Final = {
    0x12001: "unexpected error",
    0x12002: "out of memory",
    0x12003: "invalid parameter",
    0x12004: "another version of the protocol",
    0x12005: "invalid message type",
    0x12006: "invalid message size",
    0x12007: "invalid error code",
}


@dataclass(frozen=True, slots=True)
class QgsAddress:
    """Where the service listens: a vsock port of the host (CID 2), or a Unix socket inside the TD."""

    family: int
    address: tuple[int, int] | str
    text: str

    @classmethod
    def parse(cls, text: str) -> QgsAddress:
        """Parse "vsock:<cid>:<port>" or "unix:<absolute path>"; raise CloisterError(CONFIG_INVALID)."""
        path = text.removeprefix("unix:")
        if path != text and _PATH.fullmatch(path):
            return cls(socket.AF_UNIX, path, text)
        if found := _VSOCK.fullmatch(text):
            cid, port = int(found[1]), int(found[2])
            if cid < 2**32 and port < 2**32:
                return cls(socket.AF_VSOCK, (cid, port), text)
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{text[:200]!r} is no address of a quote generation service",
            why="allowed: vsock:<cid>:<port>, such as vsock:2:4050, or unix:<absolute path>",
            todo="correct qgs= in guest.provider",
        )


HOST: Final = QgsAddress(socket.AF_VSOCK, (2, 4050), "vsock:2:4050")


class QgsClient:
    """Asks the service; a connection for each quote, as Intel's own client does. Safe from several threads."""

    def __init__(
        self,
        address: QgsAddress = HOST,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address, self._timeout_s, self._clock = address, timeout_s, clock

    def quote(self, report: bytes) -> bytes:
        """Return the quote that the service makes of a TD report (1,024 bytes)."""
        if len(report) != TDREPORT_SIZE:
            raise ValueError(f"a TD report has {TDREPORT_SIZE} bytes, not {len(report)}")
        size = _HEADER.size + _SIZES.size + len(report)
        message = _HEADER.pack(_MAJOR, _MINOR, _GET_QUOTE_REQUEST, size, 0) + _SIZES.pack(len(report), 0) + report
        deadline = self._clock() + self._timeout_s
        try:
            with socket.socket(self._address.family, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._left(deadline))
                connection.connect(self._address.address)
                connection.settimeout(self._left(deadline))
                connection.sendall(len(message).to_bytes(4, "big") + message)
                length = int.from_bytes(self._receive(connection, 4, deadline), "big")
                if not _HEADER.size + _SIZES.size <= length <= _MAX_MESSAGE:
                    _refuse(f"an answer of {length} bytes")
                return read_answer(self._receive(connection, length, deadline))
        except TimeoutError:
            self._unreachable(f"no whole answer within {self._timeout_s:g} s")
        except OSError as error:
            self._unreachable(reason(error))

    def _receive(self, connection: socket.socket, size: int, deadline: float) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            connection.settimeout(self._left(deadline))
            part = connection.recv(size - len(parts))
            if not part:
                _refuse(f"it closed the connection after {len(parts)} of {size} bytes")
            parts += part
        return bytes(parts)

    def _left(self, deadline: float) -> float:
        left_s = deadline - self._clock()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def _unreachable(self, why: str) -> NoReturn:
        raise failed(
            f"the quote generation service at {self._address.text} gave no quote",
            why=why,
            todo="on the host, start qgsd and let it listen there (/etc/qgs.conf; vsock needs a vhost-vsock device)",
        ) from None


def read_answer(message: bytes) -> bytes:
    """Return the quote of one answer; raise CloisterError(QUOTE_PROVIDER_FAILED) for anything but a whole one."""
    if len(message) < _HEADER.size + _SIZES.size:
        _refuse(f"an answer of {len(message)} bytes")
    major, minor, kind, size, error = _HEADER.unpack_from(message)
    if major != _MAJOR:
        _refuse(f"version {major}.{minor} of the protocol; {_MAJOR}.x is understood")
    if kind != _GET_QUOTE_ANSWER:
        _refuse(f"a message of type {kind} where a quote was due ({_GET_QUOTE_ANSWER})")
    if size != len(message):
        _refuse(f"a message that calls itself {size} bytes long and has {len(message)}")
    if error:
        _refuse(f"error {error:#x}: {_ERRORS.get(error, 'see the log of qgsd on the host')}")
    id_size, quote_size = _SIZES.unpack_from(message, _HEADER.size)
    if id_size > _MAX_ID or not 0 < quote_size <= MAX_QUOTE_SIZE:
        _refuse(f"an id of {id_size} bytes and a quote of {quote_size}")
    start = _HEADER.size + _SIZES.size + id_size
    if start + quote_size != len(message):
        _refuse(f"an id of {id_size} bytes and a quote of {quote_size} in a message of {len(message)}")
    return message[start:]


def _refuse(why: str) -> NoReturn:
    raise failed(
        "the quote generation service gave no answer that can be used",
        why=why,
        todo="look at the log of qgsd on the host; it must be Intel's DCAP 1.15 or later",
    )
