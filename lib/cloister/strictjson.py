# SPDX-License-Identifier: Apache-2.0
"""JSON without surprises, for what people sign: two readers of the same bytes see the same values.

Refused: a byte-order mark, bytes that are not UTF-8, lone surrogates, members that stand twice, NaN and infinities,
fractions and exponents, integers that not every JSON reader keeps, and nesting deeper than 16.
"""

from __future__ import annotations

import json
from typing import Any, Final, NoReturn, TypeAlias

Value: TypeAlias = "bool | int | str | list[Value] | dict[str, Value] | None"

MAX_DEPTH: Final = 16
MAX_INTEGER: Final = 2**53 - 1  # what a reader with IEEE 754 doubles keeps


class StrictJsonError(Exception):
    """Bytes that are not JSON of this subset, or an object of another shape than the one that was asked for."""


def load(data: bytes, *, max_size: int) -> Value:
    """Parse at most `max_size` bytes; raise StrictJsonError for anything that is not strict JSON."""
    if len(data) > max_size:
        raise StrictJsonError(f"longer than {max_size} bytes")
    try:
        text = data.decode()  # json would take a byte-order mark, and UTF-16
        value: Value = json.loads(
            text, object_pairs_hook=_object, parse_constant=_refuse, parse_float=_refuse, parse_int=_integer
        )
        _check(value, MAX_DEPTH)
    except (ValueError, RecursionError):
        raise StrictJsonError("not strict JSON") from None
    return value


class Members:
    """The members of one object, each taken once and by type; `end` refuses those that nobody took."""

    __slots__ = ("_members", "_what")

    def __init__(self, value: Value, what: str) -> None:
        if not isinstance(value, dict):
            raise StrictJsonError(f"{what} is not an object")
        self._members = dict(value)
        self._what = what

    def text(self, name: str, *, longest: int = 1024) -> str:
        value = self._members.pop(name, None)
        if not isinstance(value, str) or len(value) > longest:
            raise StrictJsonError(f"{self._what}: {name} is missing or not text of up to {longest} characters")
        return value

    def texts(self, name: str, *, most: int, longest: int = 1024) -> tuple[str, ...]:
        values = self.items(name, most=most)
        texts = tuple(value for value in values if isinstance(value, str) and len(value) <= longest)
        if len(texts) != len(values):
            raise StrictJsonError(f"{self._what}: {name} is not a list of texts of up to {longest} characters")
        return texts

    def integer(self, name: str, *, highest: int = MAX_INTEGER) -> int:
        value = self._members.pop(name, None)
        # bool is an int in Python and true is not a number in JSON.
        if type(value) is not int or not 0 <= value <= highest:
            raise StrictJsonError(f"{self._what}: {name} is missing or not an integer from 0 to {highest}")
        return value

    def octets(self, name: str, *, sizes: tuple[int, ...]) -> bytes:
        """Return a lower-case hexadecimal text as bytes of one of these sizes."""
        text = self.text(name)
        try:
            value = bytes.fromhex(text)
        except ValueError:
            value = b""
        if value.hex() != text or len(value) not in sizes:
            wanted = " or ".join(str(size) for size in sizes)
            raise StrictJsonError(f"{self._what}: {name} is not {wanted} bytes in lower-case hexadecimal")
        return value

    def items(self, name: str, *, most: int) -> list[Value]:
        value = self._members.pop(name, None)
        if not isinstance(value, list) or len(value) > most:
            raise StrictJsonError(f"{self._what}: {name} is missing or not a list of up to {most}")
        return value

    def has(self, name: str) -> bool:
        """Say whether this member is there and was not taken."""
        return name in self._members

    def inner(self, name: str) -> Members:
        """Return the members of an object within this one."""
        return Members(self._members.pop(name, None), f"{self._what}: {name}")

    def end(self) -> None:
        if self._members:
            raise StrictJsonError(f"{self._what}: unknown member {min(self._members)[:80]!r}")


def dump(value: dict[str, Any]) -> bytes:
    """Return the one form of these values: sorted members, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member stands twice")
    return members


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > MAX_INTEGER:
        raise ValueError("an integer that not every reader keeps")
    return int(text)


def _check(value: Value, depth: int) -> None:
    """Refuse what is nested too deep, and text that is not Unicode."""
    if isinstance(value, str):
        value.encode()  # UnicodeEncodeError is a ValueError
    elif isinstance(value, list | dict):
        if depth == 0:
            raise ValueError("nested too deep")
        for item in value:
            _check(item, depth - 1)
        if isinstance(value, dict):
            for item in value.values():
                _check(item, depth - 1)
