# SPDX-License-Identifier: Apache-2.0
"""The manifest: one content has one spelling, and only well-formed claims exist."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.sealed.manifest import FileEntry, Manifest
from cloister.sealed.segments import Layout
from fakes.sealed_material import KEY_URI, data_key

ENTRY = FileEntry("train.tsv", 1000, 1000 + 40 + 5 * 16, 256, 1, "00" * 16, "28" + "11" * 39)


def manifest(*entries: FileEntry) -> Manifest:
    return Manifest("reviews", 1, b"", KEY_URI, entries or (ENTRY,)).signed(data_key().secret)


def spelled(**changes: object) -> bytes:
    """Return the manifest's canonical form with fields exchanged."""
    document = json.loads(manifest().to_bytes()) | changes
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def entry(**changes: object) -> list[object]:
    return [json.loads(manifest().to_bytes())["files"][0] | changes]


def test_a_manifest_reads_back_and_has_one_digest() -> None:
    made = manifest()
    assert Manifest.parse(made.to_bytes()) == made
    assert len(made.digest) == 48
    Manifest.parse(made.to_bytes()).verify(data_key().secret, name="m")


def test_files_are_sorted_when_it_is_signed() -> None:
    other = FileEntry("a", 0, 56, 256, 1, "00" * 16, "28" + "22" * 39)
    assert [file.path for file in manifest(ENTRY, other).files] == ["a", "train.tsv"]


def test_another_key_does_not_verify() -> None:
    with pytest.raises(CloisterError) as caught:
        manifest().verify(data_key("two").secret, name="there")
    assert caught.value.code is Code.MANIFEST_INVALID
    assert "there" in caught.value.what


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "cloister-manifest-v2"},
        {"format": 1},
        {"version": 0},
        {"version": True},
        {"version": 1.0},
        {"version": 2**53},
        {"dataset": ""},
        {"dataset": "a\nb"},
        {"parent": "00"},
        {"parent": "AA" * 48},
        {"key_uri": "nonsense"},
        {"mac": "00" * 31},
        {"files": []},
        {"files": {}},
        {"files": [1]},
        {"extra": 1},
        {"files": entry() * 2},
        {"files": entry(path="z") + entry(path="a")},
        {"files": entry(more=1)},
        {"files": entry(length=-1)},
        {"files": entry(length=1001)},
        {"files": entry(length=True)},
        {"files": entry(segment_size=63)},
        {"files": entry(schema_version=0)},
        {"files": entry(file_id="0" * 31)},
        {"files": entry(file_id="  " + "0" * 30)},
        {"files": entry(stream_header="28" * 39)},
        {"files": entry(path="../x")},
    ],
)
def test_what_is_not_a_manifest(changes: dict[str, object]) -> None:
    with pytest.raises(CloisterError) as caught:
        Manifest.parse(spelled(**changes))
    assert caught.value.code is Code.MANIFEST_INVALID


def test_the_unchanged_spelling_is_accepted() -> None:
    assert Manifest.parse(spelled()) == manifest()
    assert Manifest.parse(spelled(files=entry())) == manifest()


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"version":' + b"9" * 5000])
def test_bytes_that_are_no_manifest(data: bytes) -> None:
    with pytest.raises(CloisterError, match="CLO-1402"):
        Manifest.parse(data)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_end_in_the_one_error(data: bytes) -> None:
    with pytest.raises(CloisterError, match="CLO-1402"):
        Manifest.parse(data)


@given(st.integers(57, 2000), st.integers(0, 20_000))
def test_the_two_lengths_follow_from_each_other(segment_size: int, length: int) -> None:
    layout = Layout(segment_size)
    assert layout.plaintext_length(layout.stream_length(length)) == length


@given(st.integers(57, 400), st.integers(0, 3000))
def test_a_length_that_no_writer_makes_is_refused_or_is_one_that_a_writer_makes(size: int, stream_length: int) -> None:
    layout = Layout(size)
    try:
        length = layout.plaintext_length(stream_length)
    except ValueError:
        return
    assert layout.stream_length(length) == stream_length
