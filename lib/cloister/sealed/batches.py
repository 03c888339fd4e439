# SPDX-License-Identifier: Apache-2.0
"""How much is moved at once, and how it gets in and out of files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from cloister.atomicfile import file_error
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

# Ciphertext goes to and comes from the file in pieces of about this size, whatever the segment size.
BATCH_SIZE: Final = 1024 * 1024
# Less than this is done by one thread: starting others would cost more than they save.
SPREAD_SIZE: Final = 4 * BATCH_SIZE

SHRUNK: Final = "it became shorter while it was read"


def batch(segment_size: int) -> int:
    """Return the bytes of ciphertext that are moved at once: whole segments, at least one."""
    return max(1, BATCH_SIZE // segment_size) * segment_size


def bytes_of(buffer: ReadableBuffer) -> memoryview:
    """Return a buffer as bytes."""
    view = memoryview(buffer)
    # An empty view cannot be cast.
    return view.cast("B") if view.nbytes else memoryview(b"")


def read_at(descriptor: int, offset: int, target: memoryview, *, name: str) -> memoryview:
    """Fill all of `target` from an offset of an open file and return it; several threads may do so at once.

    Raises CloisterError(IO_FAILED) that names the file.
    """
    rest = target
    try:
        while rest:
            count = os.preadv(descriptor, [rest], offset)
            if not count:
                raise CloisterError(
                    Code.IO_FAILED,
                    what=f"cannot read {name}",
                    why=SHRUNK,
                    todo="try again when nobody writes to it",
                )
            rest, offset = rest[count:], offset + count
    except OSError as error:
        raise file_error(error, what=f"cannot read {name}") from error
    return target


def write_at(descriptor: int, offset: int, data: memoryview, *, name: str) -> None:
    """Write all of the bytes at an offset of an open file; several threads may do so at once.

    Raises CloisterError that names what was being opened.
    """
    try:
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count
    except OSError as error:
        raise file_error(error, what=f"cannot write what was in {name}") from error
