# SPDX-License-Identifier: Apache-2.0
"""Bytes that must not reach a log, a traceback, a pickle or a file."""

from __future__ import annotations

import hmac
from typing import Any, NoReturn, final


@final
class SecretBytes:
    """Hold key material; only `reveal()` gives it out.

    Python cannot promise that freed memory is wiped, so this type guards against accidents (printing,
    comparing in variable time, pickling, formatting), not against a reader of the process's memory.
    """

    __slots__ = ("_value",)

    def __init__(self, value: bytes | bytearray | memoryview) -> None:
        self._value = bytes(value)

    def reveal(self) -> bytes:
        """Return the bytes: the one place to look for in a review."""
        return self._value

    def __len__(self) -> int:
        return len(self._value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SecretBytes):
            return NotImplemented
        return hmac.compare_digest(self._value, other._value)

    # Equal secrets would give equal hashes, which is an oracle in a dict or a set.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<secret, {len(self._value)} bytes>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("SecretBytes cannot be pickled or copied")
