# SPDX-License-Identifier: Apache-2.0
"""Write the little DER that the simulated platform's SGX extension needs (ITU-T X.690)."""

from __future__ import annotations

from collections.abc import Sequence


def element(tag: int, content: bytes) -> bytes:
    """Return one element; contents up to 65,535 bytes."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    if size < 0x100:
        return bytes([tag, 0x81, size]) + content
    return bytes([tag, 0x82]) + size.to_bytes(2, "big") + content


def sequence(*elements: bytes) -> bytes:
    return element(0x30, b"".join(elements))


def integer(value: int, tag: int = 0x02) -> bytes:
    """Return the shortest form of a number that is not negative."""
    return element(tag, value.to_bytes(value.bit_length() // 8 + 1, "big"))


def enumerated(value: int) -> bytes:
    return integer(value, 0x0A)


def octets(value: bytes) -> bytes:
    return element(0x04, value)


def boolean(value: bool) -> bytes:
    return element(0x01, b"\xff" if value else b"\x00")


def oid(arcs: Sequence[int]) -> bytes:
    """Return an object identifier; the first two arcs are below 40."""
    content = bytearray([arcs[0] * 40 + arcs[1]])
    for arc in arcs[2:]:
        groups = [arc & 0x7F]
        while arc := arc >> 7:
            groups.append(arc & 0x7F | 0x80)
        content += bytes(reversed(groups))
    return element(0x06, bytes(content))
