# SPDX-License-Identifier: Apache-2.0
"""What somebody saw of the log last, in a file: the next look must continue it.

This is what finds a store that was rolled back, forked or replaced: the broker itself cannot know.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code
from cloister.strictjson import Members, StrictJsonError, dump, load
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.note import MAX_NOTE, NoteInvalid, NoteKey

_FORMAT: Final = "cloister-seen-log/v1"
_MAX_FILE: Final = 128 * 1024  # bytes


@dataclass(frozen=True, slots=True)
class Seen:
    """A log's key, as verified evidence led to it, and its newest checkpoint that was verified."""

    log: NoteKey
    note: bytes

    @property
    def checkpoint(self) -> Checkpoint:
        """What the note says; raise CloisterError(CONFIG_INVALID) for a note that the key did not sign."""
        try:
            return Checkpoint.open(self.note, self.log)
        except NoteInvalid as error:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what="what was remembered of the broker's log is damaged",
                why=str(error),
                todo="restore the file, or start anew with: cloister audit forget",
            ) from None

    def save(self, path: Path) -> None:
        """Write the file (0600)."""
        write_atomically(
            path, dump({"format": _FORMAT, "log": str(self.log), "checkpoint": self.note.decode()}) + b"\n"
        )

    @classmethod
    def load(cls, path: Path) -> Seen | None:
        """Read the file, or None when there is none; raise CloisterError(CONFIG_INVALID) for any other content."""
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_FILE + 1)
        except FileNotFoundError:
            return None
        try:
            members = Members(load(data, max_size=_MAX_FILE), "document")
            if members.text("format") != _FORMAT:
                raise StrictJsonError("another kind of file")
            seen = cls(NoteKey.parse(members.text("log")), members.text("checkpoint", longest=MAX_NOTE).encode())
            members.end()
        except (StrictJsonError, NoteInvalid) as error:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"{path} is damaged",
                why=str(error),
                todo="restore the file, or start anew with: cloister audit forget",
            ) from None
        seen.checkpoint  # noqa: B018 - raises for a note that the key did not sign
        return seen
