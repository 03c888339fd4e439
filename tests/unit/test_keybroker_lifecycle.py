# SPDX-License-Identifier: Apache-2.0
"""The life of a key: versions come and retire, it sleeps and wakes, it ends after a waiting period and not before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister_keybroker import owners
from cloister_keybroker.backends import KeyBackend, KeyRef
from cloister_keybroker.backends.remote import RemoteBackend
from cloister_keybroker.datakeys import WrappedKey
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import MemoryCustodian
from fakes.keybroker_harness import KEY, OTHER_KEY, Broker, Clock, a_broker, new_key, owner

MONTH = timedelta(days=30)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path, Clock()) as found:
        yield found


async def refused(attempt: Any, code: Code) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt
    assert caught.value.code is code, caught.value
    return caught.value


async def state_of(broker: Broker) -> KeyState:
    return (await broker.owners.get(owner(), KEY)).record.state


async def actions(broker: Broker) -> list[tuple[str, bool]]:
    return [(logged.entry.action, logged.entry.granted) for logged in reversed(await broker.log())]


# Versions.


async def test_a_new_version_wraps_and_old_ones_still_open(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    first = await td.release()
    assert (await broker.owners.rotate(owner(), KEY)).newest == 2
    second = await td.release()
    assert (first.data_key.binding.key_version, second.data_key.binding.key_version) == (1, 2)
    assert td.open(await td.release(wrapped=first.data_key.wrapped)) == td.open(first)
    assert td.open(await td.release(wrapped=second.data_key.wrapped, key_version=2)) == td.open(second)
    # A data key opens under the version that wrapped it and under no other.
    await refused(td.release(wrapped=first.data_key.wrapped, key_version=2), Code.WRAPPED_KEY_INVALID)
    assert ("rotate", True) in await actions(broker)


async def test_a_retired_version_opens_nothing_for_anybody_ever_again(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    old, secret = await broker.generate()
    await broker.owners.rotate(owner(), KEY)
    again = await broker.data_keys.rewrap(owner(), WrappedKey(KEY, 1, old.wrapped))
    assert (await broker.owners.retire(owner(), KEY, 2)).min_version == 2
    error = await refused(td.release(wrapped=old.wrapped), Code.RELEASE_DENIED)
    assert "block key.version" in error.what
    await refused(broker.open_key(old.wrapped), Code.WRAPPED_KEY_INVALID)
    await refused(broker.data_keys.rewrap(owner(), WrappedKey(KEY, 1, old.wrapped)), Code.WRAPPED_KEY_INVALID)
    # What was wrapped again before opens, and is the same data key.
    assert await broker.open_key(again.wrapped, version=again.version) == secret
    assert td.open(await td.release(wrapped=again.wrapped, key_version=2)) == secret
    for wrong in (0, 1, 3):
        await refused(broker.owners.retire(owner(), KEY, wrong), Code.ARGUMENT_INVALID)
    assert (await broker.owners.retire(owner(), KEY, 2)).min_version == 2


async def test_all_versions_of_a_key_change_their_state_together(broker: Broker) -> None:
    await broker.create_key()
    made, secret = await broker.generate()
    await broker.owners.rotate(owner(), KEY)
    await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
    await broker.owners.rotate(owner(), KEY)  # a disabled key gets a version that is disabled, too
    await refused(broker.open_key(made.wrapped), Code.KEY_DISABLED)
    await broker.owners.set_state(owner(), KEY, KeyState.ENABLED)
    assert await broker.open_key(made.wrapped) == secret
    assert (await broker.generate())[0].binding.key_version == 3


async def test_a_key_has_a_largest_number_of_versions(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "MAX_VERSIONS", 2)
    await broker.create_key()
    await broker.owners.rotate(owner(), KEY)
    await refused(broker.owners.rotate(owner(), KEY), Code.KEY_QUOTA)
    assert (await broker.owners.get(owner(), KEY)).record.newest == 2


async def test_a_tenant_has_a_largest_number_of_keys(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners, "MAX_KEYS", 1)
    await broker.create_key()
    await refused(broker.owners.create(owner(), new_key(OTHER_KEY)), Code.KEY_QUOTA)


async def test_changes_of_one_key_take_turns(broker: Broker) -> None:
    await broker.create_key()
    made, secret = await broker.generate()
    await asyncio.gather(
        *(broker.owners.rotate(owner(), KEY) for _ in range(5)),
        *(broker.owners.set_state(owner(), KEY, state) for state in (KeyState.DISABLED, KeyState.ENABLED)),
    )
    assert (await broker.owners.get(owner(), KEY)).record.newest == 6
    await broker.owners.set_state(owner(), KEY, KeyState.ENABLED)
    assert await broker.open_key(made.wrapped) == secret


# Destruction.


async def test_a_key_is_destroyed_after_its_waiting_period_and_not_before(broker: Broker) -> None:
    await broker.create_key()
    made, _ = await broker.generate()
    record = await broker.destruction.schedule(owner(), KEY, timedelta())
    assert record.destroy_at_ms == record.created_ms + MONTH.total_seconds() * 1000
    await refused(broker.td().release(wrapped=made.wrapped), Code.KEY_DISABLED)
    broker.clock.advance(days=30, seconds=-1)
    await broker.destruction.carry_out()
    assert await state_of(broker) is KeyState.DESTRUCTION_SCHEDULED
    broker.clock.advance(seconds=1)
    await broker.destruction.carry_out()
    stored = await broker.owners.get(owner(), KEY)
    assert (stored.record.state, stored.version, stored.backend) == (KeyState.DESTROYED, None, "")
    await refused(broker.td().release(wrapped=made.wrapped), Code.KEY_DISABLED)
    await refused(broker.open_key(made.wrapped), Code.KEY_DISABLED)
    assert (await actions(broker))[-3:] == [("destroy", True), ("release", False), ("open", False)]


async def test_nothing_of_a_destroyed_key_is_left_in_the_stores_files(tmp_path: Path) -> None:
    async with a_broker(tmp_path, Clock()) as broker:
        await broker.create_key()
        await broker.create_key(uri=OTHER_KEY)
        handles = [(await broker.owners.get(owner(), uri)).material().handle for uri in (KEY, OTHER_KEY)]
        await broker.destruction.schedule(owner(), KEY, MONTH)
        handles.append((await broker.owners.get(owner(), KEY)).material().handle)

        def found() -> list[bool]:
            content = b"".join(path.read_bytes() for path in tmp_path.glob("store.sqlite*"))
            return [handle in content for handle in handles]

        assert found() == [True, True, True]
        broker.clock.advance(days=30)
        await broker.destruction.carry_out()
        assert found() == [False, True, False]


async def test_a_destruction_is_called_off_within_its_waiting_period(broker: Broker) -> None:
    await broker.create_key()
    made, secret = await broker.generate()
    await broker.destruction.schedule(owner(), KEY, timedelta(days=1))
    record = await broker.destruction.cancel(owner(), KEY)
    assert (record.state, record.destroy_at_ms) == (KeyState.DISABLED, 0)
    broker.clock.advance(days=400)
    await broker.destruction.carry_out()
    await broker.owners.set_state(owner(), KEY, KeyState.ENABLED)
    assert await broker.open_key(made.wrapped) == secret


async def test_what_is_due_cannot_be_called_off_any_more(broker: Broker) -> None:
    await broker.create_key()
    await broker.destruction.schedule(owner(), KEY, timedelta(days=1))
    broker.clock.advance(days=1)
    await refused(broker.destruction.cancel(owner(), KEY), Code.KEY_STATE)
    await broker.destruction.carry_out()
    await refused(broker.destruction.cancel(owner(), KEY), Code.KEY_STATE)


async def test_a_key_that_ends_is_not_changed_meanwhile_or_afterwards(broker: Broker) -> None:
    await broker.create_key()

    async def changes() -> None:
        for attempt in (
            broker.owners.set_state(owner(), KEY, KeyState.ENABLED),
            broker.owners.rotate(owner(), KEY),
            broker.owners.retire(owner(), KEY, 1),
            broker.destruction.schedule(owner(), KEY, MONTH),
        ):
            await refused(attempt, Code.KEY_STATE)

    await refused(broker.destruction.cancel(owner(), KEY), Code.KEY_STATE)  # nothing to call off
    await broker.destruction.schedule(owner(), KEY, MONTH)
    await changes()
    broker.clock.advance(days=30)
    await broker.destruction.carry_out()
    await changes()
    await refused(broker.owners.withdraw_policy(owner(), KEY), Code.KEY_STATE)
    await refused(broker.owners.put_policy(owner(), KEY, b""), Code.KEY_STATE)
    # Its name stays taken.
    await refused(broker.owners.create(owner(), new_key()), Code.KEY_EXISTS)


@pytest.mark.parametrize("waiting", [timedelta(hours=23), timedelta(days=366)])
async def test_a_waiting_period_is_neither_too_short_nor_too_long(broker: Broker, waiting: timedelta) -> None:
    await broker.create_key()
    await refused(broker.destruction.schedule(owner(), KEY, waiting), Code.ARGUMENT_INVALID)
    assert await state_of(broker) is KeyState.ENABLED


async def test_a_tombstone_survives_restarts_and_verifies(tmp_path: Path) -> None:
    clock = Clock()
    async with a_broker(tmp_path, clock) as broker:
        await broker.create_key()
        await broker.owners.rotate(owner(), KEY)
        await broker.destruction.schedule(owner(), KEY, MONTH)
    clock.advance(days=31)
    async with a_broker(tmp_path, clock) as broker:
        assert await state_of(broker) is KeyState.DESTRUCTION_SCHEDULED
        await broker.destruction.carry_out()
    async with a_broker(tmp_path, clock) as broker:
        assert await state_of(broker) is KeyState.DESTROYED
        [listed] = await broker.owners.list(owner(), after="", limit=10)
        assert listed.backend == ""


async def test_the_broker_carries_out_what_is_due_by_itself(tmp_path: Path) -> None:
    """At its start, and then when a destruction that is scheduled while it runs becomes due."""
    clock = Clock()
    async with a_broker(tmp_path, clock) as broker:
        await broker.create_key()
        await broker.create_key(uri=OTHER_KEY)
        await broker.destruction.schedule(owner(), KEY, MONTH)
        clock.advance(days=31)
        keeping = asyncio.create_task(broker.destruction.keep_carrying_out())
        async with asyncio.timeout(10):
            while await state_of(broker) is not KeyState.DESTROYED:
                await asyncio.sleep(0)
        # Scheduling wakes it; when it looks, the clock of this test has gone on already.
        record = await broker.destruction.schedule(owner(), OTHER_KEY, timedelta(days=1))
        clock.advance(days=1)
        broker.destruction.look_again()
        async with asyncio.timeout(10):
            while record.state is not KeyState.DESTROYED:
                await asyncio.sleep(0)
                record = (await broker.owners.get(owner(), OTHER_KEY)).record
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


# In front of another store.


class CutShort(RemoteBackend):
    """A back end whose first destruction is done and never reported."""

    cut = True

    async def destroy(self, key: KeyRef, handle: bytes) -> None:
        await super().destroy(key, handle)
        if self.cut:
            self.cut = False
            raise CloisterError(Code.CUSTODIAN_UNAVAILABLE, what="the connection broke")


def remote(
    custodian: MemoryCustodian, clock: Clock, directory: Path, kind: type[RemoteBackend] = RemoteBackend
) -> Callable[[RootKey], KeyBackend]:
    return lambda root: kind(custodian, root, clock=clock, canary_file=directory / "canary")


async def test_a_destruction_erases_at_the_back_end_what_copies_of_the_disk_cannot_replace(tmp_path: Path) -> None:
    custodian, clock = MemoryCustodian(), Clock()
    async with a_broker(tmp_path, clock, remote(custodian, clock, tmp_path)) as broker:
        await broker.create_key()
        await broker.owners.rotate(owner(), KEY)
        stored = await broker.owners.get(owner(), KEY)
        kept = len(custodian.keys)
        await broker.destruction.schedule(owner(), KEY, MONTH)
        assert len(custodian.disabled) == 2  # the other store refuses, too
        clock.advance(days=30)
        await broker.destruction.carry_out()
        assert len(custodian.keys) == kept - 2
        # An old copy of the handle is worth nothing now.
        with pytest.raises(CloisterError):
            await broker.office.backend.generate(KeyRef.of(stored.record, 2), stored.material().handle)


async def test_a_destruction_that_was_cut_short_is_finished_later(tmp_path: Path) -> None:
    custodian, clock = MemoryCustodian(), Clock()
    async with a_broker(tmp_path, clock, remote(custodian, clock, tmp_path, CutShort)) as broker:
        await broker.create_key()
        await broker.destruction.schedule(owner(), KEY, MONTH)
        clock.advance(days=30)
        await broker.destruction.carry_out()
        assert await state_of(broker) is KeyState.DESTRUCTION_SCHEDULED
        await refused(broker.destruction.cancel(owner(), KEY), Code.KEY_STATE)
    async with a_broker(tmp_path, clock, remote(custodian, clock, tmp_path)) as broker:
        await broker.destruction.carry_out()
        assert await state_of(broker) is KeyState.DESTROYED


async def test_a_key_of_a_back_end_that_is_away_stays_due_and_holds_up_no_other(tmp_path: Path) -> None:
    custodian, clock = MemoryCustodian(), Clock()
    async with a_broker(tmp_path, clock, remote(custodian, clock, tmp_path)) as broker:
        await broker.create_key()
        await broker.destruction.schedule(owner(), KEY, MONTH)
        clock.advance(days=30)
        custodian.away = True
        await broker.destruction.carry_out()
        assert await state_of(broker) is KeyState.DESTRUCTION_SCHEDULED
        custodian.away = False
        await broker.destruction.carry_out()
        assert await state_of(broker) is KeyState.DESTROYED


async def test_what_was_made_for_a_key_that_could_not_be_stored_is_destroyed(tmp_path: Path) -> None:
    custodian, clock = MemoryCustodian(), Clock()
    async with a_broker(tmp_path, clock, remote(custodian, clock, tmp_path)) as broker:
        outcomes = await asyncio.gather(
            *(broker.owners.create(owner(), new_key(KEY, [Purpose.TRAIN])) for _ in range(4)), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, CloisterError)]
        assert [error.code for error in errors] == [Code.KEY_EXISTS] * 3
        assert len(custodian.keys) == 1
        await refused(broker.owners.create(owner(), new_key()), Code.KEY_EXISTS)
        assert custodian.calls.count("create") == 4  # a name that is known to be taken is not even tried


async def test_a_failed_change_at_the_back_end_changes_nothing(tmp_path: Path) -> None:
    custodian, clock = MemoryCustodian(), Clock()
    async with a_broker(tmp_path, clock, remote(custodian, clock, tmp_path)) as broker:
        await broker.create_key()
        before = await broker.owners.get(owner(), KEY)
        custodian.away = True
        for attempt in (
            broker.owners.rotate(owner(), KEY),
            broker.owners.set_state(owner(), KEY, KeyState.DISABLED),
            broker.destruction.schedule(owner(), KEY, MONTH),
        ):
            await refused(attempt, Code.CUSTODIAN_UNAVAILABLE)
        custodian.away = False
        assert await broker.owners.get(owner(), KEY) == before
        await broker.td().release()


def test_the_limits_have_room_for_what_they_are_for() -> None:
    assert owners.MAX_KEYS >= 10_000
    assert owners.MAX_VERSIONS > 366
