# SPDX-License-Identifier: Apache-2.0
"""Read a policy document block by block: every key taken by type, none left over, errors with path and line.

Release policies (keybroker) and appraisal policies (attest) are such documents.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Final, NoReturn, TypeVar

from cloister.errors import CloisterError, Code
from cloister.strictyaml import Document, Path, StrictYamlError, Value, load, path_text
from cloister.tlv import sha384

API_VERSION: Final = "cloister.dev/v1"
# Intel's TCB status names (Intel TDX DCAP Quoting Library API); Revoked can never be allowed.
TCB_STATUSES: Final = (
    "UpToDate",
    "SWHardeningNeeded",
    "ConfigurationNeeded",
    "ConfigurationAndSWHardeningNeeded",
    "OutOfDate",
    "OutOfDateConfigurationNeeded",
    "TDRelaunchAdvised",
    "TDRelaunchAdvisedConfigurationNeeded",
)

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

    @property
    def names(self) -> tuple[str, ...]:
        """Keys that nobody took yet."""
        return tuple(self._members)

    def is_block(self, name: str) -> bool:
        """Say whether a key holds a block, where a list or a text is allowed, too."""
        return isinstance(self._members.get(name), dict)

    def has(self, name: str) -> bool:
        """Say whether a key is there, and that it may be."""
        self._allowed.append(name)
        return name in self._members

    def takes(self, name: str, text: str) -> bool:
        """Take a key that stands for this very text; leave any other value to be read otherwise."""
        if self._members.get(name) != text:
            return False
        del self._members[name]
        return True

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

    def blocks(self, name: str, most: int) -> tuple[BlockReader, ...]:
        """Take a required list of 1 to `most` blocks."""
        path = (*self._path, name)
        if not self.has(name):
            self._refuse(path, "missing", "write a list of blocks")
        value = self._members.pop(name)
        if not isinstance(value, list) or not 0 < len(value) <= most:
            self._refuse(path, f"a list of 1 to {most} blocks is wanted here", "write one block for each entry")
        return tuple(BlockReader(self._document, (*path, i), item) for i, item in enumerate(value))

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
    raise CloisterError(
        Code.POLICY_INVALID, what=f"{place}: {why}", why="a policy with a mistake in it is not used", todo=todo
    )


def _show(value: timedelta) -> str:
    seconds = int(value.total_seconds())
    for unit in "dhm":
        if seconds % _UNITS[unit] == 0:
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"


def read_document(data: bytes, *, what: str, manual: str) -> Document:
    """Parse YAML of the accepted form (at most 64 KiB); raise CloisterError(POLICY_INVALID) for anything else."""
    try:
        return load(data)
    except StrictYamlError as error:
        raise CloisterError(
            Code.POLICY_INVALID,
            what=f"the {what} is not YAML of the accepted form: {error}",
            why="a policy with a mistake in it is not used",
            todo=f"see {manual}, section Form",
        ) from None


def digest_of(value: Value) -> bytes:
    """Return SHA-384 of the RFC 8785 form of an all-strings document (48 bytes)."""
    return sha384(canonical(value).encode())


def canonical(value: Value) -> str:
    """Return the RFC 8785 form: no spaces, members sorted by UTF-16 code units, ECMAScript's escapes.

    For strings without lone surrogates Python's escapes are ECMAScript's.
    """
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    members = sorted(value.items(), key=lambda member: member[0].encode("utf-16-be"))
    return "{" + ",".join(f"{canonical(name)}:{canonical(item)}" for name, item in members) + "}"


def digest_text(digest: bytes) -> str:
    """Write a digest as policies do."""
    return f"sha384:{digest.hex()}"


def parse_digest(text: str) -> bytes | None:
    """Read sha384:<96 hex digits>, lower case."""
    found = re.fullmatch(r"sha384:([0-9a-f]{96})", text, re.ASCII)
    return bytes.fromhex(found[1]) if found else None


def parse_hex(text: str, size: int) -> bytes | None:
    """Read so many bytes in hexadecimal, lower case."""
    found = re.fullmatch(r"[0-9a-f]+", text, re.ASCII)
    return bytes.fromhex(text) if found and len(text) == 2 * size else None


def parse_advisory(text: str) -> str | None:
    """Read the name of an advisory."""
    return text if re.fullmatch(r"INTEL-SA-[0-9]{5}", text, re.ASCII) else None
