# SPDX-License-Identifier: Apache-2.0
"""What a store says about its root key: one encoding per record, and nothing else parses."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.recovery import ShareSet
from cloister.tlv import tlv
from cloister_keybroker.sealrecord import SealRecord, SealRecordInvalid, Source, Stretching

SHARES = ShareSet(2, (b"\x01" * 32, b"\x02" * 32, b"\x03" * 32))
RECORDS = [
    SealRecord(),
    SealRecord(shares=SHARES),
    SealRecord(stretching=Stretching(b"s" * 32)),
    SealRecord(stretching=Stretching(b"s" * 32, 64, 1, 1)),
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_reads_back_as_it_was_written(record: SealRecord) -> None:
    assert SealRecord.parse(record.to_bytes()) == record


def test_the_source_is_what_the_record_holds() -> None:
    assert [record.source for record in RECORDS[:3]] == [Source.FILE, Source.SHARES, Source.PASSPHRASE]
    with pytest.raises(ValueError, match="one source"):
        SealRecord(SHARES, Stretching(b"s" * 32))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        tlv("cloister-seal-file-v1", b""),
        tlv("cloister-seal-shares-v1", 1, b"\x01" * 32),
        tlv("cloister-seal-shares-v1", 3, b"\x01" * 32 + b"\x02" * 32),
        tlv("cloister-seal-shares-v1", 2, b"\x01" * 64),
        tlv("cloister-seal-shares-v1", 2, b"\x01" * 32 + b"\x02" * 31),
        tlv("cloister-seal-shares-v1", 2, bytes(range(256)) * 3),
        tlv("cloister-seal-passphrase-v1", b"s" * 31, 64, 1, 1),
        tlv("cloister-seal-passphrase-v1", b"s" * 32, 2**40, 1, 1),
        tlv("cloister-seal-passphrase-v1", b"s" * 32, 64, 2**32, 1),
        tlv("cloister-seal-passphrase-v1", b"s" * 32, 64, 0, 1),
        tlv("cloister-seal-passphrase-v1", b"s" * 32, 64, 1, 0),
        tlv("cloister-seal-passphrase-v1", b"s" * 32, 7, 1, 1),
        tlv("cloister-seal-passphrase-v1", b"s" * 32, b"\x40", 1, 1),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(SealRecordInvalid):
        SealRecord.parse(data)


@given(st.binary(max_size=200), st.sampled_from(RECORDS), st.integers(0, 200))
def test_noise_is_a_record_or_refused_and_never_both_ways(noise: bytes, record: SealRecord, at: int) -> None:
    good = record.to_bytes()
    for data in (noise, good[:at] + noise + good[at:], good[:at]):
        with contextlib.suppress(SealRecordInvalid):
            assert SealRecord.parse(data).to_bytes() == data
