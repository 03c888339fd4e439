# SPDX-License-Identifier: Apache-2.0
"""An exported log: JSON lines, read and verified one by one, however long the log is.

{"format":"cloister-log/v1","log":"<name>+<id>+<key>"}
{"entry":"<base64>","index":0}     an entry, whole: the exporter's own, or the start of a broker's life
{"hash":"<base64>","index":1}      the leaf hash of another tenant's
{"checkpoint":"<signed note>"}     what all of them add up to
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Final

from cloister.errors import CloisterError, Code
from cloister.merkle import HASH_SIZE, Frontier, leaf_hash
from cloister.strictjson import Members, StrictJsonError, dump, load
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.entry import EntryInvalid, LoggedEntry
from cloister.transparency.note import MAX_NOTE, NoteInvalid, NoteKey
from cloister.transparency.proofs import open_checkpoint
from cloister.transparency.start import ACTION, Start

LOG_FORMAT: Final = "cloister-log/v1"
MAX_LINE: Final = 2 * 1024 * 1024  # bytes; what one message of the broker holds


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf as the file has it."""

    index: int
    entry: bytes  # empty when only its hash is known
    hash: bytes  # 32 bytes


@dataclass(frozen=True, slots=True)
class CheckedLog:
    """A log that adds up to its checkpoint."""

    checkpoint: Checkpoint
    entries: int  # that could be read; of the rest only hashes are in the file
    starts: tuple[Start, ...]


def write_log(write: Callable[[bytes], object], key: NoteKey, leaves: Iterable[Leaf], checkpoint: bytes) -> None:
    """Write a log file line by line."""
    write_header(write, key)
    for leaf in leaves:
        write_leaf(write, leaf)
    write_end(write, checkpoint)


def write_header(write: Callable[[bytes], object], key: NoteKey) -> None:
    """Write the first line."""
    _line(write, {"format": LOG_FORMAT, "log": str(key)})


def write_leaf(write: Callable[[bytes], object], leaf: Leaf) -> None:
    """Write the line of one leaf: the entry where it is known."""
    known = {"entry": leaf.entry} if leaf.entry else {"hash": leaf.hash}
    _line(write, {"index": leaf.index} | {name: base64.b64encode(data).decode() for name, data in known.items()})


def write_end(write: Callable[[bytes], object], checkpoint: bytes) -> None:
    """Write the last line."""
    _line(write, {"checkpoint": checkpoint.decode()})


class LogFile:
    """A log file being read; `check` goes through it once."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read the first line; raise CloisterError(LOG_INVALID) when it is not a log's."""
        self._file = file
        self._checkpoint = b""
        first = self._members("its first line")
        try:
            if first is None or first.text("format") != LOG_FORMAT:
                raise StrictJsonError("not an exported log")
            self.log = NoteKey.parse(first.text("log"))  # a hint: never trusted
            first.end()
        except (StrictJsonError, NoteInvalid) as error:
            raise _invalid(str(error)) from None

    def check(self, key: NoteKey, *, at: dict[int, bytes] | None = None) -> CheckedLog:
        """Verify every line under the log's key; raise CloisterError(LOG_INVALID).

        1. leaves follow each other from 0  2. each entry says its own place  3. each start of a broker's life is
        endorsed by its receipt key, which saw the log end right there  4. all leaves add up to the checkpoint
        `at` is filled in: the roots at the sizes that are its keys.
        """
        frontier, entries, starts = Frontier(), 0, []
        wanted = at if at is not None else {}
        for leaf in self.leaves():
            if frontier.size in wanted:
                wanted[frontier.size] = frontier.root()
            if leaf.index != frontier.size:
                raise _invalid(f"where entry {frontier.size} should be there is entry {leaf.index}")
            if leaf.entry:
                entries += 1
                logged = _parsed(leaf)
                if logged.entry.action == ACTION:
                    starts.append(_start(logged, frontier, key))
            frontier = frontier.appended(leaf.hash)
        if frontier.size in wanted:
            wanted[frontier.size] = frontier.root()
        checkpoint = open_checkpoint(self._checkpoint, key)
        if (frontier.size, frontier.root()) != (checkpoint.size, checkpoint.root):
            raise _invalid(
                f"its {frontier.size} entries do not add up to the checkpoint over {checkpoint.size}: some were"
                " changed, reordered, added or removed"
            )
        return CheckedLog(checkpoint, entries, tuple(starts))

    def leaves(self) -> Iterator[Leaf]:
        """Yield leaf after leaf, until the checkpoint has come."""
        count = 0
        while True:
            members = self._members(f"the line behind entry {count - 1}")
            if members is None:
                raise _invalid("it ends before its checkpoint: it was cut")
            try:
                if members.has("checkpoint"):
                    self._checkpoint = members.text("checkpoint", longest=MAX_NOTE).encode()
                    members.end()
                    break
                leaf = _leaf(members)
            except StrictJsonError as error:
                raise _invalid(str(error)) from None
            count += 1
            yield leaf
        if self._file.read(1):
            raise _invalid("there is more behind its checkpoint")

    def _members(self, what: str) -> Members | None:
        line = self._file.readline(MAX_LINE + 1)
        if not line:
            return None
        try:
            return Members(load(line, max_size=MAX_LINE), what)
        except StrictJsonError as error:
            raise _invalid(f"{what}: {error}") from None


def _leaf(members: Members) -> Leaf:
    index = members.integer("index")
    whole = members.has("entry")
    data = _unbase64(members.text("entry" if whole else "hash", longest=MAX_LINE))
    members.end()
    if not data or (not whole and len(data) != HASH_SIZE):
        raise StrictJsonError(f"entry {index} is empty, or its hash is none")
    return Leaf(index, data if whole else b"", leaf_hash(data) if whole else data)


def _parsed(leaf: Leaf) -> LoggedEntry:
    try:
        logged = LoggedEntry.parse(leaf.entry)
    except EntryInvalid as error:
        raise _invalid(f"entry {leaf.index}: {error}") from None
    if logged.index != leaf.index:
        raise _invalid(f"entry {leaf.index} says that it is entry {logged.index}")
    return logged


def _start(logged: LoggedEntry, frontier: Frontier, key: NoteKey) -> Start:
    try:
        start = Start.of(logged)
    except EntryInvalid as error:
        raise _invalid(f"entry {logged.index}: {error}") from None
    if start.log != key or start.root != frontier.root():
        raise _invalid(f"entry {logged.index}: the broker that began there saw another log")
    return start


def _unbase64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise StrictJsonError("not base64") from None


def _line(write: Callable[[bytes], object], document: dict[str, Any]) -> None:
    write(dump(document) + b"\n")


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.LOG_INVALID,
        what="the exported log does not verify",
        why=why,
        todo="export it again, and compare it with an older export or checkpoint",
    )
