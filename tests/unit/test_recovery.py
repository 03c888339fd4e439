# SPDX-License-Identifier: Apache-2.0
"""Recovery keys: shares that give them back, shares that do not and are named, and what is sealed under them."""

from __future__ import annotations

import base64
import itertools
import json
import os
from pathlib import Path

import pytest
import shamir_mnemonic
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.recovery import SealedRoot, ShareCollector, ShareSet, SplitKey, new_recovery_key, split
from cloister.rootfile import create_root_file, read_root_file
from cloister.secret import SecretBytes

KEY = SecretBytes(bytes(range(32)))
SPLIT = split(KEY, threshold=3, count=5)
OTHER = split(KEY, threshold=3, count=5)


def collected(split_key: SplitKey, numbers: tuple[int, ...]) -> ShareCollector:
    collector = ShareCollector(split_key.public)
    for number in numbers:
        assert collector.add(split_key.mnemonics[number - 1]) == number
    return collector


@pytest.mark.parametrize("numbers", list(itertools.combinations(range(1, 6), 3)))
def test_any_three_of_five_shares_give_the_key_back(numbers: tuple[int, ...]) -> None:
    assert collected(SPLIT, numbers).secret() == KEY


def test_more_shares_than_needed_give_the_same_key() -> None:
    assert collected(SPLIT, (5, 4, 3, 2, 1)).secret() == KEY


def test_two_of_three_needed_shares_give_nothing_and_say_how_many_are_missing() -> None:
    collector = collected(SPLIT, (2, 5))
    assert (collector.missing, collector.given) == (1, (2, 5))
    with pytest.raises(CloisterError) as caught:
        collector.secret()
    assert caught.value.code is Code.SHARES_MISSING
    assert caught.value.what == "1 more shares are needed"


def test_case_and_spaces_of_a_share_do_not_matter() -> None:
    collector = ShareCollector(SPLIT.public)
    written = b"\n  " + SPLIT.mnemonics[2].reveal().upper().replace(b" ", b"\n\t ") + b"\n"
    assert collector.add(SecretBytes(written)) == 3


def words(split_key: SplitKey, number: int) -> list[str]:
    return split_key.mnemonics[number - 1].reveal().decode().split()


def refusal(collector: ShareCollector, share: str) -> CloisterError:
    before = collector.given
    with pytest.raises(CloisterError) as caught:
        collector.add(SecretBytes(share.encode()))
    assert caught.value.code is Code.SHARE_INVALID
    assert collector.given == before
    told = str(caught.value).lower()
    assert not [word for word in share.split() if len(word) > 6 and word.lower() in told], "a share's word was told"
    return caught.value


def test_the_same_share_twice_is_named() -> None:
    collector = collected(SPLIT, (4,))
    again = refusal(collector, " ".join(words(SPLIT, 4)))
    assert again.what == "share 4 was given already"
    assert collector.missing == 2


def test_a_share_of_another_set_of_the_same_key_is_named_as_foreign() -> None:
    why = refusal(collected(SPLIT, (1, 2)), " ".join(words(OTHER, 3))).why
    assert "calls itself share 3" in why
    assert SPLIT.public.name in why


def test_a_word_that_is_no_word_is_pointed_at_by_its_place() -> None:
    share = words(SPLIT, 2)
    share[16] = "notaword"
    assert "its word 17 is on no word list" in refusal(collected(SPLIT, (1,)), " ".join(share)).why


def test_swapped_wrong_and_missing_words_are_noticed() -> None:
    share = words(SPLIT, 2)
    swapped = [*share[:10], share[11], share[10], *share[12:]]
    wrong = [*share[:12], "academic" if share[12] != "academic" else "acid", *share[13:]]
    for damaged in (swapped, wrong, share[:-1], [*share, share[-1]], share[:3], []):
        if damaged != share:
            assert "wrong, missing" in refusal(collected(SPLIT, (1,)), " ".join(damaged)).why


def test_a_forged_share_with_a_right_checksum_is_named_when_it_is_given() -> None:
    real = shamir_mnemonic.Share.from_mnemonic(" ".join(words(SPLIT, 2)))
    forged = shamir_mnemonic.Share(
        *(*[getattr(real, name) for name in list(real.__dataclass_fields__)[:-1]], bytes(32))
    )
    collector = collected(SPLIT, (1, 3))
    assert "calls itself share 2" in refusal(collector, forged.mnemonic()).why
    assert collector.add(SPLIT.mnemonics[1]) == 2
    assert collector.secret() == KEY


@pytest.mark.parametrize("share", ["x" * 10_000, "é" * 33])
def test_what_is_no_text_of_a_share_is_refused_before_it_is_looked_at(share: str) -> None:
    refusal(ShareCollector(SPLIT.public), share)


