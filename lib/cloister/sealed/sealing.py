# SPDX-License-Identifier: Apache-2.0
"""Write a sealed directory: sealed files first, the manifest last, so that a directory is whole or is none.

A sealed directory is never changed afterwards. While it is written it holds a marker, locked by the writer; what an
interrupted writer left is recognised by the marker and written anew. Only ciphertext ever reaches the disk.
"""

from __future__ import annotations

import fcntl
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cloister.atomicfile import file_error, is_partial, sync_directory, write_atomically
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import DATA_SEGMENT_SIZE, SUFFIX, AssociatedData, check_dataset, check_path
from cloister.sealed.manifest import MANIFEST_NAME, FileEntry, Manifest
from cloister.sealed.stream import SealedWriter

# Stands in a directory that is being sealed, and in one where sealing was interrupted; locked by the writer.
MARKER_NAME: Final = ".cloister-sealing"

# Called with bytes of plaintext done, bytes in total, and the file at hand.
Progress = Callable[[int, int, str], None]

_COPY_SIZE: Final = 1024 * 1024


class SealedDirectoryWriter:
    """Seal files one by one into a new directory; nothing counts until `finish` has written the manifest.

    Refuses a directory that holds anything but what an interrupted writer left. Raises CloisterError.
    """

    def __init__(
        self,
        out: Path,
        *,
        data_key: DataKey,
        dataset: str,
        version: int = 1,
        parent: bytes = b"",
        segment_size: int = DATA_SEGMENT_SIZE,
    ) -> None:
        _argument(check_dataset, dataset)
        if version < 1 or len(parent) not in {0, 48}:
            raise _unusable(
                f"cannot seal version {version} of {dataset}",
                "versions count from 1, and a parent is named by the 48 bytes of its manifest's digest",
            )
        self.path = out
        self._data_key = data_key
        self._dataset = dataset
        self._version = version
        self._parent = parent
        self._segment_size = segment_size
        self._entries: dict[str, FileEntry] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock = _take_over(out)
        except OSError as error:
            raise file_error(error, what=f"cannot seal into {out}") from error
        # The lock ends with the writer, finished or not.
        self._release = weakref.finalize(self, os.close, self._lock)

    @contextmanager
    def open(self, path: str, *, schema_version: int = 1, segment_size: int | None = None) -> Iterator[SealedWriter]:
        """Open a file for writing; it becomes part of the directory when the block ends without an exception."""
        _argument(check_path, path)
        if path in self._entries:
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"{path} was sealed into {self.path} before",
                why="a sealed directory holds each path once",
                todo="seal it under another path",
            )
        place = self.path / (path + SUFFIX)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, what=f"cannot seal {path} into {self.path}") from error
        with SealedWriter(
            place,
            data_key=self._data_key,
            associated=AssociatedData(self._dataset, path, schema_version),
            segment_size=segment_size or self._segment_size,
        ) as file:
            yield file
        self._entries[path] = FileEntry.of(file)

    def add(self, path: str, data: bytes | bytearray | memoryview, *, schema_version: int = 1) -> None:
        """Seal a whole file from memory."""
        with self.open(path, schema_version=schema_version) as file:
            file.write(data)

    def finish(self) -> Manifest:
        """Write the manifest, which makes the directory a sealed one; return it."""
        if not self._entries:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"there is nothing to seal into {self.path}",
                why="a sealed directory holds at least one file",
                todo="name a directory with files in it",
            )
        bare = Manifest(
            self._dataset, self._version, self._parent, self._data_key.key_uri, tuple(self._entries.values())
        )
        manifest = bare.signed(self._data_key.secret)
        data = manifest.to_bytes()
        # What does not parse could never be opened: better to fail here.
        Manifest.parse(data, name=str(self.path / MANIFEST_NAME))
        try:
            # The files' own folders are synced with them; what is new is that these folders are there.
            for folder in {folder for path in self._entries for folder in Path(path).parents}:
                sync_directory(self.path / folder)
            sync_directory(self.path.parent)
            write_atomically(self.path / MANIFEST_NAME, data, mode=0o644)
            (self.path / MARKER_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise file_error(error, what=f"cannot seal into {self.path}") from error
        self._release()
        return manifest

    def close(self) -> None:
        """Give up the lock; without `finish` before, what was written stays, marked as unfinished."""
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Source:
    name: str  # path in the sealed directory
    place: Path
    size: int  # bytes when it was listed


def seal_directory(
    source: Path,
    out: Path,
    *,
    data_key: DataKey,
    dataset: str,
    version: int = 1,
    parent: bytes = b"",
    segment_size: int = DATA_SEGMENT_SIZE,
    progress: Progress | None = None,
) -> Manifest:
    """Seal a directory, or one file, into a new directory; return the manifest.

    Every file below the source is sealed, hidden ones too. Symbolic links and special files are refused by name
    before anything is written, and so is a file that changes while it is read. What an interrupted run left in
    `out` is written anew; a finished directory is never overwritten (FILE_EXISTS).
    """
    sources = _list(source, out)
    with SealedDirectoryWriter(
        out, data_key=data_key, dataset=dataset, version=version, parent=parent, segment_size=segment_size
    ) as writer:
        total, done = sum(file.size for file in sources), 0
        buffer = memoryview(bytearray(_COPY_SIZE))
        for file in sources:
            with writer.open(file.name) as sealed, _unchanging(file) as descriptor:
                while count := os.readv(descriptor, [buffer]):
                    sealed.write(buffer[:count])
                    done += count
                    if progress:
                        progress(done, total, file.name)
            if progress:
                progress(done, total, file.name)
        return writer.finish()


def _list(source: Path, out: Path) -> list[_Source]:
    """Return the files to seal, sorted by name; refuse what cannot be sealed faithfully."""
    try:
        if source.is_file():
            found = [(source.name, source.resolve(), True)]
        else:
            found = [(name, source / name, regular) for name, regular in walk(source)]
        if out.resolve().is_relative_to(source.resolve()):
            raise _unusable(f"cannot seal {source} into {out}", "the output lies inside what is to be sealed")
        sources = []
        for name, place, regular in sorted(found):
            _argument(check_path, name)
            if not regular:
                kind = "a symbolic link" if place.is_symlink() else "not a regular file"
                raise _unusable(f"cannot seal {place}", f"it is {kind}, and only files are sealed")
            sources.append(_Source(name, place, place.stat().st_size))
    except OSError as error:
        raise file_error(error, what=f"cannot read {source}") from error
    if not sources:
        raise _unusable(f"cannot seal {source}", "there is no file in it")
    return sources


@contextmanager
def _unchanging(file: _Source) -> Iterator[int]:
    """Open a source file; refuse it when it is another after reading than before."""
    try:
        descriptor = os.open(file.place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            before = os.fstat(descriptor)
            yield descriptor
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise file_error(error, what=f"cannot read {file.place}") from error
    if not stat.S_ISREG(before.st_mode) or _state(before) != _state(after) or before.st_size != file.size:
        raise _unusable(f"cannot seal {file.place}", "it was changed while it was read")


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _take_over(out: Path) -> int:
    """Lock a directory for writing and empty it of what an interrupted writer left; return the lock."""
    marker = out / MARKER_NAME
    foreign = next((name for name, _ in walk(out)), "") if not marker.exists() else ""
    if foreign or (out / MANIFEST_NAME).exists():
        finished = (out / MANIFEST_NAME).exists()
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{out} is not empty",
            why="it is a sealed directory, and these are never changed" if finished else f"it holds {foreign}",
            todo="name a directory that is empty or does not exist",
        )
    lock = os.open(marker, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another writer may have finished between the look and the lock.
        if (out / MANIFEST_NAME).exists():
            raise BlockingIOError
        for name, _ in list(walk(out)):
            if name.endswith(SUFFIX) or is_partial(name.rpartition("/")[2]):
                (out / name).unlink()
    except BlockingIOError:
        os.close(lock)
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{out} is in use",
            why="another process seals into it at this moment",
            todo="wait for it to end, or name another directory",
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock


def walk(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the relative path of everything below that is not a directory, and whether it is a regular file.

    Follows no symbolic links; raises OSError.
    """
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(path / prefix) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(f"{prefix}{entry.name}/")
                else:
                    yield prefix + entry.name, entry.is_file(follow_symlinks=False)


def _argument(check: Callable[[str], None], value: str) -> None:
    try:
        check(value)
    except ValueError as error:
        raise _unusable(f"cannot seal {value!r}", str(error)) from None


def _unusable(what: str, why: str) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID, what=what, why=why, todo="change the name or the file, or leave it out, and try again"
    )
