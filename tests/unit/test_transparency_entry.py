# SPDX-License-Identifier: Apache-2.0
"""What stands in the log reads back as it was written, and nothing else reads as an entry."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister.transparency.entry import Entry, EntryInvalid, LoggedEntry, Outline
from cloister.transparency.note import NoteKey
from cloister.transparency.start import Start
from fakes.log_material import ENTRIES, SALT, an_entry


@given(ENTRIES, st.integers(0, 2**40), st.integers(0, 2**42))
def test_an_entry_reads_back_as_it_was_written(entry: Entry, index: int, time_ms: int) -> None:
    data = entry.to_bytes(index=index, time_ms=time_ms, salt=SALT)
    assert LoggedEntry.parse(data) == LoggedEntry(index, time_ms, SALT, entry)
    assert LoggedEntry.parse(data).to_bytes() == data
    assert Outline.parse(data) == Outline.of(index, entry)


@given(ENTRIES, st.data())
def test_a_cut_or_changed_entry_is_another_entry_or_none(entry: Entry, data: st.DataObject) -> None:
    whole = entry.to_bytes(index=1, time_ms=2, salt=SALT)
    position = data.draw(st.integers(0, len(whole) - 1))
    for bad in (
        whole[:position],
        whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :],
        whole + b"\0",
    ):
        try:
            parsed = LoggedEntry.parse(bad)
        except EntryInvalid:
            continue
        assert parsed != LoggedEntry(1, 2, SALT, entry)
        assert parsed.to_bytes() == bad


RECEIPT = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
LOG = NoteKey.of("cloister.test/keybroker/1", Ed25519PrivateKey.from_private_bytes(b"\x02" * 32))
START = Start.make(
    log=LOG, broker_id="spiffe://cloister.test/service/keybroker", receipt=RECEIPT, size=5, root=SALT * 2
)


def logged(start: Start, index: int = 5) -> LoggedEntry:
    return LoggedEntry(index, 1, SALT, start.entry())


def test_a_start_names_the_log_and_the_receipt_key_that_vouches_for_it() -> None:
    read = Start.of(LoggedEntry.parse(logged(START).to_bytes()))
    assert read == START
    assert read.receipt_public == NoteKey.of("x", RECEIPT).public


@pytest.mark.parametrize(
    "change",
    [
        {"log": NoteKey("cloister.test/keybroker/2", LOG.public)},
        {"log": NoteKey(LOG.name, bytes(32))},
        {"broker_id": "spiffe://cloister.test/service/attest"},
        {"receipt_public": LOG.public},
        {"root": bytes(32)},
        {"root": bytes(31)},
        {"endorsement": bytes(64)},
        {"endorsement": b""},
    ],
)
def test_a_start_that_the_receipt_key_did_not_sign_is_none(change: dict[str, object]) -> None:
    with pytest.raises(EntryInvalid):
        Start.of(logged(dataclasses.replace(START, **change)))


def test_a_start_stands_where_its_receipt_key_saw_the_log_end() -> None:
    with pytest.raises(EntryInvalid):
        Start.of(logged(START, index=6))
    with pytest.raises(EntryInvalid):
        Start.of(LoggedEntry(5, 1, SALT, dataclasses.replace(START.entry(), action="release")))
    with pytest.raises(EntryInvalid):
        Start.of(LoggedEntry(5, 1, SALT, an_entry(detail=START.entry().detail)))
