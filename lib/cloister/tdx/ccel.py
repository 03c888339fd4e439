# SPDX-License-Identifier: Apache-2.0
"""The firmware's event log, ACPI table CCEL: TCG2 crypto-agile records <-> events, and their replay.

Source: TCG PC Client Platform Firmware Profile 1.06, 10.2; UEFI 2.10, 38 (confidential computing); little-endian.

    header  u32 index, u32 EV_NO_ACTION, SHA-1 digest 20 (zero), u32 size, "Spec ID Event03\\0" ...
    record  u32 measurement register, u32 type, u32 count, count x (u16 algorithm, digest), u32 size, data

The log lies in a larger area that is filled up with 0xff, or with zeros. Register 0 is MRTD, 1 to 4 are RTMR0 to RTMR3.
For some types of event the digest is one over the data in the log, and is recomputed here; for the others the data only
says what was measured.
"""

from __future__ import annotations

import hmac
import struct
from dataclasses import dataclass
from typing import Final, NoReturn

from cloister.tdx.eventlog import DIGEST_OVER_DATA, DIGEST_SIZE, EV_NO_ACTION, REGISTERS, EventLogRejected
from cloister.tlv import sha384

MAX_CCEL_SIZE: Final = 4 * 1024 * 1024  # bytes of area; real ones have 64 KiB to 1 MiB, mostly filling
MAX_CCEL_EVENTS: Final = 4096
MAX_EVENT_DATA: Final = 1024 * 1024  # bytes; key databases have 10 KB

_HEADER: Final = struct.Struct("<II20sI")
_RECORD: Final = struct.Struct("<III")
_U32: Final = struct.Struct("<I")
_ALGORITHM: Final = struct.Struct("<H")
_SPEC_ID: Final = b"Spec ID Event03\0"
_SHA384: Final = 12


@dataclass(frozen=True, slots=True)
class CcelEvent:
    """One record: what a register was extended with."""

    register: int  # 0: MRTD, 1 to 4: RTMR0 to RTMR3
    event_type: int
    digest: bytes  # 48 bytes
    data: bytes

    def __post_init__(self) -> None:
        if not 0 <= self.register <= REGISTERS:
            _reject(f"there is no measurement register {self.register}")
        if len(self.digest) != DIGEST_SIZE:
            _reject(f"a digest of {len(self.digest)} bytes; SHA-384 has {DIGEST_SIZE}")
        name = DIGEST_OVER_DATA.get(self.event_type)
        if name is not None and not hmac.compare_digest(self.digest, sha384(self.data)):
            _reject(f"the digest of an {name} event is not over its data")


@dataclass(frozen=True, slots=True)
class CcelLog:
    """The firmware's events, in order; EV_NO_ACTION is left out, because nothing is extended for it."""

    events: tuple[CcelEvent, ...]

    @classmethod
    def parse(cls, data: bytes) -> CcelLog:
        """Parse the table's data area; raise EventLogRejected for anything that is not one."""
        if len(data) > MAX_CCEL_SIZE:
            _reject(f"an event log of {len(data)} bytes; at most {MAX_CCEL_SIZE}")
        offset = _header(data)
        events: list[CcelEvent] = []
        records = 0
        while not _at_end(data, offset):
            records += 1
            if records > MAX_CCEL_EVENTS:
                _reject(f"more than {MAX_CCEL_EVENTS} events")
            event, offset = _record(data, offset)
            if event is not None:
                events.append(event)
        return cls(tuple(events))

    def replay(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return RTMR0 to RTMR3 as these events leave them: each starts at zero, new = SHA-384(old || digest)."""
        registers = [bytes(DIGEST_SIZE)] * (REGISTERS + 1)
        for event in self.events:
            registers[event.register] = sha384(registers[event.register], event.digest)
        _, r0, r1, r2, r3 = registers
        return r0, r1, r2, r3


def _header(data: bytes) -> int:
    """Read the first event, which says that SHA-384 is the one algorithm; return where the second one starts."""
    if len(data) < _HEADER.size:
        _reject("the event log is cut before its header")
    _, event_type, digest, size = _HEADER.unpack_from(data)
    end: int = _HEADER.size + size
    if event_type != EV_NO_ACTION or any(digest) or end > len(data):
        _reject("the event log does not begin with a TCG2 header")
    spec = data[_HEADER.size : end]
    # Signature 16, platform class u32, versions 3 x u8, size of uintn u8, number of algorithms u32.
    if not spec.startswith(_SPEC_ID) or len(spec) < 28:
        _reject("the event log is not a crypto-agile one (Spec ID Event03)")
    (count,) = _U32.unpack_from(spec, 24)
    # One algorithm: (u16 id, u16 size); then u8 size of vendor information, and that.
    if count != 1 or len(spec) < 33 or struct.unpack_from("<HH", spec, 28) != (_SHA384, DIGEST_SIZE):
        _reject("the event log has other digests than SHA-384")
    if len(spec) != 33 + spec[32]:
        _reject("the header's vendor information does not fill it")
    return end


def _at_end(data: bytes, offset: int) -> bool:
    """Say whether only filling is left: ones, or zeros, and nothing hidden behind."""
    rest = memoryview(data)[offset:]
    if not rest:
        return True
    if len(rest) >= 4 and bytes(rest[:4]) == b"\xff" * 4:
        if bytes(rest).strip(b"\xff"):
            _reject("there is something behind the end of the event log")
        return True
    # No event is eight zero bytes: type 0 (EV_PREBOOT_CERT) in MRTD is not extended by firmware.
    return not any(rest[:8]) and not any(rest)


def _record(data: bytes, offset: int) -> tuple[CcelEvent | None, int]:
    if offset + _RECORD.size > len(data):
        _reject("the event log is cut inside an event")
    register, event_type, count = _RECORD.unpack_from(data, offset)
    offset += _RECORD.size
    if count != 1:
        _reject(f"an event with {count} digests, not one")
    digest_end = offset + _ALGORITHM.size + DIGEST_SIZE
    if digest_end + _U32.size > len(data):
        _reject("the event log is cut inside an event")
    (algorithm,) = _ALGORITHM.unpack_from(data, offset)
    if algorithm != _SHA384:
        _reject(f"a digest of algorithm {algorithm}, not SHA-384")
    digest = data[offset + _ALGORITHM.size : digest_end]
    (size,) = _U32.unpack_from(data, digest_end)
    start = digest_end + _U32.size
    if size > MAX_EVENT_DATA or start + size > len(data):
        _reject(f"an event with {size} bytes of data, more than there are or may be")
    if event_type == EV_NO_ACTION:
        return None, start + size
    return CcelEvent(register, event_type, digest, data[start : start + size]), start + size


def _reject(reason: str) -> NoReturn:
    raise EventLogRejected(reason)
