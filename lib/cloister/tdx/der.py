# SPDX-License-Identifier: Apache-2.0
"""A strict reader of DER (ITU-T X.690): one tag byte, definite shortest lengths, nothing left over."""

from __future__ import annotations

from typing import Final

BOOLEAN: Final = 0x01
INTEGER: Final = 0x02
BIT_STRING: Final = 0x03
OCTET_STRING: Final = 0x04
OBJECT_IDENTIFIER: Final = 0x06
ENUMERATED: Final = 0x0A
UTF8_STRING: Final = 0x0C
PRINTABLE_STRING: Final = 0x13
SEQUENCE: Final = 0x30
SET: Final = 0x31


class DerError(ValueError):
    """Bytes that are not the DER they should be."""


class DerReader:
    """Read elements of `data[start:end]` one after the other; raise DerError for anything out of place."""

    __slots__ = ("_data", "_end", "_offset")

    def __init__(self, data: bytes, start: int = 0, end: int | None = None) -> None:
        self._data = data
        self._offset = start
        self._end = len(data) if end is None else end

    @property
    def at_end(self) -> bool:
        return self._offset == self._end

    def take(self, tag: int) -> bytes:
        """Return the contents of the next element, which must have this tag."""
        start, end = self._next(tag)
        return self._data[start:end]

    def take_any(self) -> tuple[int, bytes]:
        """Return tag and contents of the next element, whatever its tag."""
        if self.at_end:
            raise DerError("cut before an element")
        tag = self._data[self._offset]
        return tag, self.take(tag)

    def take_whole(self, tag: int) -> bytes:
        """Return the next element with its tag and length."""
        before = self._offset
        _, end = self._next(tag)
        return self._data[before:end]

    def enter(self, tag: int = SEQUENCE) -> DerReader:
        """Return a reader of the next element's contents; this one goes on behind it."""
        start, end = self._next(tag)
        return DerReader(self._data, start, end)

    def integer(self, tag: int = INTEGER) -> int:
        """Return the next element as a number, negative ones included; only the shortest form is one."""
        content = self.take(tag)
        if not content:
            raise DerError("an integer without contents")
        # X.690, 8.3.2: the first nine bits are neither all zero nor all one.
        if len(content) > 1 and content[0] == (0xFF if content[1] >= 0x80 else 0):
            raise DerError("an integer that is not in its shortest form")
        return int.from_bytes(content, "big", signed=True)

    def finish(self) -> None:
        """Make sure that nothing is left."""
        if self._offset != self._end:
            raise DerError(f"{self._end - self._offset} bytes left over")

    def _next(self, tag: int) -> tuple[int, int]:
        data, offset, end = self._data, self._offset, self._end
        if offset + 2 > end:
            raise DerError("cut before an element")
        if data[offset] != tag:
            raise DerError(f"tag {data[offset]:#04x} where {tag:#04x} should be")
        size = data[offset + 1]
        start = offset + 2
        if size >= 0x80:
            count = size & 0x7F
            # Indefinite (0) is BER; more than three bytes is more than we ever read.
            if not 1 <= count <= 3 or start + count > end:
                raise DerError("a length that is indefinite, too long or cut")
            size = int.from_bytes(data[start : start + count], "big")
            if size < 0x80 or size < 1 << (8 * (count - 1)):
                raise DerError("a length that is not in its shortest form")
            start += count
        if size > end - start:
            raise DerError("an element longer than what holds it")
        self._offset = start + size
        return start, start + size
