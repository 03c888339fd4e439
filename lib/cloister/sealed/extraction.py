# SPDX-License-Identifier: Apache-2.0
"""Write the content of a sealed directory in the clear, whole file by whole file, and go on after an interruption.

While it lasts, `out` holds a marker: the digest of the manifest that is being opened, then a line for each file that
is there, with what the file looked like when it was written. A file that was changed since is written again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cloister.atomicfile import AtomicFile, file_error, is_partial, sync_directory
from cloister.errors import CloisterError, Code
from cloister.sealed.manifest import FileEntry, Manifest
from cloister.sealed.reader import SealedReader

MARKER_NAME: Final = ".cloister-opening"


class Extraction:
    """One run; `remaining` says which files are still to be written. Files may be written by several threads."""

    def __init__(self, out: Path, manifest: Manifest, progress: Callable[[int, int, str], None] | None) -> None:
        """Make or recognise the directory; raise CloisterError(FILE_EXISTS) when it holds anything else."""
        self._out = out
        self._manifest = manifest
        self._progress = progress
        self._lock = threading.Lock()
        self._done = 0  # bytes
        self._kept: dict[str, tuple[int, int]] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            marker = out / MARKER_NAME
            if not marker.exists() and any(out.iterdir()):
                raise CloisterError(
                    Code.FILE_EXISTS,
                    what=f"{out} is not empty",
                    why="opening does not overwrite files",
                    todo="name a directory that is empty or does not exist",
                )
            self._marker = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise file_error(error, what=f"cannot write below {out}") from error
        try:
            self._begin()
        except BaseException:
            os.close(self._marker)
            raise

    def _begin(self) -> None:
        """Read what an earlier run wrote; refuse what it began with another manifest."""
        digest = self._manifest.digest.hex()
        text = os.pread(self._marker, os.fstat(self._marker).st_size, 0).decode("utf-8", errors="replace")
        first, *lines = text.split("\n")
        if first and first != digest:
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"{self._out} is not empty",
                why="another version of the data was being opened into it",
                todo=f"name another directory, or remove {self._out}",
            )
        if not first:
            os.write(self._marker, digest.encode() + b"\n")
        for line in lines:
            try:
                path, size, modified_ns = json.loads(line)
            except (ValueError, TypeError):
                continue  # cut by a crash: that file is written again
            self._kept[str(path)] = (size, modified_ns)
        if first:
            os.write(self._marker, b"\n")

    def remaining(self) -> list[FileEntry]:
        """Return the files that are not there yet, or were changed since they were written."""
        found = []
        for entry in self._manifest.files:
            try:
                status = (self._out / entry.path).lstat()
                there = (
                    self._kept.get(entry.path)
                    == (status.st_size, status.st_mtime_ns)
                    == (
                        entry.length,
                        status.st_mtime_ns,
                    )
                )
            except OSError:
                there = False
            if there:
                self._add(entry.length, entry.path)
            else:
                found.append(entry)
        return found

    def write(self, entry: FileEntry, file: SealedReader) -> None:
        """Write one file, and close the reader."""
        place = self._out / entry.path
        with file:
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with AtomicFile(place, durable_name=False) as target:
                    file.copy_to(target.fileno(), progress=lambda count: self._add(count, entry.path))
                status = place.stat()
                line = json.dumps([entry.path, status.st_size, status.st_mtime_ns])
                os.write(self._marker, line.encode() + b"\n")
            except OSError as error:
                raise file_error(error, what=f"cannot write {place}") from error
        if not entry.length:
            self._add(0, entry.path)

    def finish(self) -> None:
        """Make the names durable and remove the marker."""
        try:
            for left in [path for path in self._out.rglob("*") if is_partial(path.name)]:
                left.unlink()
            for folder in {folder for entry in self._manifest.files for folder in Path(entry.path).parents}:
                sync_directory(self._out / folder)
            (self._out / MARKER_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise file_error(error, what=f"cannot write below {self._out}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._marker)

    def _add(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._manifest.size, name)
