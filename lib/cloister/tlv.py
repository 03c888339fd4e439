# SPDX-License-Identifier: Apache-2.0
"""The one encoding of everything that is hashed or signed for a binding.

`LP(x)` is a 4-byte big-endian length, then the bytes; `TLV(label, f1, f2, ...)` is `LP(label)`, then `LP` of each
field in fixed order. Fields cannot run into each other, and a label keeps one use of a key apart from another.
"""

from __future__ import annotations

import hashlib

_MAX_FIELD = 2**32 - 1


def lp(value: bytes) -> bytes:
    """Return the bytes behind their 4-byte big-endian length."""
    if len(value) > _MAX_FIELD:
        raise ValueError("a TLV field is longer than 2**32 - 1 bytes")
    return len(value).to_bytes(4, "big") + value


def tlv(label: str, *fields: bytes | str | int) -> bytes:
    """Encode a label and its fields; text as UTF-8, integers as 8 bytes big-endian, unsigned."""
    parts = [lp(label.encode("ascii"))]
    for field in fields:
        if isinstance(field, str):
            parts.append(lp(field.encode()))
        elif isinstance(field, int):
            parts.append(lp(field.to_bytes(8, "big")))
        else:
            parts.append(lp(field))
    return b"".join(parts)


def parse_tlv(data: bytes, *, label: str, fields: int) -> tuple[bytes, ...]:
    """Decode what `tlv` made: exactly this label and this many fields, nothing behind them.

    Raises ValueError for anything else.
    """
    values: list[bytes] = []
    offset = 0
    while offset < len(data):
        if len(data) - offset < 4:
            raise ValueError("TLV: cut inside a length")
        size = int.from_bytes(data[offset : offset + 4], "big")
        offset += 4
        if size > len(data) - offset:
            raise ValueError("TLV: a field is longer than the data")
        values.append(data[offset : offset + size])
        offset += size
        if len(values) > fields + 1:
            raise ValueError("TLV: too many fields")
    if len(values) != fields + 1 or values[0] != label.encode("ascii"):
        raise ValueError(f"TLV: not a {label} of {fields} fields")
    return tuple(values[1:])


def sha384(*parts: bytes) -> bytes:
    """Return SHA-384 of the concatenated parts (48 bytes)."""
    digest = hashlib.sha384()
    for part in parts:
        digest.update(part)
    return digest.digest()
