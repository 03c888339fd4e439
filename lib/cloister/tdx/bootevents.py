# SPDX-License-Identifier: Apache-2.0
"""What the events of a log are called: types by their names, and the name that an event's own data gives it. Pure.

Source: TCG PC Client Platform Firmware Profile 1.06, 10.4.1 (types), 10.2 (data). A register holds digests and their
order, and nothing else: type and data of a boot event are what the log says. They are proven where the digest is one
over the data, as for the types of `DIGEST_OVER_DATA`, and for our own runtime events, whose digest covers the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from cloister.tdx.eventlog import RUNTIME_EVENT_TYPE, Event

RUNTIME: Final = "runtime"  # of our own runtime events
EVENT_TYPES: Final[Mapping[str, int]] = {
    "EV_PREBOOT_CERT": 0x00000000,
    "EV_POST_CODE": 0x00000001,
    "EV_SEPARATOR": 0x00000004,
    "EV_ACTION": 0x00000005,
    "EV_EVENT_TAG": 0x00000006,
    "EV_S_CRTM_CONTENTS": 0x00000007,
    "EV_S_CRTM_VERSION": 0x00000008,
    "EV_CPU_MICROCODE": 0x00000009,
    "EV_PLATFORM_CONFIG_FLAGS": 0x0000000A,
    "EV_TABLE_OF_DEVICES": 0x0000000B,
    "EV_COMPACT_HASH": 0x0000000C,
    "EV_IPL": 0x0000000D,
    "EV_IPL_PARTITION_DATA": 0x0000000E,
    "EV_NONHOST_CODE": 0x0000000F,
    "EV_NONHOST_CONFIG": 0x00000010,
    "EV_NONHOST_INFO": 0x00000011,
    "EV_OMIT_BOOT_DEVICE_EVENTS": 0x00000012,
    "EV_POST_CODE2": 0x00000013,
    "EV_EFI_VARIABLE_DRIVER_CONFIG": 0x80000001,
    "EV_EFI_VARIABLE_BOOT": 0x80000002,
    "EV_EFI_BOOT_SERVICES_APPLICATION": 0x80000003,
    "EV_EFI_BOOT_SERVICES_DRIVER": 0x80000004,
    "EV_EFI_RUNTIME_SERVICES_DRIVER": 0x80000005,
    "EV_EFI_GPT_EVENT": 0x80000006,
    "EV_EFI_ACTION": 0x80000007,
    "EV_EFI_PLATFORM_FIRMWARE_BLOB": 0x80000008,
    "EV_EFI_HANDOFF_TABLES": 0x80000009,
    "EV_EFI_PLATFORM_FIRMWARE_BLOB2": 0x8000000A,
    "EV_EFI_HANDOFF_TABLES2": 0x8000000B,
    "EV_EFI_VARIABLE_BOOT2": 0x8000000C,
    "EV_EFI_GPT_EVENT2": 0x8000000D,
    "EV_EFI_HCRTM_EVENT": 0x80000010,
    "EV_EFI_VARIABLE_AUTHORITY": 0x800000E0,
    "EV_EFI_SPDM_FIRMWARE_BLOB": 0x800000E1,
    "EV_EFI_SPDM_FIRMWARE_CONFIG": 0x800000E2,
    "EV_EFI_SPDM_DEVICE_POLICY": 0x800000E3,
    "EV_EFI_SPDM_DEVICE_AUTHORITY": 0x800000E4,
    RUNTIME: RUNTIME_EVENT_TYPE,
}
MAX_NAME: Final = 128  # characters
_NAMES: Final = {number: name for name, number in EVENT_TYPES.items()}
_VARIABLES: Final = frozenset(number for name, number in EVENT_TYPES.items() if name.startswith("EV_EFI_VARIABLE_"))
_TEXTS: Final = frozenset(EVENT_TYPES[name] for name in ("EV_ACTION", "EV_IPL", "EV_EFI_ACTION"))
_TAGGED: Final = EVENT_TYPES["EV_EVENT_TAG"]
_GUID_SIZE: Final = 16
_PRINTABLE: Final = re.compile(rb"[ -~]{1,128}")


def type_name(event_type: int) -> str:
    """Return the name of a type, or its number such as "0x0000002a"."""
    return _NAMES.get(event_type, f"{event_type:#010x}")


def event_name(event: Event) -> str:
    """Return what an event is about: the name of a runtime event or an EFI variable, a text; empty when it has none."""
    if event.name:
        return event.name
    if event.event_type in _VARIABLES:
        return _variable(event.payload)
    if event.event_type in _TEXTS:
        return _text(event.payload)
    if event.event_type == _TAGGED:  # u32 tag, u32 size, data
        return _text(event.payload[8:])
    return ""


def _variable(data: bytes) -> str:
    """Read the name out of UEFI_VARIABLE_DATA: GUID, u64 length of name, u64 size of data, name in UTF-16, data."""
    length = int.from_bytes(data[_GUID_SIZE : _GUID_SIZE + 8], "little")
    start = _GUID_SIZE + 16
    if not 0 < length <= MAX_NAME or len(data) < start + 2 * length:
        return ""
    try:
        return _text(data[start : start + 2 * length].decode("utf-16-le").encode("ascii"))
    except UnicodeError:
        return ""


def _text(data: bytes) -> str:
    """Return printable text up to the first NUL; nothing when it is none, or too long to be a name."""
    text, _, _ = data.partition(b"\0")
    return text.decode("ascii") if _PRINTABLE.fullmatch(text) else ""
