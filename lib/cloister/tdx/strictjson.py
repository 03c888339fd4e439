# SPDX-License-Identifier: Apache-2.0
"""JSON as Intel signs it, read strictly (row T2), and typed access to its members.

Refused: a byte-order mark, bytes that are not UTF-8, duplicate members, NaN and infinities, fractions and exponents,
and nesting that the interpreter's recursion limit ends; integers are bounded where they are read. Callers verify the
signature over these bytes first, so that only what Intel signed is parsed at all.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any, Final, NoReturn

from cloister.tdx.quote import QuoteRejected

# RFC 3339, 5.6, with a zone.
_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)", re.ASCII)


class StrictObject:
    """An object's members, each asked for by type; raises QuoteRejected with the row of whoever asks."""

    __slots__ = ("_members", "_what")

    def __init__(self, value: Any, what: str, check: str) -> None:
        if not isinstance(value, dict):
            raise QuoteRejected(check, f"{what} is not an object")
        self._members: dict[str, Any] = value
        self._what = what

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def text(self, name: str, check: str) -> str:
        value = self._members.get(name)
        if not isinstance(value, str):
            raise QuoteRejected(check, f"{self._what}: {name} is missing or not text")
        return value

    def integer(self, name: str, check: str, *, highest: int) -> int:
        value = self._members.get(name)
        # bool is an int in Python and true is not a number in JSON.
        if type(value) is not int or not 0 <= value <= highest:
            raise QuoteRejected(check, f"{self._what}: {name} is missing or not an integer from 0 to {highest}")
        return value

    def octets(self, name: str, check: str, *, size: int) -> bytes:
        """Return a hex string, of either case, of exactly `size` bytes."""
        value = self._members.get(name)
        if isinstance(value, str) and len(value) == 2 * size and value.isascii() and value.isalnum():
            try:
                return bytes.fromhex(value)
            except ValueError:
                pass
        raise QuoteRejected(check, f"{self._what}: {name} is missing or not {size} bytes in hex")

    def time(self, name: str, check: str) -> datetime:
        value = self._members.get(name)
        if isinstance(value, str) and _TIME.fullmatch(value):
            try:
                return datetime.fromisoformat(value).astimezone(UTC)
            except (ValueError, OverflowError):
                pass
        raise QuoteRejected(check, f"{self._what}: {name} is missing or not a time of RFC 3339 with a zone")

    def items(self, name: str, check: str, *, most: int) -> list[Any]:
        value = self._members.get(name)
        if not isinstance(value, list) or len(value) > most:
            raise QuoteRejected(check, f"{self._what}: {name} is missing or not a list of up to {most}")
        return value

    def child(self, name: str, check: str) -> StrictObject:
        return StrictObject(self._members.get(name), f"{self._what}: {name}", check)


def parse_object(data: bytes, what: str, check: str) -> StrictObject:
    """Parse one JSON object; raise QuoteRejected(check) for anything else."""
    try:
        text = data.decode()  # json would take a byte-order mark, and UTF-16
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_refuse)
    except (ValueError, RecursionError):
        raise QuoteRejected(check, f"{what} is not strict JSON") from None
    return StrictObject(value, what, check)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)
