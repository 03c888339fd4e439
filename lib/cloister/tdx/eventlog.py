# SPDX-License-Identifier: Apache-2.0
"""Event logs: what was extended into RTMR0..3, in order.

JSON form, one list of objects with exactly these five members:

    {"imr": 3, "event_type": 134217729, "digest": "<96 hex>", "event": "cloister.workload.script",
     "event_payload": "<hex>"}

A log proves nothing by itself: it is what the verifier replays to see whether it gives the quoted registers. Most boot
events (RTMR0..2) carry digests over data that is not in the log. Runtime events carry their data, as do boot events of
the types in `DIGEST_OVER_DATA` (unless it was left out), and their digest is recomputed here, so that a name or payload
cannot differ from what was extended.
"""

from __future__ import annotations

import hmac
import json
import re
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from cloister.tlv import sha384

RUNTIME_EVENT_TYPE: Final = 0x08000001
RUNTIME_IMR: Final = 3
REGISTERS: Final = 4
DIGEST_SIZE: Final = 48
# TCG PC Client Platform Firmware Profile, 10.4.1: events whose digest is over the data in the log.
DIGEST_OVER_DATA: Final = {
    0x00000004: "EV_SEPARATOR",
    0x80000001: "EV_EFI_VARIABLE_DRIVER_CONFIG",
    0x80000006: "EV_EFI_GPT_EVENT",
    0x80000007: "EV_EFI_ACTION",
    0x800000E0: "EV_EFI_VARIABLE_AUTHORITY",
}
EV_NO_ACTION: Final = 3  # TCG PC Client Platform Firmware Profile, 10.4.1: never extended

MAX_LOG_SIZE: Final = 1024 * 1024  # bytes; real logs have 20 KB
MAX_EVENTS: Final = 4096  # real logs have about 30
MAX_PAYLOAD_SIZE: Final = 64 * 1024  # bytes; ACPI tables and command lines fit

_MEMBERS: Final = frozenset({"imr", "event_type", "digest", "event", "event_payload"})
_RUNTIME_NAME: Final = re.compile(r"[a-z0-9.-]{1,64}")
_BOOT_NAME: Final = re.compile(r"[ -~]{0,128}")
_DIGEST_HEX: Final = re.compile(r"[0-9a-f]{96}")
_PAYLOAD_HEX: Final = re.compile(r"(?:[0-9a-f]{2})*")


