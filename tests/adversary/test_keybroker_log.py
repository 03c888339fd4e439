# SPDX-License-Identifier: Apache-2.0
"""An operator with the store's file puts an older one back, lets two go on from one, or puts another in its place."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.decisionlog import LogClient, Look
from cloister.identity import Role
from cloister.runtime.channel import open_channel
from cloister.transparency.seen import Seen
from fakes.keybroker_harness import OWNER, Broker, a_served_broker
from fakes.log_material import DROP_GUARDS, an_entry, edit


@asynccontextmanager
async def a_life(directory: Path, *, entries: int) -> AsyncIterator[tuple[Broker, LogClient]]:
    """A broker that starts, and logs some decisions."""
    async with a_served_broker(directory) as (broker, endpoint):
        for _ in range(entries):
            await broker.store.write(lambda t: t.append(an_entry(), time_ms=1))
        credentials = broker.ca.credentials(OWNER)
        async with open_channel(endpoint, role=Role.KEYBROKER, credentials=credentials) as channel:
            yield broker, LogClient(channel)


async def looked(directory: Path, *, entries: int, seen: Seen | None = None) -> Look:
    async with a_life(directory, entries=entries) as (broker, client):
        return await client.look(receipt_spki_der=broker.receipt_spki, seen=seen)


async def contradicted(directory: Path, *, entries: int, seen: Seen) -> str:
    with pytest.raises(CloisterError) as caught:
        await looked(directory, entries=entries, seen=seen)
    assert caught.value.code is Code.LOG_CONTRADICTED
    return caught.value.why


def put_aside(directory: Path) -> Path:
    """Keep a copy of everything, as an operator's snapshot does."""
    copy = directory.with_name(f"{directory.name}.copy")
    shutil.copytree(directory, copy)
    return copy


def put_back(copy: Path, directory: Path) -> None:
    shutil.rmtree(directory)
    shutil.copytree(copy, directory)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "broker"
    path.mkdir()
    return path


async def test_the_log_goes_on_from_life_to_life(directory: Path) -> None:
    first = await looked(directory, entries=3)
    second = await looked(directory, entries=0, seen=first.seen)
    third = await looked(directory, entries=2, seen=second.seen)
    assert [look.checkpoint.size for look in (first, second, third)] == [4, 5, 8]


async def test_a_store_that_was_rolled_back_is_noticed(directory: Path) -> None:
    await looked(directory, entries=1)
    copy = put_aside(directory)
    newest = await looked(directory, entries=5)
    put_back(copy, directory)
    assert "rolled back" in await contradicted(directory, entries=0, seen=newest.seen)


async def test_a_store_that_was_rolled_back_and_grew_again_is_noticed(directory: Path) -> None:
    await looked(directory, entries=1)
    copy = put_aside(directory)
    newest = await looked(directory, entries=2)
    put_back(copy, directory)
    assert "rewritten" in await contradicted(directory, entries=9, seen=newest.seen)


async def test_a_log_that_was_forked_is_noticed_by_who_saw_the_other_branch(directory: Path) -> None:
    root = await looked(directory, entries=2)
    copy = put_aside(directory)
    one = await looked(directory, entries=3, seen=root.seen)
    two = await looked(copy, entries=3, seen=root.seen)
    assert one.checkpoint.size == two.checkpoint.size
    assert "rewritten" in await contradicted(copy, entries=2, seen=one.seen)
    assert "rewritten" in await contradicted(directory, entries=2, seen=two.seen)


async def test_a_store_in_anothers_place_is_noticed(directory: Path, tmp_path: Path) -> None:
    mine = await looked(directory, entries=2)
    other = tmp_path / "other"
    other.mkdir()
    assert "replaced" in await contradicted(other, entries=9, seen=mine.seen)


async def test_a_log_cannot_be_cut_even_by_the_brokers_own_older_head(directory: Path) -> None:
    """Rows of an older state, MACs and all, over the newer entries."""
    await looked(directory, entries=1)
    copy = put_aside(directory)
    await looked(directory, entries=4)
    store = directory / "store.sqlite"
    edit(
        store,
        *DROP_GUARDS,
        f"ATTACH '{copy / 'store.sqlite'}' AS old",
        "DELETE FROM log_head",
        "INSERT INTO log_head SELECT * FROM old.log_head",
    )
    with pytest.raises(CloisterError) as caught:
        await looked(directory, entries=0)
    assert caught.value.code is Code.STORE_DAMAGED
