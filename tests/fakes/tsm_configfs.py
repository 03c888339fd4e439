# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the kernel of a TDX TD: configfs-tsm, tsm-mr, ACPI tables and boot id, with the kernel's semantics.

It takes the place of `KernelFiles`, not of a mounted file system: a plain directory cannot generate a quote when a
file is read, and FUSE needs privileges. What is behind those five operations follows the kernel's sources
(drivers/virt/coco/guest/report.c and tsm-mr.c, fs/configfs/file.c): a write to `inblob` takes effect at close and
hides its result, `generation` counts writes, `outblob` is generated at the first read after a write and cached, items
are made by mkdir and cannot be found otherwise. `OsFiles` has tests of its own on ordinary files.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cloister.guest.providers.kernel import Kernel
from cloister.tdx.eventlog import EventLog
from cloister.tlv import sha384
from cloister_sim import SimulatedTd

BOOT_ID = "8b1e1d4a-6c5f-4f0e-9a53-1b7c2d3e4f50"
REPORTS = Path("/sys/kernel/config/tsm/report")
MEASUREMENTS = Path("/sys/devices/virtual/misc/tdx_guest/measurements")
ACPI = Path("/sys/firmware/acpi/tables")
ULONG = 2**64


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass
class Item:
    """One directory below tsm/report."""

    generation: int = 0
    read_generation: int = 0
    inblob: bytes = b""
    outblob: bytes | None = None


@dataclass
class FakeKernel:
    """`KernelFiles` over a simulated TD. The hooks are how tests make it misbehave, each in one named way."""

    td: SimulatedTd
    provider: str = "tdx_guest"
    registered: bool = True  # is there an attestation driver?
    mounted: bool = True  # are configfs and its tsm directory there?
    measurements: bool = True  # Linux 6.16?
    boot_id: str = BOOT_ID
    max_inblob: int = 64
    refuse_writes: bool = False  # a write to inblob fails at close, where nobody sees it
    outblob_errors: list[int] = field(default_factory=list)  # numbers that the next reads of outblob end with
    forged_quote: Callable[[bytes], bytes] | None = None  # report data -> what the host answers with
    before_read: Callable[[Item], None] | None = None  # somebody else's move between our write and our read
    frozen_register: bool = False  # a write to an RTMR is taken and does nothing
    register_error: int = 0
    register_size: int = 48
    on_extend: Callable[[], None] | None = None
    ccel: bytes | None = None
    items: dict[str, Item] = field(default_factory=dict)
    made: int = 0
    reads: int = 0

    def kernel(self, **changes: object) -> Kernel:
        return Kernel(files=self, **changes)  # type: ignore[arg-type]

    def make_directory(self, path: Path) -> None:
        if path.parent != REPORTS or not self.mounted:
            raise os_error(errno.ENOENT)
        if not self.registered:
            raise os_error(errno.ENXIO)
        if path.name in self.items:
            raise os_error(errno.EEXIST)
        self.items[path.name] = Item()
        self.made += 1

    def remove_directory(self, path: Path) -> None:
        if self.items.pop(path.name, None) is None:
            raise os_error(errno.ENOENT)

    def read(self, path: Path, limit: int) -> bytes:
        data = self._read(path)
        if len(data) > limit:
            raise os_error(errno.EFBIG)
        return data

    def write(self, path: Path, data: bytes) -> None:
        if path.parent == MEASUREMENTS:
            self._extend(path, data)
            return
        item = self._item(path)
        if path.name != "inblob":
            raise os_error(errno.EACCES)
        if len(data) > self.max_inblob:
            raise os_error(errno.EFBIG)
        # From here on it is close(), whose result the kernel drops.
        if self.refuse_writes or (item.generation + 1) % ULONG == item.read_generation:
            return
        item.generation = (item.generation + 1) % ULONG
        item.inblob = data

    def _read(self, path: Path) -> bytes:
        if path == Kernel().boot_id:
            return f"{self.boot_id}\n".encode()
        if path.is_relative_to(ACPI):
            return self._acpi(path)
        if path.parent == MEASUREMENTS:
            return self._register(path)
        item = self._item(path)
        match path.name:
            case "provider":
                return f"{self.provider}\n".encode()
            case "generation":
                return f"{item.generation}\n".encode()
            case "outblob":
                return self._outblob(item)
            case "inblob":
                raise os_error(errno.EACCES)
        raise os_error(errno.ENOENT)

    def _item(self, path: Path) -> Item:
        if path.parent.parent != REPORTS or path.parent.name not in self.items:
            raise os_error(errno.ENOENT)
        return self.items[path.parent.name]

    def _outblob(self, item: Item) -> bytes:
        self.reads += 1
        if self.before_read is not None:
            self.before_read(item)
        if not item.inblob:
            raise os_error(errno.EINVAL)
        if item.outblob is not None and item.read_generation == item.generation:
            return item.outblob
        if len(item.inblob) != 64:
            raise os_error(errno.EINVAL)
        if self.outblob_errors:
            raise os_error(self.outblob_errors.pop(0))
        make = self.forged_quote or self.td.quote
        item.outblob = make(item.inblob)
        item.read_generation = item.generation
        return item.outblob

    def _register(self, path: Path) -> bytes:
        if not self.measurements:
            raise os_error(errno.ENOENT)
        return self.td.report(bytes(64)).rtmrs[self._index(path)].ljust(self.register_size, b"\0")[: self.register_size]

    def _extend(self, path: Path, data: bytes) -> None:
        index = self._index(path)
        if index not in (2, 3):
            raise os_error(errno.EACCES)
        if len(data) != 48:
            raise os_error(errno.EINVAL)
        if self.register_error:
            raise os_error(self.register_error)
        if not self.frozen_register:
            self.td.extend(index, data)
        if self.on_extend is not None:
            self.on_extend()

    @staticmethod
    def _index(path: Path) -> int:
        names = [f"rtmr{index}:sha384" for index in range(4)]
        if path.name not in names:
            raise os_error(errno.ENOENT)
        return names.index(path.name)

    def _acpi(self, path: Path) -> bytes:
        area = self.ccel if self.ccel is not None else ccel_area(EventLog.parse(self.td.boot_log))
        if path == ACPI / "CCEL":
            return ccel_table(len(area))
        if path == ACPI / "data" / "CCEL":
            return area
        raise os_error(errno.ENOENT)


def ccel_table(length: int, *, kind: int = 2, signature: bytes = b"CCEL") -> bytes:
    """Return an ACPI table CCEL that names a log of this length."""
    table = struct.pack("<4sIBB26sBBHQQ", signature, 56, 1, 0, b"CLSTR FAKE".ljust(26), kind, 0, 0, length, 0x7F000000)
    checksum = -sum(table) % 256
    return table[:9] + bytes([checksum]) + table[10:]


def ccel_area(log: EventLog, size: int = 4096) -> bytes:
    """Return a TCG2 crypto-agile log (SHA-384 alone) of these events in memory of `size` bytes."""
    spec = b"Spec ID Event03\0" + struct.pack("<IBBBBIHHB", 0, 0, 2, 0, 2, 1, 12, 48, 0)
    parts = [struct.pack("<II20sI", 1, 3, bytes(20), len(spec)) + spec]
    for event in log.events:
        assert sha384(event.payload) == event.digest
        parts.append(
            struct.pack("<IIIH", event.imr + 1, event.event_type, 1, 12)
            + event.digest
            + struct.pack("<I", len(event.payload))
            + event.payload
        )
    data = b"".join(parts)
    assert len(data) <= size
    return data.ljust(size, b"\xff")
