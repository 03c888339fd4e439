# SPDX-License-Identifier: Apache-2.0
"""Read a policy document block by block: every key taken by type, none left over, errors with path and line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Final, NoReturn, TypeVar

from cloister.errors import CloisterError, Code
from cloister.strictyaml import Document, Path, Value, path_text

_T = TypeVar("_T")
_DURATION: Final = re.compile(r"([1-9][0-9]{0,4})([smhd])", re.ASCII)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}  # seconds
_MAX_LIST: Final = 256  # entries; bounds the work of one decision


class BlockReader:
    """One mapping of the document at a path."""

    def __init__(self, document: Document, path: Path, value: Value) -> None:
        self._document = document
        self._path = path
        if not isinstance(value, dict):
            self._refuse(path, "a block is wanted here", "write a block: keys with values")
        self._members = dict(value)
        self._allowed: list[str] = []

    def _refuse(self, path: Path, why: str, todo: str) -> NoReturn:
        refuse(self._document, path, why, todo)

    def has(self, name: str) -> bool:
        """Say whether a key is there, and that it may be."""
        self._allowed.append(name)
        return name in self._members

    def text(self, name: str) -> str:
        """Take a required text."""
        return self.parsed(name, lambda text: text, "a text")

    def parsed(self, name: str, parse: Callable[[str], _T | None], wanted: str) -> _T:
        """Take a required text through a parser that gives None for what is not allowed."""
        if not self.has(name):
            self._refuse((*self._path, name), "missing", f"write {wanted}")
        return self._parse((*self._path, name), self._members.pop(name), parse, wanted)

    def choice(self, name: str, allowed: Sequence[str], default: str | None = None) -> str:
        """Take one of these texts; without a default the key is required."""
        if default is not None and not self.has(name):
            return default
        return self.parsed(name, lambda text: text if text in allowed else None, f"one of: {', '.join(allowed)}")

    def number(self, name: str, low: int, high: int) -> int:
        """Take a required decimal number."""

        def parse(text: str) -> int | None:
            fits = re.fullmatch(r"0|[1-9][0-9]{0,9}", text, re.ASCII)
            return int(text) if fits and low <= int(text) <= high else None

        return self.parsed(name, parse, f"a number from {low} to {high}")

    def duration(self, name: str, low: timedelta, high: timedelta) -> timedelta:
        """Take a required duration such as 30s, 5m, 1h, 35d."""

        def parse(text: str) -> timedelta | None:
            found = _DURATION.fullmatch(text)
            value = timedelta(seconds=int(found[1]) * _UNITS[found[2]]) if found else None
            return value if value is not None and low <= value <= high else None

        return self.parsed(name, parse, f"a duration such as 30s, 5m, 1h or 35d, from {_show(low)} to {_show(high)}")

    def day(self, name: str) -> date:
        """Take a required ISO date."""

        def parse(text: str) -> date | None:
            if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text, re.ASCII):
                return None
            try:
                return date.fromisoformat(text)
            except ValueError:
                return None

        return self.parsed(name, parse, "a date such as 2026-02-11")

    def each(
        self, name: str, parse: Callable[[str], _T | None], wanted: str, *, may_be_empty: bool = False
    ) -> tuple[_T, ...]:
        """Take a required list of texts through a parser; no entry may stand twice."""
        path = (*self._path, name)
        if not self.has(name):
            self._refuse(path, "missing", f"write a list; each entry is {wanted}")
        value = self._members.pop(name)
        if not isinstance(value, list):
            self._refuse(path, "a list is wanted here", f"write [..]; each entry is {wanted}")
        if not value and not may_be_empty:
            self._refuse(path, "the list is empty: nothing would ever pass", f"each entry is {wanted}")
        if len(value) > _MAX_LIST:
            self._refuse(path, f"more than {_MAX_LIST} entries", "shorten the list")
        parsed = [self._parse((*path, i), item, parse, wanted) for i, item in enumerate(value)]
        for i, item in enumerate(parsed):
            if item in parsed[:i]:
                self._refuse((*path, i), f"{value[i]!r} stands twice", "write each entry once")
        return tuple(parsed)

    def choices(self, name: str, allowed: Sequence[str]) -> tuple[str, ...]:
        """Take a required list of some of these texts."""
        return self.each(name, lambda text: text if text in allowed else None, f"one of: {', '.join(allowed)}")

    def block(self, name: str) -> BlockReader:
        """Take a required block."""
        path = (*self._path, name)
        if not self.has(name):
            self._refuse(path, "missing", "this block is required")
        return BlockReader(self._document, path, self._members.pop(name))

    def optional(self, name: str) -> BlockReader | None:
        """Take a block that may be absent; present and empty is an error of whoever reads it."""
        return self.block(name) if self.has(name) else None

    def refuse(self, name: str, why: str, todo: str) -> NoReturn:
        """Refuse the value of a key that was already taken."""
        self._refuse((*self._path, name), why, todo)

    def end(self) -> None:
        """Refuse keys that nobody took, naming those that are allowed."""
        for name in self._members:
            allowed = ", ".join(dict.fromkeys(self._allowed))
            self._refuse((*self._path, name), "unknown key", f"allowed here: {allowed}")

    def _parse(self, path: Path, value: Value, parse: Callable[[str], _T | None], wanted: str) -> _T:
        if not isinstance(value, str):
            kind = "a list" if isinstance(value, list) else "a block"
            self._refuse(path, f"{kind} is not allowed here", f"write {wanted}")
        parsed = parse(value)
        if parsed is None:
            self._refuse(path, f"{value[:120]!r} is not allowed", f"write {wanted}")
        return parsed


def refuse(document: Document, path: Path, why: str, todo: str) -> NoReturn:
    """Raise POLICY_INVALID with the place in people's words."""
    place = f"{path_text(path)} (line {document.line_of(path)})"
    raise CloisterError(Code.POLICY_INVALID, what=f"{place}: {why}", why="the policy was not put in force", todo=todo)


def _show(value: timedelta) -> str:
    seconds = int(value.total_seconds())
    for unit in "dhm":
        if seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"
