# SPDX-License-Identifier: Apache-2.0
"""Claims about the firmware's event log: read exactly, bounded, and nothing hidden in it or behind it."""

from __future__ import annotations

import contextlib
import random
import struct

import pytest

from cloister.tdx.ccel import MAX_CCEL_EVENTS, MAX_CCEL_SIZE, CcelEvent, CcelLog
from cloister.tdx.eventlog import EventLogRejected
from cloister.tlv import sha384

SPEC = b"Spec ID Event03\0" + struct.pack("<IBBBBI", 0, 0, 2, 0, 2, 1) + struct.pack("<HH", 12, 48) + b"\0"
SEPARATOR, IPL, ACTION, NO_ACTION = 0x4, 0xD, 0x80000007, 0x3


def header(spec: bytes = SPEC, *, kind: int = NO_ACTION, digest: bytes = bytes(20)) -> bytes:
    return struct.pack("<II20sI", 1, kind, digest, len(spec)) + spec


def record(
    register: int, kind: int, data: bytes, *, digest: bytes | None = None, algorithm: int = 12, count: int = 1
) -> bytes:
    value = sha384(data) if digest is None else digest
    return struct.pack("<IIIH", register, kind, count, algorithm) + value + struct.pack("<I", len(data)) + data


LOG = header() + record(1, SEPARATOR, bytes(4)) + record(3, IPL, b"grub", digest=b"d" * 48) + record(3, ACTION, b"boot")


def rejected(data: bytes) -> str:
    with pytest.raises(EventLogRejected) as caught:
        CcelLog.parse(data)
    return caught.value.reason


@pytest.mark.parametrize("filling", [b"", b"\xff" * 4, b"\xff" * 1000, bytes(1000), bytes(5)])
def test_events_are_read_up_to_the_filling(filling: bytes) -> None:
    log = CcelLog.parse(LOG + filling)
    assert [(event.register, event.event_type) for event in log.events] == [(1, SEPARATOR), (3, IPL), (3, ACTION)]
    r0, r1, r2, r3 = log.replay()
    assert r0 == sha384(bytes(48), sha384(bytes(4)))
    assert r2 == sha384(sha384(bytes(48), b"d" * 48), sha384(b"boot"))
    assert (r1, r3) == (bytes(48), bytes(48))


def test_what_extends_nothing_is_left_out() -> None:
    log = CcelLog.parse(LOG + record(2, NO_ACTION, b"StartupLocality", digest=bytes(48)))
    assert log == CcelLog.parse(LOG)


def test_an_event_of_mrtd_changes_no_rtmr() -> None:
    assert CcelLog.parse(header() + record(0, IPL, b"firmware")).replay() == (bytes(48),) * 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut"),
        (bytes(32), "header"),
        (header(kind=SEPARATOR), "header"),
        (header(digest=b"\1" * 20), "header"),
        (header()[:-1], "header"),
        (header(b"Spec ID Event02\0" + SPEC[16:]), "Event03"),
        (header(SPEC[:24] + struct.pack("<I", 2) + SPEC[28:]), "SHA-384"),
        (header(SPEC[:28] + struct.pack("<HH", 11, 32) + b"\0"), "SHA-384"),
        (header(SPEC + b"x"), "vendor"),
        (header(SPEC[:32] + b"\5td"), "vendor"),
        (LOG[:-1], "data"),
        (LOG + b"\1\0\0\0", "cut"),
        (LOG + record(1, IPL, b"x")[:40], "cut"),
        (LOG + b"\xff" * 8 + b"\0" * 8, "behind"),
        (LOG + b"\xff" * 8 + record(1, IPL, b"x"), "behind"),
        (LOG + bytes(12) + record(1, IPL, b"x"), "digests"),
        (LOG + record(5, IPL, b"x"), "register"),
        (LOG + record(2**31, IPL, b"x"), "register"),
        (LOG + record(1, IPL, b"x", count=0), "digests"),
        (LOG + record(1, IPL, b"x", count=2), "digests"),
        (LOG + record(1, IPL, b"x", algorithm=11), "algorithm"),
        (LOG + record(1, SEPARATOR, b"x", digest=sha384(b"y")), "EV_SEPARATOR"),
        (LOG + record(2, ACTION, b"x", digest=bytes(48)), "EV_EFI_ACTION"),
        (bytes(MAX_CCEL_SIZE + 1), "at most"),
        (header() + record(1, IPL, b"") * (MAX_CCEL_EVENTS + 1), "more than"),
        (header() + record(1, IPL, bytes((1 << 20) + 1)), "data"),
    ],
)
def test_anything_else_is_refused(data: bytes, reason: str) -> None:
    assert reason in rejected(data)


def test_an_event_of_another_size_does_not_exist() -> None:
    with pytest.raises(EventLogRejected):
        CcelEvent(1, IPL, b"short", b"")


def test_mutated_logs_end_in_one_error() -> None:
    rng = random.Random(5)
    for _ in range(5_000):
        data = bytearray(LOG + b"\xff" * 16)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(EventLogRejected):
            CcelLog.parse(bytes(data)).replay()
