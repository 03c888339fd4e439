# SPDX-License-Identifier: Apache-2.0
"""What is done of a directory that is being sealed: one line a file, so that an interrupted run can go on.

The first line says which key and version of which dataset is being sealed; each further line names a finished file and
what its source looked like. Every line carries a MAC under a key derived from the DEK: storage is not trusted, and a
line of its making could keep an old content in a new version. A line that was cut by a crash counts for nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.secret import SecretBytes

# Stands in a directory that is being sealed, and in one where sealing was interrupted; locked by the writer.
MARKER_NAME: Final = ".cloister-sealing"
# Stands in a directory that is being re-wrapped, and in one where that was interrupted.
REWRAP_NAME: Final = ".cloister-rewrapping"
_MAX_SIZE: Final = 256 * 1024 * 1024  # bytes; 100,000 files make about 20 MB
_MAC_SIZE: Final = 64  # hexadecimal digits


@dataclass(frozen=True, slots=True)
class Unfinished:
    """Which directory an interrupted run was making. A claim until its MAC was checked with the DEK."""

    dataset: str
    version: int
    parent: str  # hex, or empty
    key_uri: str
    key_version: int
    wrapped: str  # hex


@dataclass(frozen=True, slots=True)
class Done:
    """A file that was sealed, and what its source looked like then."""

    path: str
    size: int  # bytes
    modified_ns: int


def read_unfinished(out: Path) -> Unfinished | None:
    """Return what an interrupted run was making in a directory, or None when there is nothing to go on with."""
    try:
        with (out / MARKER_NAME).open("rb") as file:
            line = file.readline(64 * 1024)
    except OSError:
        return None
    document = _document(line)
    return _unfinished(document) if document else None


class Journal:
    """The open journal of one run."""

    def __init__(self, descriptor: int, secret: SecretBytes) -> None:
        """`descriptor` is the marker file, open for reading and writing, and locked."""
        self._descriptor = descriptor
        self._key = HKDF(SHA256(), length=32, salt=None, info=b"cloister-sealing-journal-v1").derive(secret.reveal())

    def begin(self, what: Unfinished) -> dict[str, Done]:
        """Return what an earlier run of the very same work finished; begin anew when there was none."""
        lines = self._read()
        first = next(lines, None)
        if first is not None and _unfinished(first) == what:
            found = {done.path: done for done in map(_done, lines) if done}
            os.lseek(self._descriptor, 0, os.SEEK_END)
            # Behind a line that a crash cut, the next one begins on a line of its own.
            os.write(self._descriptor, b"\n")
            return found
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._append({name: getattr(what, name) for name in Unfinished.__slots__})
        os.fsync(self._descriptor)
        return {}

    def note(self, done: Done) -> None:
        """Remember a finished file. Safe for several threads: a line is one write."""
        self._append({name: getattr(done, name) for name in Done.__slots__})

    def _append(self, document: dict[str, Any]) -> None:
        text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode("ascii")
        os.write(self._descriptor, self._mac(text) + b" " + text + b"\n")

    def _read(self) -> Iterator[dict[str, Any]]:
        size = os.fstat(self._descriptor).st_size
        data = os.pread(self._descriptor, min(size, _MAX_SIZE), 0)
        for line in data.split(b"\n"):
            mac, _, text = line.partition(b" ")
            if hmac.compare_digest(mac, self._mac(text)) and (document := _document(line)):
                yield document

    def _mac(self, text: bytes) -> bytes:
        return hmac.digest(self._key, text, hashlib.sha256).hex().encode("ascii")


def _document(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line[_MAC_SIZE + 1 :])
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _unfinished(document: dict[str, Any]) -> Unfinished | None:
    kinds = {"dataset": str, "version": int, "parent": str, "key_uri": str, "key_version": int, "wrapped": str}
    return Unfinished(**document) if _has(document, kinds) else None


def _done(document: dict[str, Any]) -> Done | None:
    return Done(**document) if _has(document, {"path": str, "size": int, "modified_ns": int}) else None


def _has(document: dict[str, Any], kinds: dict[str, type]) -> bool:
    return document.keys() == kinds.keys() and all(type(document[name]) is kind for name, kind in kinds.items())
