# SPDX-License-Identifier: Apache-2.0
"""From shares or a passphrase to a root key: what counts, what does not, and how long one has to wait."""

from __future__ import annotations

import pytest

from cloister.errors import CloisterError, Code
from cloister.recovery import ShareSet
from cloister.secret import SecretBytes
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import SealRecord, Stretching
from cloister_keybroker.unsealing import (
    SHARE_LIFE_S,
    NewRoot,
    Unsealing,
    new_root_from_passphrase,
    new_root_from_shares,
    stretched,
)
from fakes.keybroker_vault import MonotonicClock

CHEAP = Stretching(b"s" * 32, 64, 1, 1)
RIGHT, WRONG = SecretBytes(b"correct horse battery staple"), SecretBytes(b"correct horse battery stapler")


def waiting(new: NewRoot, clock: MonotonicClock | None = None) -> Unsealing:
    return Unsealing(new.record, new.root_key.canary(), clock or MonotonicClock())


def with_passphrase(clock: MonotonicClock) -> Unsealing:
    return Unsealing(SealRecord(stretching=CHEAP), stretched(RIGHT, CHEAP).canary(), clock)


def test_a_threshold_of_shares_gives_the_root_key_and_one_less_does_not() -> None:
    new = new_root_from_shares(threshold=3, count=5)
    unsealing = waiting(new)
    for number, index in enumerate((4, 0), start=1):
        assert unsealing.hand_in(new.shares[index], f"operator-{index}") is None
        assert (unsealing.have, unsealing.need) == (number, 3)
    found = unsealing.hand_in(new.shares[2], "operator-2")
    assert found is not None
    assert found.canary() == new.root_key.canary()
    assert unsealing.givers == ((1, "operator-0"), (3, "operator-2"), (5, "operator-4"))


def test_a_share_handed_in_twice_does_not_count_twice() -> None:
    new = new_root_from_shares(threshold=2, count=3)
    unsealing = waiting(new)
    unsealing.hand_in(new.shares[1], "ada")
    with pytest.raises(CloisterError, match="share 2 was given already") as caught:
        unsealing.hand_in(SecretBytes(new.shares[1].reveal().upper() + b" "), "grace")
    assert caught.value.code is Code.SHARE_INVALID
    assert unsealing.have == 1
    assert unsealing.hand_in(new.shares[0], "grace") is not None


def test_a_wrong_share_is_named_and_the_right_ones_stay() -> None:
    new, other = new_root_from_shares(threshold=2, count=3), new_root_from_shares(threshold=2, count=3)
    unsealing = waiting(new)
    unsealing.hand_in(new.shares[0], "ada")
    words = new.shares[1].reveal().split()
    misspelt = SecretBytes(b" ".join([*words[:4], b"zzz", *words[5:]]))
    swapped = SecretBytes(b" ".join([words[1], words[0], *words[2:]]))
    for share, said in ((other.shares[1], "calls itself share 2"), (misspelt, "word 5"), (swapped, "a word of it")):
        with pytest.raises(CloisterError, match="share is refused") as caught:
            unsealing.hand_in(share, "eve")
        assert (caught.value.code, said in caught.value.why) == (Code.SHARE_INVALID, True), caught.value.why
        assert share.reveal().decode() not in str(caught.value)
    assert unsealing.have == 1
    assert [refused.operator for refused in unsealing.refused] == ["eve"] * 3
    assert unsealing.hand_in(new.shares[2], "grace") is not None


def test_genuine_shares_of_a_root_key_that_is_not_the_stores_say_so() -> None:
    """An operator put another store's mark beside the shares' list."""
    new, other = new_root_from_shares(threshold=2, count=2), new_root_from_shares(threshold=2, count=2)
    unsealing = Unsealing(new.record, other.root_key.canary(), MonotonicClock())
    unsealing.hand_in(new.shares[0], "ada")
    with pytest.raises(CloisterError, match="not under their root key") as caught:
        unsealing.hand_in(new.shares[1], "ada")
    assert caught.value.code is Code.STORE_DAMAGED
    assert unsealing.have == 0


def test_shares_that_did_not_become_a_key_are_forgotten_after_an_hour() -> None:
    clock, new = MonotonicClock(), new_root_from_shares(threshold=2, count=3)
    unsealing = waiting(new, clock)
    unsealing.hand_in(new.shares[0], "ada")
    clock.now_s += SHARE_LIFE_S
    assert unsealing.have == 1
    clock.now_s += 1
    assert unsealing.have == 0
    assert unsealing.hand_in(new.shares[1], "ada") is None


