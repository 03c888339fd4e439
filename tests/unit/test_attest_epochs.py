# SPDX-License-Identifier: Apache-2.0
"""CA epochs: what each stage may do, how long it lasts, and that no way leads back."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.recovery import new_recovery_key, split
from cloister.runtime.trust import Trust, adopt, sign_update
from cloister_attest.castate import CaState, Context, SealedState
from cloister_attest.epochs import Epochs, Schedule

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
CONTEXT = Context(b"\x05" * 48, b"\x06" * 48)
PLAN = Schedule(lead=3 * MINUTE, overlap=13 * HOUR, renew_after=60 * DAY)


def names(epochs: Epochs) -> list[str]:
    return [authority.epoch for authority in epochs.trusted]


def changing() -> tuple[Epochs, Epochs, Epochs, Epochs]:
    """Return the CA before a change, announced, issuing, and over."""
    before = Epochs.begin("cloister.test", now=NOW)
    announced = before.start(PLAN, now=NOW)
    issuing = announced.advance(PLAN, now=NOW + 3 * MINUTE)
    over = issuing.advance(PLAN, now=NOW + 3 * MINUTE + 13 * HOUR)
    return before, announced, issuing, over


def test_a_new_epoch_is_trusted_before_it_issues_and_the_old_one_after_it_did() -> None:
    before, announced, issuing, over = changing()
    (old,) = names(before)
    new = names(announced)[0]
    assert (names(announced), announced.issuing.epoch) == ([new, old], old)
    assert (names(issuing), issuing.issuing.epoch) == ([new, old], new)
    assert (names(over), over.issuing.epoch) == ([new], new)


def test_nothing_changes_a_moment_too_early() -> None:
    before, announced, issuing, _ = changing()
    instant = timedelta(microseconds=1)
    assert before.advance(PLAN, now=NOW + HOUR) is before
    assert announced.advance(PLAN, now=NOW + 3 * MINUTE - instant) is announced
    assert issuing.advance(PLAN, now=NOW + 3 * MINUTE + 13 * HOUR - instant) is issuing


def test_every_change_comes_when_it_was_said_to() -> None:
    state, seen = Epochs.begin("cloister.test", now=NOW), []
    for _ in range(8):
        due = state.next_change(PLAN)
        assert state.advance(PLAN, now=due - timedelta(seconds=1)) is state
        state = state.advance(PLAN, now=due)
        seen.append((due - NOW, len(state.trusted)))
    assert seen[0] == (60 * DAY, 2)
    assert [count for _, count in seen[:3]] == [2, 2, 1]


def test_the_bundle_is_the_same_from_the_announcement_to_the_end_of_the_overlap() -> None:
    before, announced, issuing, over = changing()
    assert announced.bundle.digest == issuing.bundle.digest
    assert len({before.bundle.digest, issuing.bundle.digest, over.bundle.digest}) == 3
    sequences = [found.bundle.sequence for found in (before, announced, over)]
    assert sequences == sorted(set(sequences))


def test_the_bundle_holds_cas_and_token_keys_of_both_epochs() -> None:
    _, announced, _, over = changing()
    assert announced.bundle.intermediate(Role.RANK).count(b"BEGIN") == 2
    assert len(announced.bundle.token_keys) == 2
    assert over.bundle.intermediate(Role.RANK).count(b"BEGIN") == 1


def test_a_td_may_hold_what_trusts_nobody_who_has_ended() -> None:
    before, announced, issuing, over = changing()
    both = {before.bundle.digest, announced.bundle.digest}
    assert announced.accepted == issuing.accepted == both
    assert over.accepted == {over.bundle.digest}
    assert over.known == both | {over.bundle.digest}


def test_after_a_retirement_nothing_with_that_epoch_is_accepted() -> None:
    before, _, issuing, _ = changing()
    retired = issuing.retire(before.issuing.epoch, now=NOW + HOUR)
    assert retired.accepted == {retired.bundle.digest}
    assert retired.retired_key_ids == before.issuing.key_ids


def test_the_only_epoch_can_be_retired_and_another_one_issues_at_once() -> None:
    before = Epochs.begin("cloister.test", now=NOW)
    after = before.retire(before.issuing.epoch, now=NOW)
    assert names(after) == [after.issuing.epoch] != names(before)
    # Who holds the retired one only can learn of it: its root still signs.
    assert before.issuing.root in after.signers(NOW)
    assert before.issuing.root not in after.signers(NOW + DAY)


def test_an_announced_epoch_takes_over_when_the_issuing_one_is_retired() -> None:
    before, announced, *_ = changing()
    after = announced.retire(before.issuing.epoch, now=NOW)
    assert (names(after), after.announced) == ([names(announced)[0]], None)


def test_an_announced_epoch_can_be_taken_back() -> None:
    before, announced, *_ = changing()
    after = announced.retire(names(announced)[0], now=NOW)
    assert names(after) == names(before)
    assert after.bundle.sequence > announced.bundle.sequence


def test_an_epoch_that_is_not_trusted_cannot_be_retired() -> None:
    before, _, _, over = changing()
    for epoch in (before.issuing.epoch, "never was", ""):
        with pytest.raises(CloisterError) as caught:
            over.retire(epoch, now=NOW)
        assert caught.value.code is Code.EPOCH_NOT_FOUND


def test_one_change_at_a_time_and_never_more_than_four_epochs() -> None:
    _, state, *_ = changing()
    with pytest.raises(CloisterError) as caught:
        state.start(PLAN, now=NOW)
    assert caught.value.code is Code.EPOCH_CHANGING
    second = state.advance(PLAN, now=NOW + 3 * MINUTE).start(PLAN, now=NOW + 3 * MINUTE)
    third = second.advance(PLAN, now=NOW + 6 * MINUTE)
    assert len(third.trusted) == 3
    assert third.bundle.root_pem.count(b"BEGIN") == 3
    with pytest.raises(CloisterError) as caught:
        third.start(PLAN, now=NOW + 6 * MINUTE)
    assert caught.value.code is Code.EPOCH_CHANGING
    assert third.advance(PLAN, now=NOW + 14 * HOUR).start(PLAN, now=NOW + 14 * HOUR).announced


def test_a_ca_that_was_asleep_for_too_long_begins_an_epoch_without_announcement() -> None:
    before = Epochs.begin("cloister.test", now=NOW)
    late = NOW + 90 * DAY - HOUR
    after = before.advance(PLAN, now=late)
    assert after.issuing.epoch != before.issuing.epoch
    assert after.issuing.started == late
    # The old one is not trusted for longer than its certificates are valid.
    assert after.ending[0].ends_at == before.issuing.ends


def test_each_change_is_one_generation_however_much_was_due() -> None:
    _, announced, *_ = changing()
    late = announced.advance(PLAN, now=NOW + 80 * DAY)  # issuing, the old one over, and the next one announced
    assert (len(late.trusted), late.announced is not None, len(late.gone)) == (3, True, 0)
    later = late.advance(PLAN, now=NOW + 81 * DAY)
    for before, after in ((announced, late), (late, later)):
        assert after.generation == before.generation + 1
        assert after.bundle.sequence <= after.sequence(0)
    assert {found.digest for found in later.served} == {found.bundle.digest for found in (announced, late, later)} | {
        found.digest for found in announced.served
    }


def test_a_clock_that_steps_back_brings_nothing_back() -> None:
    *_, over = changing()
    assert over.advance(PLAN, now=NOW - DAY) is over


def test_retired_authorities_are_named_as_long_as_a_call_may_run() -> None:
    before, _, issuing, _ = changing()
    retired = issuing.retire(before.issuing.epoch, now=NOW)
    assert retired.advance(PLAN, now=NOW + 12 * HOUR).retired_key_ids
    assert not retired.advance(PLAN, now=NOW + 25 * HOUR).retired_key_ids


def test_a_planned_end_names_nobody_as_retired() -> None:
    *_, over = changing()
    assert over.retired_key_ids == frozenset()


# Following a change from what a TD holds.


def told(epochs: Epochs, now: datetime, counter: int = 1) -> bytes:
    return sign_update(Trust(epochs.bundle, epochs.sequence(counter)), epochs.signers(now))


def test_whoever_holds_any_bundle_of_the_way_can_follow_it() -> None:
    before, announced, issuing, over = changing()
    now = NOW + 3 * MINUTE + 13 * HOUR
    for held in (before, announced, issuing, over):
        assert adopt(Trust.of(held.bundle), told(over, now)).bundle == over.bundle


def test_updates_of_a_generation_are_above_all_of_the_one_before() -> None:
    before, announced, *_ = changing()
    assert announced.sequence(0) > before.sequence(2**24 - 1)
    with pytest.raises(ValueError, match="updates"):
        before.sequence(2**24)


# What is sealed of it.


def test_the_state_is_the_same_after_it_was_sealed_and_opened() -> None:
    key, shares = new_recovery_key(), split(new_recovery_key(), threshold=2, count=3).public
    before, announced, issuing, over = changing()
    retired = issuing.retire(before.issuing.epoch, now=NOW + HOUR)
    for epochs in (before, announced, issuing, over, retired):
        state = CaState(epochs, new_recovery_key())
        sealed = SealedState.parse(state.seal(key, shares=shares, context=CONTEXT, now=NOW))
        again = sealed.open(key)
        assert json.dumps(again.epochs.to_secret(), sort_keys=True) == json.dumps(epochs.to_secret(), sort_keys=True)
        assert again.register_key == state.register_key
        assert (sealed.bundle, sealed.context, sealed.generation, sealed.sealed_at) == (
            epochs.bundle,
            CONTEXT,
            epochs.generation,
            NOW,
        )
        assert sealed.sealed.shares == shares


def test_no_private_key_stands_in_the_sealed_file() -> None:
    state = CaState.begin("cloister.test", now=NOW)
    data = state.seal(new_recovery_key(), shares=None, context=CONTEXT, now=NOW)
    for secret in (state.epochs.issuing.to_secret()["token_key"], state.register_key.reveal().hex()):
        assert secret.encode() not in data
    assert b"PRIVATE" not in data


def test_a_sealed_state_opens_under_its_own_key_and_unchanged_only() -> None:
    key = new_recovery_key()
    mine, other = (CaState.begin("cloister.test", now=NOW) for _ in range(2))
    data = mine.seal(key, shares=None, context=CONTEXT, now=NOW)
    fields = json.loads(data)
    swapped = {**fields, "public": json.loads(other.seal(key, shares=None, context=CONTEXT, now=NOW))["public"]}
    for bad, with_key in (
        (data, new_recovery_key()),
        (json.dumps(swapped).encode(), key),
        (json.dumps({**fields, "ciphertext": fields["ciphertext"][:-8] + "AAAAAAA="}).encode(), key),
    ):
        with pytest.raises(CloisterError) as caught:
            SealedState.parse(bad).open(with_key)
        assert caught.value.code is Code.SEALED_ROOT_INVALID
    for bad in (b"", data[:-10], json.dumps({**fields, "purpose": "keybroker"}).encode()):
        with pytest.raises(CloisterError) as caught:
            SealedState.parse(bad)
        assert caught.value.code is Code.SEALED_ROOT_INVALID
