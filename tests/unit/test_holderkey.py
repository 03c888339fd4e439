# SPDX-License-Identifier: Apache-2.0
"""Keys of share holders: made once, read back, and what is sealed to one opens with no other."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister import hpke
from cloister.errors import CloisterError, Code
from cloister.holderkey import SealedShare, create_holder_key, read_holder_key, read_holder_public
from cloister.hpke import HpkeKeyPair
from cloister.protocol import share_info
from cloister.secret import SecretBytes

BROKER = "spiffe://cloister.test/service/keybroker"
WORDS = SecretBytes(b"academic acid acrobat")


def a_share(public: bytes) -> SealedShare:
    info = share_info(broker_id=BROKER, number=1, count=3, threshold=2)
    return SealedShare(BROKER, 1, 3, 2, hpke.seal(public, WORDS, info=info))


def code(call: object, *arguments: object) -> Code:
    with pytest.raises(CloisterError) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.code


def test_a_key_is_made_once_and_opens_what_was_sealed_to_its_public_part(tmp_path: Path) -> None:
    path = tmp_path / "ada.key"
    public = create_holder_key(path)
    assert public == tmp_path / "ada.key.pub"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    assert code(create_holder_key, path) is Code.FILE_EXISTS
    path.unlink()
    assert code(create_holder_key, path) is Code.FILE_EXISTS  # the public part alone, too
    path.write_bytes(before)
    share = a_share(read_holder_public(public))
    assert share.open(read_holder_key(path)) == WORDS
    assert read_holder_key(path).public_bytes == read_holder_public(public)


def test_the_private_part_is_not_taken_for_the_public_one_or_the_other_way(tmp_path: Path) -> None:
    public = create_holder_key(tmp_path / "ada.key")
    assert code(read_holder_public, tmp_path / "ada.key") is Code.ARGUMENT_INVALID
    assert code(read_holder_key, public) is Code.ARGUMENT_INVALID
    assert code(read_holder_key, tmp_path / "nobody.key") is Code.FILE_NOT_FOUND


@pytest.mark.parametrize(
    "content",
    [b"", b"cloister-holder-private-1", b"cloister-holder-private-1 AAAA", b"cloister-holder-private-1 %%%%", b"\xff"],
)
def test_a_file_that_is_no_key_is_refused_without_its_content(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(CloisterError) as caught:
        read_holder_key(tmp_path / "key")
    assert caught.value.code is Code.ARGUMENT_INVALID
    assert "AAAA" not in str(caught.value)


def test_a_share_opens_for_its_holder_only_and_as_it_was_made_only() -> None:
    pair = HpkeKeyPair.generate()
    share = a_share(pair.public_bytes)
    assert SealedShare.parse(share.to_bytes()).open(pair) == WORDS
    assert code(share.open, HpkeKeyPair.generate()) is Code.SHARE_INVALID
    for edited in (
        replace(share, broker_id=BROKER + "s"),
        replace(share, number=2),
        replace(share, count=4),
        replace(share, threshold=3),
        replace(share, sealed=share.sealed[:-1]),
    ):
        assert code(edited.open, pair) is Code.SHARE_INVALID


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"number": 1', b'"number": 0'),
        (b'"number": 1', b'"number": 17'),
        (b'"number": 1', b'"number": true'),
        (b'"number": 1', b'"number": 1, "number": 2'),
        (b'"format"', b'"from"'),
        (b"share-1", b"share-2"),
        (b'"broker"', b'"more": 1, "broker"'),
        (b'"sealed": "', b'"sealed": "%'),
        (b"{", b""),
    ],
)
def test_an_edited_file_is_no_share(old: bytes, new: bytes) -> None:
    data = a_share(HpkeKeyPair.generate().public_bytes).to_bytes()
    assert old in data
    assert code(SealedShare.parse, data.replace(old, new, 1)) is Code.SHARE_INVALID


@given(st.binary(max_size=300), st.text(max_size=100))
def test_noise_is_no_share(noise: bytes, text: str) -> None:
    for data in (noise, text.encode()):
        assert code(SealedShare.parse, data) is Code.SHARE_INVALID