def test_after_wrong_passphrases_the_right_one_has_to_wait() -> None:
    clock = MonotonicClock()
    unsealing = with_passphrase(clock)
    for tries, wait_s in enumerate((1, 2, 4, 8), start=1):
        with pytest.raises(CloisterError, match="passphrase is wrong") as caught:
            unsealing.hand_in(WRONG, "eve")
        assert (caught.value.code, f"try {tries}" in caught.value.why) == (Code.UNSEAL_REFUSED, True)
        clock.now_s += wait_s - 0.5
        with pytest.raises(CloisterError) as caught:
            unsealing.hand_in(RIGHT, "ada")
        assert caught.value.code is Code.RATE_LIMITED
        clock.now_s += 0.5
    assert unsealing.hand_in(RIGHT, "ada") is not None
    for _ in range(20):
        clock.now_s += 300
        with pytest.raises(CloisterError, match="passphrase is wrong"):
            unsealing.hand_in(WRONG, "eve")
    clock.now_s += 300
    assert unsealing.hand_in(RIGHT, "ada") is not None
    assert len(unsealing.refused) == 24


def test_what_is_refused_is_remembered_up_to_a_bound() -> None:
    unsealing = waiting(new_root_from_shares(threshold=2, count=2))
    for _ in range(100):
        with pytest.raises(CloisterError):
            unsealing.hand_in(SecretBytes(b"no share"), "eve")
    assert len(unsealing.refused) == 32


def test_a_passphrase_has_a_salt_of_its_own_each_time() -> None:
    first, second = new_root_from_passphrase(RIGHT), new_root_from_passphrase(RIGHT)
    assert first.root_key.canary() != second.root_key.canary()
    assert first.record.stretching is not None
    assert stretched(RIGHT, first.record.stretching).canary() == first.root_key.canary()


@pytest.mark.parametrize("passphrase", [b"", b"fifteen bytes..", b"x" * 1025])
def test_a_short_or_endless_passphrase_is_refused(passphrase: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        new_root_from_passphrase(SecretBytes(passphrase))
    assert caught.value.code is Code.ARGUMENT_INVALID


@pytest.mark.parametrize(("threshold", "count"), [(0, 0), (1, 1), (1, 3), (3, 2), (2, 17)])
def test_a_threshold_that_is_none_is_refused(threshold: int, count: int) -> None:
    with pytest.raises(CloisterError) as caught:
        new_root_from_shares(threshold=threshold, count=count)
    assert caught.value.code is Code.ARGUMENT_INVALID


def test_a_passphrase_gives_the_same_root_key_for_ever() -> None:
    """Otherwise a store of an earlier release would not open any more."""
    assert stretched(RIGHT, CHEAP).canary().hex() == "d06773b1600b3b14d8c17f9306b53bfac112c760351dd0228709869f84e3d46a"


@pytest.mark.parametrize("content", [b"", b"\x00" * 31, b"\x01" * 32])
def test_a_root_key_of_a_file_is_shown_by_its_content(content: bytes) -> None:
    root = SecretBytes(b"\x00" * 32)
    unsealing = Unsealing(SealRecord(), RootKey(root).canary(), MonotonicClock())
    with pytest.raises(CloisterError) as caught:
        unsealing.hand_in(SecretBytes(content), "ada")
    assert caught.value.code is Code.UNSEAL_REFUSED
    found = unsealing.hand_in(root, "ada")
    assert found is not None
    assert found.canary() == unsealing.canary


def test_a_forged_list_of_fingerprints_is_found_when_the_shares_do_not_fit() -> None:
    first, second = new_root_from_shares(threshold=2, count=2), new_root_from_shares(threshold=2, count=2)
    assert first.record.shares is not None
    assert second.record.shares is not None
    mixed = ShareSet(2, (first.record.shares.fingerprints[0], second.record.shares.fingerprints[1]))
    unsealing = Unsealing(SealRecord(shares=mixed), first.root_key.canary(), MonotonicClock())
    unsealing.hand_in(first.shares[0], "ada")
    with pytest.raises(CloisterError, match="do not fit together"):
        unsealing.hand_in(second.shares[1], "ada")
