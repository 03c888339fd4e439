# SPDX-License-Identifier: Apache-2.0
"""Where plaintext may be written: memory, and nothing that keeps it."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from cloister.atomicfile import file_error
from cloister.errors import CloisterError, Code

_F_GET_SEALS: Final = 1034  # linux/fcntl.h; only files of tmpfs, memfd and hugetlbfs have seals


def in_memory(descriptor: int) -> bool:
    """Say whether an open file lives in memory: on tmpfs, or made by memfd_create.

    Asks the file itself, so no mount table has to be believed. Its pages can still be swapped where there is swap.
    """
    try:
        fcntl.fcntl(descriptor, _F_GET_SEALS)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


@contextmanager
def plaintext_file(target: str | os.PathLike[str]) -> Iterator[io.FileIO]:
    """Open a file for plaintext, empty; raise CloisterError(PLAINTEXT_REFUSED) before a byte goes anywhere but memory.

    A file that was made for nothing is removed again.
    """
    place = Path(target)
    try:
        made = not place.exists()
        with io.FileIO(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb") as file:
            if not in_memory(file.fileno()):
                if made:
                    place.unlink()
                raise refused(str(place))
            file.truncate(0)
            yield file
    except OSError as error:
        raise file_error(error, what=f"cannot write {place}") from error


def check_plaintext_target(target: Any) -> None:
    """Raise CloisterError(PLAINTEXT_REFUSED) unless an open file object is in memory."""
    if isinstance(target, io.BytesIO):
        return
    try:
        if in_memory(target.fileno()):
            return
    except (AttributeError, OSError):
        pass  # no file of this machine: who knows where it goes
    raise refused(str(getattr(target, "name", "this file object")))


def refused(name: str) -> CloisterError:
    """Return the error for a place that would keep plaintext."""
    return CloisterError(
        Code.PLAINTEXT_REFUSED,
        what=f"plaintext is not written to {name}",
        why="it is neither on tmpfs nor a memfd: what reaches a disk stays there in the clear",
        todo="read it where it is (streaming=True for Hugging Face data sets), write to tmpfs such as /dev/shm, "
        "or open the data for good on your own machine with: cloister open",
    )
