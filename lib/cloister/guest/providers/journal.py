# SPDX-License-Identifier: Apache-2.0
"""What this boot of the TD has extended so far, kept where it ends with the boot.

A register cannot be set back, so a workload that starts again in a running TD finds RTMR3 as its earlier process left
it. The journal tells "my earlier process" from anything else. It is a text file in a tmpfs that only root of the TD
can write:

    cloister-extensions-v1 <boot id>
    3 <96 hex digits>

It is written before the register (a line without its extension can be taken back, an extension without its line
cannot), and believed only as far as replaying it gives the present registers. One process holds it at a time.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Final, NoReturn

from cloister.guest.providers.base import failed, reason
from cloister.guest.providers.kernel import KernelFiles

_LABEL: Final = "cloister-extensions-v1"
_BOOT_ID: Final = re.compile(r"[0-9a-f-]{36}")
_LINE: Final = re.compile(r"([23]) ([0-9a-f]{96})")
_MAX_ENTRIES: Final = 4096  # as many as an event log has
_LINE_SIZE: Final = 2 + 96 + 1
_MAX_SIZE: Final = len(_LABEL) + 1 + 36 + 1 + _MAX_ENTRIES * _LINE_SIZE

Extension = tuple[int, bytes]  # register, digest


class Journal:
    """An open journal, locked until it is closed or the process ends. Not for several threads at once."""

    def __init__(self, path: Path, boot_id: str) -> None:
        """Open or begin it; one of another boot is begun anew. Raises CloisterError(QUOTE_PROVIDER_FAILED)."""
        self._path = path
        self._descriptor = -1
        try:
            # Closed on exec: a child that outlives this process must not hold the lock.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o600)
            self._require_own()
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._entries, self._size = self._read(boot_id)
        except OSError as error:
            self.close()
            if error.errno == errno.EWOULDBLOCK:
                self._fail("another process of this TD holds it", "start one workload per TD")
            self._fail(reason(error), "give a file in a directory of a tmpfs that exists, such as /run/cloister")
        except BaseException:
            self.close()
            raise

    @property
    def entries(self) -> tuple[Extension, ...]:
        return tuple(self._entries)

    def append(self, index: int, digest: bytes) -> None:
        """Record an extension that is about to be made."""
        if len(self._entries) >= _MAX_ENTRIES:
            self._fail(f"it has {_MAX_ENTRIES} lines", "start a new TD")
        self._write(f"{index} {digest.hex()}\n".encode("ascii"))
        self._entries.append((index, digest))

    def drop_last(self) -> None:
        """Take back an extension that was recorded and not made."""
        self._entries.pop()
        self._size -= _LINE_SIZE
        try:
            os.ftruncate(self._descriptor, self._size)
        except OSError as error:
            self._fail(reason(error), "look at the file system that it is on")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _require_own(self) -> None:
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            self._fail("it is not a file that only this user can write", "give a path that nothing else uses")

    def _read(self, boot_id: str) -> tuple[list[Extension], int]:
        data = os.pread(self._descriptor, _MAX_SIZE + 1, 0)
        if len(data) > _MAX_SIZE:
            self._fail(f"it has more than {_MAX_SIZE} bytes", "start a new TD")
        # What is behind the last line feed was being written when a process died: its extension was never made, and
        # the next line is written over it.
        whole = data.rpartition(b"\n")[0]
        header, *lines = whole.decode("ascii", "replace").split("\n")
        header_line = f"{_LABEL} {boot_id}"
        if header != header_line:
            label, _, other = header.partition(" ")
            if whole and (label != _LABEL or not _BOOT_ID.fullmatch(other)):
                self._fail("it is not a journal of extensions", "give a path that nothing else uses")
            os.ftruncate(self._descriptor, 0)
            self._size = 0
            self._write(f"{header_line}\n".encode("ascii"))
            return [], self._size
        found = [_LINE.fullmatch(line) for line in lines]
        return [(int(m[1]), bytes.fromhex(m[2])) if m else self._damaged() for m in found], len(whole) + 1

    def _damaged(self) -> NoReturn:
        self._fail("one of its lines is not <register> <digest>", "start a new TD; what was extended is not known")

    def _write(self, line: bytes) -> None:
        try:
            written = os.pwrite(self._descriptor, line, self._size)
        except OSError as error:
            self._fail(reason(error), "look at the file system that it is on")
        if written != len(line):
            self._fail("the file system is full", "make room on the file system that it is on")
        self._size += written

    def _fail(self, why: str, todo: str) -> NoReturn:
        raise failed(f"the journal of extensions {self._path} cannot be used", why=why, todo=todo) from None


def read_boot_id(path: Path, files: KernelFiles) -> str:
    """Return the id of this boot (random, made by the kernel)."""
    try:
        boot_id = files.read(path, 64).decode("ascii", "replace").strip()
    except OSError as error:
        boot_id = reason(error)
    if not _BOOT_ID.fullmatch(boot_id):
        raise failed(f"{path} gives no boot id", why=boot_id, todo="mount /proc in this TD")
    return boot_id