@settings(max_examples=200)
@given(st.binary(max_size=600))
def test_any_bytes_given_as_a_share_end_in_the_one_error(data: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        ShareCollector(SPLIT.public).add(SecretBytes(data))
    assert caught.value.code is Code.SHARE_INVALID


def test_shares_under_a_made_up_list_of_fingerprints_do_not_become_a_key() -> None:
    mixed = ShareSet(3, SPLIT.public.fingerprints[:2] + OTHER.public.fingerprints[2:])
    collector = ShareCollector(mixed)
    for share in (*SPLIT.mnemonics[:2], OTHER.mnemonics[2]):
        collector.add(share)
    with pytest.raises(CloisterError) as caught:
        collector.secret()
    assert caught.value.code is Code.SHARE_INVALID


def test_what_was_given_can_be_forgotten() -> None:
    collector = collected(SPLIT, (1, 2, 3))
    collector.clear()
    assert collector.missing == 3


@pytest.mark.parametrize(("threshold", "count"), [(1, 1), (1, 3), (4, 3), (2, 17), (0, 2)])
def test_splits_that_protect_nothing_or_cannot_be_put_together_are_not_made(threshold: int, count: int) -> None:
    with pytest.raises(ValueError, match="threshold"):
        split(KEY, threshold=threshold, count=count)


def test_only_keys_of_32_bytes_are_split() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        split(SecretBytes(bytes(16)), threshold=2, count=3)


# What is sealed.

SECRET = SecretBytes(b"the CA's private keys")
SEALED = SealedRoot.seal(SECRET, KEY, purpose="test-root", public=b"public part", shares=SPLIT.public)


def test_what_was_sealed_opens_after_a_round_trip_through_its_file() -> None:
    again = SealedRoot.parse(SEALED.to_bytes(), purpose="test-root")
    assert again == SEALED
    assert again.open(collected(SPLIT, (1, 3, 5)).secret()) == SECRET
    assert (again.public, again.shares) == (b"public part", SPLIT.public)


def test_without_shares_the_file_form_opens_under_its_key_alone() -> None:
    sealed = SealedRoot.seal(SECRET, KEY, purpose="test-root")
    assert SealedRoot.parse(sealed.to_bytes(), purpose="test-root").open(KEY) == SECRET


def test_the_sealed_file_holds_neither_the_secret_nor_the_key() -> None:
    data = SEALED.to_bytes()
    for part in (data, *(base64.b64decode(value) for value in json.loads(data).values() if is_base64(value))):
        assert SECRET.reveal() not in part
        assert KEY.reveal() not in part


def is_base64(value: object) -> bool:
    return isinstance(value, str) and len(value) % 4 == 0 and "-" not in value


def test_the_same_secret_is_sealed_differently_each_time() -> None:
    again = SealedRoot.seal(SECRET, KEY, purpose="test-root", public=b"public part", shares=SPLIT.public)
    assert again.ciphertext != SEALED.ciphertext


def refused(data: bytes, key: SecretBytes = KEY, purpose: str = "test-root") -> None:
    with pytest.raises(CloisterError) as caught:
        SealedRoot.parse(data, purpose=purpose).open(key)
    assert caught.value.code is Code.SEALED_ROOT_INVALID


def test_another_key_does_not_open_it() -> None:
    refused(SEALED.to_bytes(), key=new_recovery_key())


def test_what_was_sealed_for_one_purpose_does_not_open_for_another() -> None:
    refused(SEALED.to_bytes(), purpose="other-root")
    refused(SEALED.to_bytes().replace(b"test-root", b"fake-root"), purpose="fake-root")


def test_each_edited_field_is_noticed() -> None:
    fields = json.loads(SEALED.to_bytes())
    (shares,) = fields["shares"]
    first, second, *rest = shares["fingerprints"]
    edits = [
        {"public": base64.b64encode(b"another part").decode()},
        {"salt": base64.b64encode(bytes(32)).decode()},
        {"ciphertext": base64.b64encode(bytes(40)).decode()},
        {"ciphertext": ""},
        {"salt": ""},
        {"salt": 7},
        {"shares": []},
        {"shares": None},
        {"shares": [shares, shares]},
        {"shares": [{**shares, "threshold": 2}]},
        {"shares": [{**shares, "threshold": True}]},
        {"shares": [{**shares, "fingerprints": [second, first, *rest]}]},
        {"shares": [{**shares, "fingerprints": [first, first, *rest]}]},
        {"shares": [{**shares, "fingerprints": "no list"}]},
        {"shares": [3]},
        {"format": "cloister-sealed-root-2"},
        {"more": 1},
    ]
    for edit in edits:
        refused(json.dumps({**fields, **edit}).encode())


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"{" * 5000, b'{"a":1,"a":2}', SEALED.to_bytes()[:-9], b" " * 2_000_000]
)
def test_what_is_no_sealed_root_is_refused(data: bytes) -> None:
    refused(data)


@settings(max_examples=200)
@given(st.integers(min_value=0, max_value=len(SEALED.to_bytes()) - 1), st.binary(max_size=4))
def test_any_edit_of_the_file_ends_in_the_one_error_or_changes_nothing(place: int, edit: bytes) -> None:
    data = SEALED.to_bytes()
    edited = data[:place] + edit + data[place + len(edit) :]
    try:
        found = SealedRoot.parse(edited, purpose="test-root")
        opened = found.open(KEY)
    except CloisterError as error:
        opened, found = SECRET, SEALED
        refusal = error.code
    else:
        refusal = None
    assert refusal in (None, Code.SEALED_ROOT_INVALID)
    assert (opened, found) == (SECRET, SEALED)


# The file form.


def test_a_root_file_is_made_once_for_its_owner_only_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    key = create_root_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_root_file(path) == key
    with pytest.raises(CloisterError) as caught:
        create_root_file(path)
    assert caught.value.code is Code.FILE_EXISTS
    assert read_root_file(path) == key
    assert [entry.name for entry in tmp_path.iterdir()] == ["root.key"]


def test_root_files_that_others_may_read_that_are_cut_or_that_are_no_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    create_root_file(path)
    path.chmod(0o640)
    cut = tmp_path / "cut"
    cut.write_bytes(b"00" * 31)
    cut.chmod(0o600)
    link, pipe = tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(cut)
    os.mkfifo(pipe, 0o600)
    for bad in (path, cut, link, pipe, tmp_path):
        with pytest.raises(CloisterError) as caught:
            read_root_file(bad)
        assert caught.value.code is Code.CONFIG_INVALID
    with pytest.raises(CloisterError) as caught:
        read_root_file(tmp_path / "none")
    assert caught.value.code is Code.FILE_NOT_FOUND
