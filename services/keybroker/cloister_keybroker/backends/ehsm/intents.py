# SPDX-License-Identifier: Apache-2.0
"""What the broker was about to have made: one small file for every key that EHSM was asked for.

    DIR/<random>.json   {"started_ms": 1764000000000, "keyid": null or "...", "orphaned_ms": null or 1764000000000}

Making a key is the one call that must not be repeated blindly: EHSM has no names for keys, so one whose answer was
lost cannot be found again by asking. The file is on disk before the request leaves, and goes when the key is in the
store, or is deleted. It holds nothing secret.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cloister import ehsm
from cloister.atomicfile import file_error, is_partial, sync_directory, write_atomically
from cloister.errors import CloisterError, Code

_MAX_FILE: Final = 1024  # bytes


@dataclass(frozen=True, slots=True)
class Intent:
    """One request for a key."""

    path: Path
    started_ms: int  # Unix milliseconds, by this machine's clock
    keyid: str | None = None  # None: no answer, yet or ever
    orphaned_ms: int | None = None  # when it was found that nothing uses the key

    def encode(self) -> bytes:
        members = {"started_ms": self.started_ms, "keyid": self.keyid, "orphaned_ms": self.orphaned_ms}
        return json.dumps(members).encode() + b"\n"

    @classmethod
    def parse(cls, path: Path, data: bytes) -> Intent:
        """Read what `encode` wrote; raise ValueError for anything else."""
        members: Any = json.loads(data)
        if not isinstance(members, dict) or members.keys() != {"started_ms", "keyid", "orphaned_ms"}:
            raise ValueError("other members")
        started, keyid, orphaned = members["started_ms"], members["keyid"], members["orphaned_ms"]
        if type(started) is not int or not (orphaned is None or type(orphaned) is int):
            raise ValueError("not a time")
        if not (keyid is None or (isinstance(keyid, str) and ehsm.is_key_id(keyid))):
            raise ValueError("not a key id")
        return cls(path, started, keyid, orphaned)


class Journal:
    """The directory of intents. Its methods block for a write to disk; raise CloisterError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, what=f"{directory} cannot be made") from None

    def begin(self, now_ms: int) -> Intent:
        """Write down that a key is about to be made."""
        return self._write(Intent(self._directory / f"{secrets.token_hex(12)}.json", now_ms))

    def answered(self, intent: Intent, keyid: str) -> Intent:
        """Write down which key it became."""
        return self._write(replace(intent, keyid=keyid))

    def orphaned(self, intent: Intent, now_ms: int) -> Intent:
        """Write down that nothing uses it."""
        return self._write(replace(intent, orphaned_ms=now_ms))

    def drop(self, intent: Intent) -> None:
        """Forget it: the key is in use, or gone."""
        try:
            intent.path.unlink(missing_ok=True)
            sync_directory(self._directory)
        except OSError as error:
            raise file_error(error, what=f"{intent.path} cannot be removed") from None

    def all(self) -> Sequence[Intent]:
        """Return all intents; raise STORE_DAMAGED for a file that is none."""
        try:
            paths = [path for path in self._directory.iterdir() if not is_partial(path.name)]
            return [self._read(path) for path in sorted(paths)]
        except OSError as error:
            raise file_error(error, what=f"{self._directory} cannot be read") from None

    def _read(self, path: Path) -> Intent:
        try:
            with path.open("rb") as file:
                return Intent.parse(path, file.read(_MAX_FILE))
        except ValueError:
            raise CloisterError(
                Code.STORE_DAMAGED,
                what=f"{path} is not what the broker wrote",
                why="it is a record of a key that the back end was asked to make",
                todo="remove it; a key that it was about may stay at the back end unused",
            ) from None

    def _write(self, intent: Intent) -> Intent:
        write_atomically(intent.path, intent.encode())
        return intent
