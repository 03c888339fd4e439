# SPDX-License-Identifier: Apache-2.0
"""The header: what is written is what is read, and nothing else is read."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import MAX_HEADER_SIZE, AssociatedData, Header, check_path
from cloister.secret import SecretBytes
from fakes.sealed_material import KEY_URI, ROOT, data_key

NAMES = st.text(st.characters(blacklist_categories=["Cc", "Cs"], blacklist_characters="/\\"), min_size=1, max_size=40)
GOOD_NAMES = NAMES.filter(lambda name: name not in {".", ".."} and not name.endswith(".sealed"))


def header(**changes: object) -> Header:
    made = Header.make(data_key(), AssociatedData("reviews", "train.tsv"), segment_size=65536)
    return replace(made, **changes)  # type: ignore[arg-type]


def refused(data: bytes) -> str:
    with pytest.raises(CloisterError) as caught:
        Header.read(io.BytesIO(data), name="a.sealed")
    assert caught.value.code is Code.SEALED_FILE_INVALID
    assert "a.sealed" in caught.value.what
    return caught.value.why


@given(
    dataset=GOOD_NAMES,
    parts=st.lists(GOOD_NAMES, min_size=1, max_size=4),
    schema=st.integers(1, 2**32 - 1),
    segment=st.integers(64, 16 * 1024 * 1024),
    wrapped=st.binary(min_size=1, max_size=8192),
    version=st.integers(1, 2**32 - 1),
)
def test_every_header_reads_back(
    dataset: str, parts: list[str], schema: int, segment: int, wrapped: bytes, version: int
) -> None:
    key = DataKey(SecretBytes(bytes(32)), wrapped, KEY_URI, version)
    made = Header.make(key, AssociatedData(dataset, "/".join(parts), schema), segment_size=segment)
    file = io.BytesIO(made.to_bytes() + b"stream")
    assert Header.read(file) == made
    assert file.read() == b"stream"


def test_a_header_ends_on_512_bytes_with_room_to_spare() -> None:
    for size in range(1, 600, 7):
        key = DataKey(SecretBytes(bytes(32)), bytes(size), KEY_URI, 1)
        made = Header.make(key, AssociatedData("d", "p"), segment_size=64)
        assert made.size % 512 == 0
        assert made.padding >= 128


def test_header_bytes_of_version_1_do_not_change() -> None:
    """A fixed vector: version 1 is read for ever."""
    made = header(
        associated=AssociatedData("reviews", "sub/训练.tsv", 1, bytes(range(16))), commitment=bytes(32), padding=3
    )
    vector = (ROOT / "tests" / "vectors" / "sealed" / "header.hex").read_text()
    assert made.to_bytes().hex() == vector.replace("\n", "")


def test_an_unknown_version_says_which_it_is() -> None:
    data = bytearray(header().to_bytes())
    data[9] = 2
    assert "format version 2" in refused(bytes(data))


def test_a_claimed_length_is_bounded_before_it_is_read() -> None:
    assert str(MAX_HEADER_SIZE) in refused(b"CLOISTER\0\1" + (MAX_HEADER_SIZE + 1).to_bytes(4, "big"))


@pytest.mark.parametrize(
    "changes",
    [
        {"segment_size": 63},
        {"segment_size": 16 * 1024 * 1024 + 1},
        {"commitment": bytes(31)},
        {"key_version": 0},
        {"key_version": 2**32},
        {"wrapped": b""},
        {"wrapped": bytes(8193)},
        {"key_uri": "cloister-key://Hospital/x"},
        {"key_uri": "https://example.org/"},
    ],
)
def test_a_field_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    refused(header(**changes).to_bytes())


def test_padding_holds_nothing() -> None:
    data = header(padding=5).to_bytes()
    refused(data[:-1] + b"x")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "./a",
        "a/..",
        "..",
        "a\\b",
        "a\nb",
        "a\x7f",
        "x.sealed",
        "d.sealed/x",
        "a" * 241,
        "a/" * 600 + "a",
        "\udcff",
    ],
)
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(ValueError):
        check_path(path)


@pytest.mark.parametrize("path", ["a", "a/b/c.tsv", ".hidden", "a b", "训练/数据.tsv", "...", "a.sealed.txt"])
def test_paths_that_are_taken(path: str) -> None:
    check_path(path)


@pytest.mark.parametrize("dataset", ["", "a\nb", "x" * 256])
def test_dataset_names_that_are_refused(dataset: str) -> None:
    with pytest.raises(ValueError):
        AssociatedData(dataset, "p")


@pytest.mark.parametrize(
    ("secret", "wrapped", "version"),
    [(31, b"w", 1), (33, b"w", 1), (0, b"w", 1), (32, b"", 1), (32, b"w", 0), (32, bytes(8193), 1)],
)
def test_what_is_no_data_key(secret: int, wrapped: bytes, version: int) -> None:
    with pytest.raises(CloisterError) as caught:
        DataKey(SecretBytes(bytes(secret)), wrapped, KEY_URI, version)
    assert caught.value.code is Code.ARGUMENT_INVALID


def test_a_data_key_does_not_show_itself() -> None:
    key = data_key()
    assert key.secret.reveal().hex() not in repr(key)
    assert repr(key.secret.reveal()) not in repr(key)
