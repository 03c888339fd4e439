# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or as they were before: temporary name, fsync, rename, fsync of the directory."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from cloister.errors import CloisterError, Code

# A quota and RLIMIT_FSIZE are, to the one who writes, a full disk.
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomically(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace the file's contents; after an error, or a crash at any point, the old file is whole.

    Raises CloisterError(DISK_FULL) or CloisterError(IO_FAILED).
    """
    with replacing(path, mode) as file:
        file.write(data)


@contextmanager
def replacing(path: Path, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Give a file to write that takes the place of `path` when the block ends, and leaves no trace when it fails."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            os.fchmod(file.fileno(), mode)  # whatever the umask says
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise io_error(path, error) from error
    finally:
        with suppress(OSError):  # gone after the rename
            temporary.unlink()


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def io_error(path: Path, error: OSError) -> CloisterError:
    """Return the error that says why `path` could not be written."""
    if error.errno in _FULL:
        return CloisterError(
            Code.DISK_FULL,
            what=f"{path} could not be written",
            why=f"{error.strerror}; what was there before is unchanged",
            todo="make room and try again",
        )
    return CloisterError(
        Code.IO_FAILED,
        what=f"{path} could not be written",
        why=error.strerror or str(error),
        todo="check the path and its permissions",
    )
