# SPDX-License-Identifier: Apache-2.0
"""The kernel's files for a TD: where they are, and the few operations that are made on them.

Attribute files of configfs and sysfs are not ordinary files: one `write` is one operation, and a configfs binary
attribute takes effect when it is closed, its result unseen. `KernelFiles` is exactly what is needed of them, so that a
stand-in with the kernel's semantics can take its place where there is no TDX.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

# (file descriptor, request, buffer changed in place) -> result; raises OSError. The shape of fcntl.ioctl.
Ioctl = Callable[[int, int, bytearray], int]


class KernelFiles(Protocol):
    """Operations on attribute files. All raise OSError with the kernel's number."""

    def make_directory(self, path: Path) -> None: ...

    def remove_directory(self, path: Path) -> None: ...

    def read(self, path: Path, limit: int) -> bytes:
        """Return the whole file; OSError(EFBIG) when it has more than `limit` bytes."""

    def write(self, path: Path, data: bytes) -> None:
        """Open, write everything at offset 0 in one call, close."""


class OsFiles:
    """The real ones."""

    def make_directory(self, path: Path) -> None:
        path.mkdir()

    def remove_directory(self, path: Path) -> None:
        path.rmdir()

    def read(self, path: Path, limit: int) -> bytes:
        data = bytearray()
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while len(data) <= limit and (part := os.read(descriptor, limit + 1 - len(data))):
                data += part
        finally:
            os.close(descriptor)
        if len(data) > limit:
            raise OSError(errno.EFBIG, f"more than {limit} bytes")
        return bytes(data)

    def write(self, path: Path, data: bytes) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, f"{written} of {len(data)} bytes were taken")


def _ioctl(descriptor: int, request: int, buffer: bytearray) -> int:
    result: int = fcntl.ioctl(descriptor, request, buffer, True)
    return result


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """Where Linux shows a TD its platform. The defaults are right in every TD."""

    reports: Path = Path("/sys/kernel/config/tsm/report")  # configfs-tsm, Linux 6.7
    measurements: Path = Path("/sys/devices/virtual/misc/tdx_guest/measurements")  # tsm-mr, Linux 6.16
    device: Path = Path("/dev/tdx_guest")  # Linux 6.2
    acpi: Path = Path("/sys/firmware/acpi/tables")
    boot_id: Path = Path("/proc/sys/kernel/random/boot_id")
    files: KernelFiles = field(default_factory=OsFiles)
    ioctl: Ioctl = _ioctl