class EventLogRejected(Exception):
    """An event log that is malformed or inconsistent; the only error this module raises about one."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason  # public text


@dataclass(frozen=True, slots=True)
class Event:
    """One extension of one register. A runtime event whose digest is not its own does not exist."""

    imr: int  # 0 to 3: RTMR of that number
    event_type: int
    name: str
    payload: bytes
    digest: bytes  # 48 bytes: what the register was extended with

    def __post_init__(self) -> None:
        if not 0 <= self.imr < REGISTERS:
            _reject(f"there is no register {self.imr}")
        if not 0 <= self.event_type < 2**32:
            _reject(f"event type {self.event_type} is not a 32-bit number")
        if self.event_type == EV_NO_ACTION:
            _reject("an EV_NO_ACTION event is never extended and has no place in a log of extensions")
        if len(self.digest) != DIGEST_SIZE:
            _reject(f"a digest of {len(self.digest)} bytes; SHA-384 has {DIGEST_SIZE}")
        if len(self.payload) > MAX_PAYLOAD_SIZE:
            _reject(f"a payload of {len(self.payload)} bytes; at most {MAX_PAYLOAD_SIZE}")
        if self.event_type != RUNTIME_EVENT_TYPE:
            if not _BOOT_NAME.fullmatch(self.name):
                _reject("the name of a boot event is not up to 128 printable ASCII characters")
            kind = DIGEST_OVER_DATA.get(self.event_type)
            if kind is not None and self.payload and not hmac.compare_digest(self.digest, sha384(self.payload)):
                _reject(f"the digest of an {kind} event is not over its data")
            return
        if self.imr != RUNTIME_IMR:
            _reject(f"a runtime event in register {self.imr}; they go into {RUNTIME_IMR}")
        if not hmac.compare_digest(self.digest, _runtime_digest(self.name, self.payload)):
            _reject(f"the digest of event {self.name} is not over its name and payload")

    @classmethod
    def runtime(cls, name: str, payload: bytes) -> Event:
        """Make an event of our own; its digest is what goes into RTMR3."""
        return cls(RUNTIME_IMR, RUNTIME_EVENT_TYPE, name, payload, _runtime_digest(name, payload))


@dataclass(frozen=True, slots=True)
class EventLog:
    """Events in the order in which they were extended."""

    events: tuple[Event, ...] = ()

    def __post_init__(self) -> None:
        if len(self.events) > MAX_EVENTS:
            _reject(f"{len(self.events)} events; at most {MAX_EVENTS}")

    @classmethod
    def parse(cls, data: bytes) -> EventLog:
        """Parse the JSON form, at most 1 MiB; raise EventLogRejected for anything else."""
        if len(data) > MAX_LOG_SIZE:
            _reject(f"an event log of {len(data)} bytes; at most {MAX_LOG_SIZE}")
        try:
            entries = json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_constant)
        except (ValueError, RecursionError):
            raise EventLogRejected("the event log is not strict UTF-8 JSON") from None
        if not isinstance(entries, list):
            _reject("the event log is not a list of events")
        if len(entries) > MAX_EVENTS:
            _reject(f"{len(entries)} events; at most {MAX_EVENTS}")
        return cls(tuple(_event(number, entry) for number, entry in enumerate(entries)))

    def to_json(self) -> bytes:
        """Return the JSON form: one line, members in the order of the format."""
        entries = [
            {
                "imr": event.imr,
                "event_type": event.event_type,
                "digest": event.digest.hex(),
                "event": event.name,
                "event_payload": event.payload.hex(),
            }
            for event in self.events
        ]
        return json.dumps(entries, separators=(",", ":")).encode()

    def replay(self) -> tuple[bytes, bytes, bytes, bytes]:
        """Return the registers that these events give: each starts at zero, new = SHA-384(old || digest)."""
        registers = [bytes(DIGEST_SIZE)] * REGISTERS
        for event in self.events:
            registers[event.imr] = sha384(registers[event.imr], event.digest)
        r0, r1, r2, r3 = registers
        return r0, r1, r2, r3

    def appended(self, event: Event) -> EventLog:
        """Return the log with one more event at its end."""
        return EventLog((*self.events, event))

    def of(self, imr: int) -> tuple[Event, ...]:
        """Return the events of one register, in order."""
        return tuple(event for event in self.events if event.imr == imr)


def _runtime_digest(name: str, payload: bytes) -> bytes:
    """Return SHA-384(u32le type ":" name ":" payload), as dstack does; a name holds no colon."""
    if not _RUNTIME_NAME.fullmatch(name):
        _reject("the name of a runtime event is not 1 to 64 of a-z, 0-9, dot and hyphen")
    return sha384(RUNTIME_EVENT_TYPE.to_bytes(4, "little"), b":", name.encode(), b":", payload)


def _event(number: int, entry: Any) -> Event:
    if not isinstance(entry, dict) or entry.keys() != _MEMBERS:
        _reject(f"event {number} is not an object of exactly {', '.join(sorted(_MEMBERS))}")
    imr, event_type, name = entry["imr"], entry["event_type"], entry["event"]
    # bool is an int in Python and true is not a number in JSON.
    if type(imr) is not int or type(event_type) is not int or not isinstance(name, str):
        _reject(f"event {number} has a member of the wrong type")
    digest, payload = entry["digest"], entry["event_payload"]
    if not isinstance(digest, str) or not _DIGEST_HEX.fullmatch(digest):
        _reject(f"event {number}: the digest is not 96 lower-case hex digits")
    if not isinstance(payload, str) or not _PAYLOAD_HEX.fullmatch(payload):
        _reject(f"event {number}: the payload is not lower-case hex")
    try:
        return Event(imr, event_type, name, bytes.fromhex(payload), bytes.fromhex(digest))
    except EventLogRejected as error:
        raise EventLogRejected(f"event {number}: {error.reason}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _constant(text: str) -> NoReturn:
    raise ValueError(text)


def _reject(reason: str) -> NoReturn:
    raise EventLogRejected(reason)
