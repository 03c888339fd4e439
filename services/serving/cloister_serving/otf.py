# SPDX-License-Identifier: Apache-2.0
"""TorchServe's binary worker protocol: bytes <-> values, nothing else.

A frontend sends `L` (load) once and `I` (infer) again and again; the worker answers each with one reply:

    load     "L" LP(name) LP(path) i32(batch size) LP(handler) i32(gpu) LP(envelope) bool(limit image pixels)
    infer    "I" { LP(request id) { LP(key) LP(value) }* -1 { LP(name) LP(content type) LP(value) }* -1 }* -1
    reply    i32(code) LP(message)
             { LP(request id) LP(content type) i32(status) LP(phrase) i32(n) { LP(key) LP(value) }*n LP(body) }* -1

`LP` is a 4-byte big-endian signed length and the bytes; a length of -1 ends a list. Source: pytorch/serve 0.12.0,
ts/protocol/otf_message_handler.py and org.pytorch.serve.util.codec. What a worker sends is untrusted: it runs a
handler's code. Every length is bounded here, and anything malformed is `OtfError`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

LOAD_OK: Final = 200
PREDICT_OK: Final = 200
STREAM_HEADER: Final = "ts_stream_next"
_I32: Final = struct.Struct("!i")
_END: Final = _I32.pack(-1)
_MAX_I32: Final = 2**31 - 1


class OtfError(Exception):
    """What the worker sent is not a reply of this protocol, or exceeds a limit."""


class _Incomplete(Exception):
    """The reply goes on beyond the bytes that are here."""


@dataclass(frozen=True, slots=True)
class OtfLimits:
    """What a reply may hold."""

    text_bytes: int = 4096  # a message, phrase, header, request id: names and one-line texts
    items: int = 256  # predictions in one reply: a batch is never larger
    headers: int = 64  # of one prediction
    body_bytes: int = 4 << 20  # of one prediction: 256 labels of 256 characters are below 400 KiB
    reply_bytes: int = 8 << 20  # the whole reply, so that a worker cannot make the gateway buffer without end


@dataclass(frozen=True, slots=True)
class InferParameter:
    """One named input of a request."""

    name: str
    content_type: str
    value: bytes


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One request of a batch."""

    request_id: str
    parameters: Sequence[InferParameter]
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ReplyItem:
    """The answer to one request of a batch."""

    request_id: str
    content_type: str
    status: int
    phrase: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Reply:
    """What a worker answers to a load or a batch."""

    code: int
    message: str
    items: tuple[ReplyItem, ...]


def _lp(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    if len(data) > _MAX_I32:
        raise ValueError("a field of the worker protocol is longer than 2**31 - 1 bytes")
    return _I32.pack(len(data)) + data


def encode_load(*, name: str, path: str, handler: str, batch_size: int = 1) -> bytes:
    """Return the message that makes a worker import a handler and initialise it, on the CPU, without an envelope."""
    return b"".join((b"L", _lp(name), _lp(path), _I32.pack(batch_size), _lp(handler), _I32.pack(-1), _lp(b""), b"\x01"))


def encode_infer(batch: Sequence[InferRequest]) -> bytes:
    """Return the message that runs one batch."""
    parts: list[bytes] = [b"I"]
    for request in batch:
        parts.append(_lp(request.request_id))
        for key, value in request.headers.items():
            parts += (_lp(key), _lp(value))
        parts.append(_END)
        for parameter in request.parameters:
            parts += (_lp(parameter.name), _lp(parameter.content_type), _lp(parameter.value))
        parts.append(_END)
    parts.append(_END)
    return b"".join(parts)


def decode_reply(buffer: bytes | bytearray, limits: OtfLimits | None = None) -> tuple[Reply, int] | None:
    """Return the reply at the start of the buffer and its size, or None when it is not all there yet.

    Raises OtfError for a malformed reply, as soon as the bytes at hand show it.
    """
    limits = limits or OtfLimits()
    cursor = _Cursor(buffer, limits)
    try:
        reply = cursor.reply()
    except _Incomplete:
        if len(buffer) > limits.reply_bytes:
            raise OtfError(f"a reply is longer than {limits.reply_bytes} bytes") from None
        return None
    return reply, cursor.at


class _Cursor:
    """A place in the buffer; copies a field only once it is complete."""

    def __init__(self, buffer: bytes | bytearray, limits: OtfLimits) -> None:
        self._buffer = buffer
        self._limits = limits
        self.at = 0

    def reply(self) -> Reply:
        code = self._int()
        message = self._text()
        items: list[ReplyItem] = []
        while (size := self._int()) != -1:
            if len(items) == self._limits.items:
                raise OtfError(f"a reply holds more than {self._limits.items} predictions")
            items.append(self._item(size))
        if self.at > self._limits.reply_bytes:
            raise OtfError(f"a reply is longer than {self._limits.reply_bytes} bytes")
        return Reply(code, message, tuple(items))

    def _item(self, id_size: int) -> ReplyItem:
        request_id = self._decode(self._bytes(id_size, self._limits.text_bytes))
        content_type = self._text()
        status = self._int()
        phrase = self._text()
        count = self._int()
        if not 0 <= count <= self._limits.headers:
            raise OtfError(f"a prediction has {count} headers, not 0 to {self._limits.headers}")
        headers = {self._text(): self._text() for _ in range(count)}
        body = self._bytes(self._int(), self._limits.body_bytes)
        return ReplyItem(request_id, content_type, status, phrase, headers, body)

    def _int(self) -> int:
        end = self.at + 4
        if end > len(self._buffer):
            raise _Incomplete
        (value,) = _I32.unpack_from(self._buffer, self.at)
        self.at = end
        return int(value)

    def _bytes(self, size: int, limit: int) -> bytes:
        if not 0 <= size <= limit:
            raise OtfError(f"a field is {size} bytes long, not 0 to {limit}")
        end = self.at + size
        if end > len(self._buffer):
            raise _Incomplete
        value = bytes(self._buffer[self.at : end])
        self.at = end
        return value

    def _text(self) -> str:
        return self._decode(self._bytes(self._int(), self._limits.text_bytes))

    @staticmethod
    def _decode(value: bytes) -> str:
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise OtfError("a text of a reply is not UTF-8") from None
