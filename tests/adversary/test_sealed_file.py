# SPDX-License-Identifier: Apache-2.0
"""Whoever holds the storage changes a sealed file in every way there is: it is refused, by name."""

from __future__ import annotations

import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.sealed.format import AssociatedData, Header
from cloister.sealed.segments import STREAM_HEADER_SIZE
from cloister.sealed.stream import SealedReader
from fakes.sealed_material import content, data_key, opened, sealed_bytes

SEGMENT = 256
PLAIN = content(1500)  # six full segments and a shorter one


def split(sealed: bytes) -> tuple[Header, bytes]:
    """Return the header and the stream of a sealed file."""
    file = io.BytesIO(sealed)
    return Header.read(file), file.read()


def refused(sealed: bytes, *, key: str = "one") -> CloisterError:
    """Open and read to the end: it must be refused, with the file's name, and say what to do."""
    with pytest.raises(CloisterError) as caught:
        opened(sealed, key=data_key(key))
    assert caught.value.code is Code.SEALED_FILE_INVALID
    assert "train.tsv" in caught.value.what
    assert caught.value.why
    assert caught.value.todo
    return caught.value


def tried(sealed: bytes) -> bytes | Code:
    """Return the content, or the code of the refusal."""
    try:
        return opened(sealed)
    except CloisterError as error:
        return error.code


def test_an_unchanged_file_opens() -> None:
    assert opened(sealed_bytes(PLAIN, segment_size=SEGMENT)) == PLAIN


def test_no_byte_of_a_file_can_be_changed_unnoticed() -> None:
    sealed = sealed_bytes(PLAIN, segment_size=SEGMENT)
    header, _ = split(sealed)
    for position in range(len(sealed)):
        for bit in (0x01, 0x80):
            changed = bytearray(sealed)
            changed[position] ^= bit
            outcome = tried(bytes(changed))
            if outcome is not Code.SEALED_FILE_INVALID:
                # Only the part that a re-wrap may replace: of no use to a reader who already has the data key.
                assert outcome == PLAIN
                was = Header.read(io.BytesIO(changed))
                assert replace(was, key_version=header.key_version, wrapped=header.wrapped) == header, position


def test_a_file_cut_anywhere_is_refused() -> None:
    sealed = sealed_bytes(PLAIN, segment_size=SEGMENT)
    for length in range(len(sealed)):
        refused(sealed[:length])


def test_a_file_cut_between_two_segments_is_refused_at_opening() -> None:
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    for end in range(SEGMENT, len(stream), SEGMENT):
        with pytest.raises(CloisterError, match="does not authenticate"):
            SealedReader(io.BytesIO(header.to_bytes() + stream[:end]), data_key=data_key(), name="train.tsv")


@pytest.mark.parametrize("extra", [b"\0", b"x" * 15, b"x" * 16, b"x" * 17, b"x" * SEGMENT, b"x" * 3 * SEGMENT])
def test_an_extended_file_is_refused(extra: bytes) -> None:
    refused(sealed_bytes(PLAIN, segment_size=SEGMENT) + extra)
    refused(sealed_bytes(PLAIN[: SEGMENT - 56], segment_size=SEGMENT) + extra)


def test_an_empty_forgery_is_refused() -> None:
    """A reader that takes "no segments" for "no data" accepts this."""
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    for forged in (b"", stream[:STREAM_HEADER_SIZE], stream[:STREAM_HEADER_SIZE] + os.urandom(16)):
        refused(header.to_bytes() + forged)


def test_the_empty_file_itself_opens_and_cannot_be_grown() -> None:
    empty = sealed_bytes(b"", segment_size=SEGMENT)
    assert opened(empty) == b""
    header, stream = split(empty)
    _, other = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    refused(header.to_bytes() + stream + other[SEGMENT:])


def test_reordered_and_repeated_segments_are_refused() -> None:
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    parts = [stream[at : at + SEGMENT] for at in range(0, len(stream), SEGMENT)]
    orders = ([0, 2, 1, 3, 4, 5, 6], [0, 1, 2, 3, 5, 4, 6], [0, 1, 1, 3, 4, 5, 6], [0, 1, 2, 4, 5, 6], [1, 0, 2, 6])
    for order in orders:
        refused(header.to_bytes() + b"".join(parts[i] for i in order))


