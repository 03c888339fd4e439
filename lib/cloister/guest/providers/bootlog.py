# SPDX-License-Identifier: Apache-2.0
"""The boot event log of a TD: what firmware and boot loader extended into RTMR0..2 before Linux ran.

ACPI names it in the table CCEL (UEFI 2.10, 38.4; 56 bytes: ACPI header 36, type of TEE u8, subtype u8, reserved u16,
log length u64, log address u64, little-endian), and Linux shows the log itself under `data/CCEL`.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final, NoReturn

from cloister.guest.providers.base import failed, reason
from cloister.guest.providers.kernel import KernelFiles
from cloister.tdx.ccel import CcelEvent, CcelLog
from cloister.tdx.eventlog import MAX_PAYLOAD_SIZE, Event, EventLog, EventLogRejected

MAX_LOG_AREA: Final = 1024 * 1024  # bytes; firmware reserves 64 KiB to 1 MiB
_TABLE: Final = struct.Struct("<4sI28sBBHQQ")
_TDX: Final = 2


def read_boot_log(root: Path, files: KernelFiles) -> bytes:
    """Return the boot event log (JSON); raise CloisterError(QUOTE_PROVIDER_FAILED) when there is none to be had."""
    area = read_boot_log_area(root, files)
    try:
        log = EventLog(tuple(_event(event) for event in CcelLog.parse(area).events if event.register))
    except EventLogRejected as error:
        _fail(error.reason)
    return log.to_json()


def _event(event: CcelEvent) -> Event:
    """Return an event of RTMR0..3 (in ACPI's numbering 1..4; 0 is MRTD, which no log needs to explain)."""
    # The digest is what counts, and it need not be over the data. What is too long for our log is left out of it.
    payload = event.data if len(event.data) <= MAX_PAYLOAD_SIZE else b""
    return Event(event.register - 1, event.event_type, "", payload, event.digest)


def read_boot_log_area(root: Path, files: KernelFiles) -> bytes:
    """Return the log's memory (TCG2 crypto-agile events, then padding), at most MAX_LOG_AREA bytes.

    Raises CloisterError(QUOTE_PROVIDER_FAILED) when there is none.
    """
    try:
        table = files.read(root / "CCEL", _TABLE.size)
    except FileNotFoundError:
        _fail(f"{root / 'CCEL'} is not there: this is no TDX TD, or its firmware keeps no log of what it measures")
    except OSError as error:
        _fail(f"{root / 'CCEL'}: {reason(error)}")
    if len(table) != _TABLE.size:
        _fail(f"the table CCEL has {len(table)} bytes, not {_TABLE.size}")
    signature, size, _, kind, _, _, length, _ = _TABLE.unpack(table)
    if signature != b"CCEL" or size != _TABLE.size or sum(table) % 256:
        _fail("the table CCEL is damaged: signature, length or checksum are wrong")
    if kind != _TDX:
        _fail(f"the log is of a TEE of type {kind}, not TDX ({_TDX})")
    if not 0 < length <= MAX_LOG_AREA:
        _fail(f"the log has {length} bytes; at most {MAX_LOG_AREA}")
    try:
        area = files.read(root / "data" / "CCEL", length)
    except OSError as error:
        _fail(f"{root / 'data' / 'CCEL'}: {reason(error)}")
    if len(area) != length:
        _fail(f"the log has {len(area)} bytes where the table says {length}")
    return area


def _fail(why: str) -> NoReturn:
    raise failed(
        "the boot event log cannot be read",
        why=why,
        todo="boot a TD image with TDX-aware firmware (TDVF) and Linux 6.2 or later, and run as root",
    ) from None
