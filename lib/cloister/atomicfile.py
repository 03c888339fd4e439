# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole under their name, or not at all.

The bytes go to a temporary name in the same directory, are synced, and are renamed over the old file; then the
directory is synced. Until the rename the old file is untouched, whatever ends the process or fills the disk.
"""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from cloister.errors import CloisterError, Code

# What a killed writer leaves behind has this form; it does not hold the final name, which may be as long as names get.
PARTIAL_PREFIX: Final = ".cloister-"
PARTIAL_SUFFIX: Final = ".partial"

# EFBIG is what RLIMIT_FSIZE and file systems with small files give.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def is_partial(name: str) -> bool:
    """Say whether a file name is one that an unfinished write leaves behind."""
    return name.startswith(PARTIAL_PREFIX) and name.endswith(PARTIAL_SUFFIX)


def file_error(error: OSError, *, what: str) -> CloisterError:
    """Translate what the operating system said; `what` says what was being done, and names the file."""
    why = error.strerror or type(error).__name__
    if error.errno in _FULL:
        return CloisterError(
            Code.DISK_FULL,
            what=what,
            why=f"{why}; what was there before is unchanged",
            todo="free some space, or write to another disk, and try again",
        )
    if isinstance(error, FileNotFoundError):
        return CloisterError(Code.FILE_NOT_FOUND, what=what, why=why, todo="check the path")
    return CloisterError(Code.IO_FAILED, what=what, why=why, todo="check the path, its permissions and the disk")


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems have no fsync for directories and say so with EINVAL.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


class AtomicFile:
    """A file being written; `commit` puts it in place, `discard` (or an exception in the block) drops it.

    Any OSError becomes a CloisterError, and the first one sticks: callers such as torch hide a failed write and go
    on, so every later call raises it again.
    """

    def __init__(self, path: Path, *, mode: int = 0o600, durable_name: bool = True) -> None:
        """`durable_name`: sync the directory, too; otherwise the caller does, once for many files."""
        self.path = path
        self._durable_name = durable_name
        self._temporary = path.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
        self._failed: CloisterError | None = None
        self._descriptor = -1
        try:
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            os.fchmod(self._descriptor, mode)  # whatever the umask says
        except OSError as error:
            raise self._error(error) from error

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write all of the bytes."""
        if self._failed:
            raise self._failed
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            self._failed = self._error(error)
            raise self._failed from error
        return size

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of the bytes at an offset; several threads may do so at once. Leaves the position of `write`."""
        if self._failed:
            raise self._failed
        try:
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            self._failed = self._error(error)
            raise self._failed from error

    def fileno(self) -> int:
        """Return the open file, for whoever writes to it by offset."""
        return self._descriptor

    def seek(self, offset: int) -> None:
        """Let `write` go on at this offset, behind what `write_at` wrote."""
        os.lseek(self._descriptor, offset, os.SEEK_SET)

    def commit(self) -> None:
        """Sync, rename over the old file and (unless the caller does) sync the directory."""
        if self._failed:
            raise self._failed
        try:
            os.fsync(self._descriptor)
            self._close()
            self._temporary.replace(self.path)
            if self._durable_name:
                sync_directory(self.path.parent)
        except OSError as error:
            self._failed = self._error(error)
            self.discard()
            raise self._failed from error

    def discard(self) -> None:
        """Drop what was written; what stood under the name before stays. Does nothing after `commit`."""
        if self._descriptor >= 0:
            self._close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._failed is None:
            self.commit()
        else:
            self.discard()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _error(self, error: OSError) -> CloisterError:
        return file_error(error, what=f"cannot write {self.path}")


def write_atomically(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Replace a file's content; on any failure raise CloisterError and leave the old content whole."""
    with AtomicFile(path, mode=mode) as file:
        file.write(data)


def write_new(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Make a file, whole or not at all; raise CloisterError(FILE_EXISTS) when there is one of this name."""
    unfinished = path.parent / f"{PARTIAL_PREFIX}{secrets.token_hex(8)}{PARTIAL_SUFFIX}"
    write_atomically(unfinished, data, mode=mode)
    try:
        os.link(unfinished, path)  # unlike rename, link refuses an existing name
        sync_directory(path.parent)
    except FileExistsError:
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{path} is already there",
            why="it is made once and never replaced",
            todo="use it, or name another file",
        ) from None
    except OSError as error:
        raise file_error(error, what=f"cannot write {path}") from error
    finally:
        unfinished.unlink(missing_ok=True)