def test_segments_of_another_file_under_the_same_key_are_refused() -> None:
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    _, other = split(sealed_bytes(content(1500, salt="other"), segment_size=SEGMENT))
    for at in range(0, len(stream), SEGMENT):
        refused(header.to_bytes() + stream[:at] + other[at : at + SEGMENT] + stream[at + SEGMENT :])
    # The other's first segment brings its salt, and so another file key, along.
    refused(header.to_bytes() + other[:SEGMENT] + stream[SEGMENT:])


def test_the_header_of_another_file_is_refused() -> None:
    """Same data key, same path, authentic header: only the file id differs."""
    header, _ = split(sealed_bytes(b"one", segment_size=SEGMENT))
    other, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    assert header.associated.path == other.associated.path
    refused(header.to_bytes() + stream)


@pytest.mark.parametrize(
    "change",
    [
        {"key_uri": "cloister-key://hospital-b/datasets/reviews"},
        {"segment_size": 512},
        {"associated": AssociatedData("reviews", "test.tsv")},
        {"associated": AssociatedData("other", "train.tsv")},
        {"associated": AssociatedData("reviews", "train.tsv", schema_version=2)},
    ],
)
def test_a_header_that_claims_something_else_is_refused(change: dict[str, object]) -> None:
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    if isinstance(claimed := change.get("associated"), AssociatedData):
        change = {"associated": replace(claimed, file_id=header.associated.file_id)}
    refused(replace(header, **change).to_bytes() + stream)  # type: ignore[arg-type]


def test_a_claim_with_a_fitting_commitment_still_does_not_open_the_stream() -> None:
    """Someone with the data key re-heads a file: the binding is in the file's key, too."""
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    claimed = Header.make(data_key(), AssociatedData("reviews", "test.tsv"), segment_size=SEGMENT)
    assert "does not authenticate" in refused(claimed.to_bytes() + stream).why
    assert header != claimed


def test_another_key_is_refused_before_anything_is_decrypted() -> None:
    assert "key" in refused(sealed_bytes(PLAIN), key="two").why


def test_a_key_of_another_name_is_refused() -> None:
    other = data_key(uri="cloister-key://hospital-b/datasets/reviews")
    with pytest.raises(CloisterError, match="not under cloister-key://hospital-b"):
        opened(sealed_bytes(PLAIN), key=other)


def test_a_re_wrapped_header_opens_the_same_stream() -> None:
    header, stream = split(sealed_bytes(PLAIN, segment_size=SEGMENT))
    rewrapped = replace(header, key_version=9, wrapped=b"under version 9", padding=7)
    assert opened(rewrapped.to_bytes() + stream) == PLAIN


def test_damage_in_the_middle_is_met_when_it_is_read_and_leaves_no_plaintext_behind() -> None:
    sealed = bytearray(sealed_bytes(PLAIN, segment_size=SEGMENT))
    header, _ = split(bytes(sealed))
    sealed[header.size + 3 * SEGMENT + 20] ^= 1
    reader = SealedReader(io.BytesIO(sealed), data_key=data_key(), name="train.tsv")
    start = (SEGMENT - 56) + 2 * (SEGMENT - 16)
    assert reader.read(start) == PLAIN[:start]
    buffer = bytearray(SEGMENT)
    with pytest.raises(CloisterError, match=r"train\.tsv"):
        reader.readinto(buffer)
    assert not any(buffer)
    reader.seek(start + SEGMENT - 16)
    assert reader.readall() == PLAIN[start + SEGMENT - 16 :]


def test_a_pipe_under_a_files_name_does_not_block_the_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.tsv.sealed")
    with pytest.raises(CloisterError, match="not a regular file"):
        SealedReader(tmp_path / "train.tsv.sealed", data_key=data_key())


@given(st.binary(max_size=400))
def test_arbitrary_bytes_end_in_the_one_error(data: bytes) -> None:
    refused(data)
    refused(b"CLOISTER\0\1" + data)


@given(st.data())
def test_a_file_mangled_at_random_is_refused_or_unchanged(draw: st.DataObject) -> None:
    sealed = sealed_bytes(PLAIN, segment_size=SEGMENT)
    start = draw.draw(st.integers(0, len(sealed)))
    end = draw.draw(st.integers(start, min(len(sealed), start + 600)))
    mangled = sealed[:start] + draw.draw(st.binary(max_size=600)) + sealed[end:]
    assert tried(mangled) in (PLAIN, Code.SEALED_FILE_INVALID)
