# SPDX-License-Identifier: Apache-2.0
"""A key that was read before comes from memory while nothing changed, and never a moment longer."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState
from cloister_keybroker.keycache import Memo
from fakes.keybroker_harness import KEY, OTHER_KEY, a_broker, owner


def test_a_memo_asks_once_and_keeps_the_last_ones() -> None:
    memo, asked = Memo[int](capacity=2), []

    def make(value: int) -> int:
        asked.append(value)
        return value

    for value in (1, 2, 1, 3, 1, 2):
        assert memo.get(value, lambda value=value: make(value)) == value  # type: ignore[misc]
    assert asked == [1, 2, 3, 2]
    assert memo.look(1) == 1
    assert memo.look(3) is None


def test_what_fails_is_asked_again() -> None:
    memo = Memo[int]()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            memo.get("x", lambda: 1 // 0)
    assert memo.get("x", lambda: 1) == 1


async def test_a_key_is_read_once_until_any_key_changes(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        first = await broker.store.key(KEY)
        assert await broker.store.key(KEY) is first
        await broker.create_key(uri=OTHER_KEY)
        second = await broker.store.key(KEY)
        assert (second is first, second == first) == (False, True)
        await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
        third = await broker.store.key(KEY)
        assert third is not None
        assert third.record.state is KeyState.DISABLED
        assert await broker.store.key(OTHER_KEY, version=9) == await broker.store.read(
            lambda t: t.key(OTHER_KEY, version=9)
        )


async def test_a_release_that_began_before_a_change_sees_it(tmp_path: Path) -> None:
    """The nonce was given while the key was enabled, and its record was in memory."""
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        td = broker.td()
        nonce = await td.begin()
        await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
        with pytest.raises(CloisterError) as caught:
            await broker.releases.release(td.workload, td.asked(nonce, td.token(nonce)))
        assert caught.value.code is Code.KEY_DISABLED


async def test_a_change_that_was_undone_leaves_no_trace_in_memory(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        with pytest.raises(RuntimeError):
            await broker.store.write(lambda t: [t.remove_versions(KEY), (_ for _ in ()).throw(RuntimeError)][0])
        found = await broker.store.key(KEY)
        assert found is not None
        assert found.version is not None
        td = broker.td()
        td.open(await td.release())


async def test_a_row_edited_under_a_running_broker_is_refused_although_the_old_one_was_known(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await broker.td().release()

        def edit(connection: apsw.Connection) -> None:
            connection.execute("UPDATE keys SET min_version = 0")

        await broker.store._database.write(edit)
        with pytest.raises(CloisterError) as caught:
            await broker.td().release()
        assert caught.value.code is Code.STORE_DAMAGED


async def test_a_retired_store_gives_nothing_from_memory(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await broker.store.key(KEY)
        broker.store.retire()
        with pytest.raises(CloisterError) as caught:
            await broker.store.key(KEY)
        assert caught.value.code is Code.BROKER_SEALED
