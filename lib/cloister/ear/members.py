# SPDX-License-Identifier: Apache-2.0
"""Strict reading of JSON: every member once, of one type, and none that nobody asked for."""

from __future__ import annotations

import base64
import json
import re
from datetime import UTC, datetime
from typing import Any, Final

DIGEST_SIZE: Final = 48


class TokenRejected(Exception):
    """A token that does not verify; `check` is a stable name such as "signature" or "exp"."""

    def __init__(self, check: str, reason: str) -> None:
        super().__init__(f"{check}: {reason}")
        self.check = check
        self.reason = reason


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; a name that stands twice is refused: two readers could take different ones."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            raise TokenRejected("json", f"{where}: a member stands twice")
        return members

    def no_constant(_: str) -> float:
        raise ValueError("NaN and Infinity are not JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError):
        raise TokenRejected("json", f"{where}: not JSON") from None
    if not isinstance(value, dict):
        raise TokenRejected("json", f"{where}: not an object")
    return value


class Members:
    """Take the members of one object by type; `end` refuses those that nobody took."""

    def __init__(self, where: str, members: dict[str, Any]) -> None:
        self._where = where
        self._members = dict(members)

    def _take(self, name: str) -> Any:
        if name not in self._members:
            raise self._bad(name, "missing")
        return self._members.pop(name)

    def _bad(self, name: str, reason: str) -> TokenRejected:
        return TokenRejected("shape", f"{self._where}.{name}: {reason}")

    def text(self, name: str, limit: int = 2048) -> str:
        value = self._take(name)
        if not _is_text(value, limit):
            raise self._bad(name, f"not printable ASCII of at most {limit} characters")
        return str(value)

    def optional_text(self, name: str) -> str | None:
        if self._members.get(name, "") is None:
            del self._members[name]
            return None
        return self.text(name, 64)

    def number(self, name: str, low: int, high: int) -> int:
        value = self._take(name)
        # bool is an int in Python, and JSON's true is no number.
        if type(value) is not int or not low <= value <= high:
            raise self._bad(name, f"not an integer from {low} to {high}")
        return value

    def optional_number(self, name: str, low: int, high: int) -> int | None:
        if self._members.get(name, 0) is None:
            del self._members[name]
            return None
        return self.number(name, low, high)

    def flag(self, name: str) -> bool:
        value = self._take(name)
        if not isinstance(value, bool):
            raise self._bad(name, "not true or false")
        return value

    def time(self, name: str) -> datetime:
        return datetime.fromtimestamp(self.number(name, 0, 2**33), UTC)

    def object(self, name: str) -> Members:
        value = self._take(name)
        if not isinstance(value, dict):
            raise self._bad(name, "not an object")
        return Members(f"{self._where}.{name}", value)

    def texts(self, name: str, limit: int) -> tuple[str, ...]:
        value = self._take(name)
        if not isinstance(value, list) or len(value) > limit or not all(_is_text(v, 2048) for v in value):
            raise self._bad(name, f"not a list of at most {limit} texts")
        return tuple(value)

    def hex(self, name: str, *sizes: int) -> bytes:
        """Take bytes in hexadecimal, of one of these sizes."""
        text = self.text(name)
        return self._unhex(name, text, len(text) // 2 if len(text) // 2 in sizes else sizes[0])

    def hexes(self, name: str, size: int, limit: int) -> tuple[bytes, ...]:
        return tuple(self._unhex(name, text, size) for text in self.texts(name, limit))

    def digest(self, name: str) -> bytes:
        return self._undigest(name, self.text(name))

    def digests(self, name: str, limit: int) -> tuple[bytes, ...]:
        return tuple(self._undigest(name, text) for text in self.texts(name, limit))

    def _undigest(self, name: str, text: str) -> bytes:
        if not text.startswith("sha384:"):
            raise self._bad(name, "not sha384:<hex>")
        return self._unhex(name, text.removeprefix("sha384:"), DIGEST_SIZE)

    def _unhex(self, name: str, text: str, size: int) -> bytes:
        if not re.fullmatch(f"[0-9a-f]{{{2 * size}}}", text, re.ASCII):
            raise self._bad(name, f"not {size} bytes in lower-case hexadecimal")
        return bytes.fromhex(text)

    def names(self) -> list[str]:
        return sorted(self._members)

    def end(self) -> None:
        if self._members:
            raise TokenRejected("shape", f"{self._where}: unknown members {self.names()}")


def _is_text(value: Any, limit: int) -> bool:
    return isinstance(value, str) and len(value) <= limit and value.isascii() and value.isprintable()


def digest_text(digest: bytes) -> str:
    return f"sha384:{digest.hex()}"


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def unb64(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise TokenRejected("form", "not base64url") from None
