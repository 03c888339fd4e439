# SPDX-License-Identifier: Apache-2.0
"""Write a sealed directory: sealed files first, the manifest last, so that a directory is whole or is none.

A sealed directory is never changed afterwards. While it is written it holds a marker, locked by the writer, in which
stands what is done (journal.py). Only ciphertext ever reaches the disk.
"""

from __future__ import annotations

import fcntl
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.atomicfile import file_error, is_partial, sync_directory, write_atomically
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import DATA_SEGMENT_SIZE, SUFFIX, AssociatedData, check_dataset, check_path
from cloister.sealed.journal import MARKER_NAME, Done, Journal, Unfinished
from cloister.sealed.manifest import MANIFEST_NAME, FileEntry, Manifest
from cloister.sealed.stream import SealedReader, SealedWriter


class SealedDirectoryWriter:
    """Seal files one by one into a new directory; nothing counts until `finish` has written the manifest.

    Refuses a directory that holds anything but what an interrupted writer left. With a source for each file
    (`finished`, `note`) a run with the same data key goes on where the interrupted one stopped; otherwise what it
    left is written anew. Files may be written by several threads at once. Raises CloisterError.
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
        signing_key: Ed25519PrivateKey | None = None,
    ) -> None:
        """`signing_key` signs the manifest: the owner's, or that of the TD which makes the directory."""
        argument(check_dataset, dataset)
        if version < 1 or len(parent) not in {0, 48}:
            raise unusable(
                f"cannot seal version {version} of {dataset}",
                "versions count from 1, and a parent is named by the 48 bytes of its manifest's digest",
            )
        self.path = out
        self._data_key = data_key
        self._dataset = dataset
        self._version = version
        self._parent = parent
        self._segment_size = segment_size
        self._signing_key = signing_key
        self._entries: dict[str, FileEntry] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock = _lock(out)
            # The lock ends with the writer, finished or not.
            self._release = weakref.finalize(self, os.close, lock)
            self._journal = Journal(lock, data_key.secret)
            what = Unfinished(
                dataset, version, parent.hex(), data_key.key_uri, data_key.key_version, data_key.wrapped.hex()
            )
            self._done = self._journal.begin(what)
            self._clear()
        except OSError as error:
            raise file_error(error, what=f"cannot seal into {out}") from error

    def finished(self, path: str, *, size: int, modified_ns: int) -> bool:
        """Say whether an interrupted run sealed this very source; if so, the file is part of the directory again."""
        if self._done.get(path) != Done(path, size, modified_ns):
            return False
        try:
            with SealedReader(self.path / (path + SUFFIX), data_key=self._data_key, workers=1) as file:
                entry = FileEntry.of(file)
                bound = file.header.associated
        except CloisterError:
            return False
        if (bound.dataset, bound.path, file.size) != (self._dataset, path, size):
            return False
        self._entries[path] = entry
        return True

    def note(self, path: str, *, size: int, modified_ns: int) -> None:
        """Remember what the source of a finished file looked like, for a run that has to go on."""
        try:
            self._journal.note(Done(path, size, modified_ns))
        except OSError as error:
            raise file_error(error, what=f"cannot seal into {self.path}") from error

    @contextmanager
    def open(
        self, path: str, *, schema_version: int = 1, segment_size: int | None = None, workers: int = 0
    ) -> Iterator[SealedWriter]:
        """Open a file for writing; it becomes part of the directory when the block ends without an exception.

        `workers` threads write it when it is large; 0 is one for each core.
        """
        argument(check_path, path)
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
            workers=workers,
            durable_name=False,  # finish syncs every folder
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
        manifest = bare.signed(self._data_key.secret, self._signing_key)
        data = manifest.to_bytes()
        # What does not parse could never be opened: better to fail here.
        Manifest.parse(data, name=str(self.path / MANIFEST_NAME))
        try:
            for path in self._done.keys() - self._entries.keys():
                # Of an interrupted run over other sources.
                (self.path / (path + SUFFIX)).unlink(missing_ok=True)
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

    def _clear(self) -> None:
        """Remove what an interrupted run left and the journal does not vouch for."""
        for name, _ in list(walk(self.path)):
            if is_partial(name.rpartition("/")[2]) or (
                name.endswith(SUFFIX) and name.removesuffix(SUFFIX) not in self._done
            ):
                (self.path / name).unlink()


def _lock(out: Path) -> int:
    """Lock a directory for writing: an empty one, or one that an interrupted writer left. Return the lock."""
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


def argument(check: Callable[[str], None], value: str) -> None:
    """Turn the ValueError of a check into the error for whoever named the value."""
    try:
        check(value)
    except ValueError as error:
        raise unusable(f"cannot seal {value!r}", str(error)) from None


def unusable(what: str, why: str) -> CloisterError:
    """Return the error for what cannot be sealed as it is."""
    return CloisterError(
        Code.ARGUMENT_INVALID, what=what, why=why, todo="change the name or the file, or leave it out, and try again"
    )
