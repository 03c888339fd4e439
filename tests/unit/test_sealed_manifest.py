# SPDX-License-Identifier: Apache-2.0
"""The manifest: one content has one spelling, and only well-formed claims exist."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.sealed.manifest import FileEntry, Manifest
from cloister.sealed.segments import Layout
from fakes.sealed_material import KEY_URI, data_key

OWNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = did_key(OWNER)
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
        {"signer": "did:key:z6Mk", "signature": "00" * 64},
        {"signature": "00" * 64},
        {"signer": SIGNER},
        {"signer": SIGNER, "signature": "00" * 63},
        {"signer": None},
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


def signed() -> Manifest:
    return Manifest("reviews", 1, b"", KEY_URI, (ENTRY,)).signed(data_key().secret, OWNER)


def test_anybody_can_check_who_signed() -> None:
    made = Manifest.parse(signed().to_bytes())
    assert made.signer == SIGNER
    made.verify_signature(name="m")
    made.verify(data_key().secret, name="m")


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"dataset": "others"},
        {"files": (replace(ENTRY, file_id="22" * 16),)},
        {"signature": bytes(64)},
        {"signer": did_key(Ed25519PrivateKey.generate())},
        {"signer": "", "signature": b""},
    ],
)
def test_a_signature_is_over_everything(change: dict[str, object]) -> None:
    changed = replace(signed(), **change)  # type: ignore[arg-type]
    with pytest.raises(CloisterError, match=r"signature|signed"):
        changed.verify_signature(name="m")
    with pytest.raises(CloisterError):
        changed.verify(data_key().secret, name="m")


def test_a_holder_of_the_data_key_cannot_sign_for_the_owner() -> None:
    """Whoever has the DEK can make the MAC anew, but not the signature."""
    forged = replace(signed(), version=2)
    forged = replace(forged, mac=forged._mac(data_key().secret))
    with pytest.raises(CloisterError, match="signature"):
        forged.verify(data_key().secret, name="m")
