# SPDX-License-Identifier: Apache-2.0
"""Keys on the move between back ends: what was sealed stays sealed, and what a crash cuts short is finished."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister.transparency.entry import Entry
from cloister_keybroker import rekey
from cloister_keybroker.backends import FreshDataKey, KeyBackend, KeyRef, Lifetime
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.backends.factory import Backends
from cloister_keybroker.backends.remote import RemoteBackend
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.moving import GRACE, KEPT, Mover
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import SealRecord
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import StoredKey, Transaction
from fakes.custodian_in_memory import MemoryCustodian, Moments

TENANT = "hospital-a"
OPERATOR = "spiffe://cloister.test/ns/ops/user/ada"


def uri(number: int) -> KeyUri:
    return KeyUri.parse(f"cloister-key://{TENANT}/datasets/k{number}")


class House:
    """A store with keys in two back ends, and a mover."""

    def __init__(self, store: KeyStore, root: RootKey, directory: Path) -> None:
        self.store, self.root, self.clock = store, root, Moments()
        self.custodian, self.other = MemoryCustodian(), MemoryCustodian(name="other")
        self.embedded = EmbeddedBackend(root)
        self.memory = RemoteBackend(self.custodian, root, clock=self.clock, canary_file=directory / "canary")
        self.second = RemoteBackend(self.other, root, clock=self.clock, canary_file=directory / "canary-2")
        self.sealed: dict[KeyUri, FreshDataKey] = {}

    def backends(self, *first: KeyBackend) -> Backends:
        return Backends([*first, *(b for b in (self.embedded, self.memory, self.second) if b not in first)])

    def mover(self, *first: KeyBackend) -> Mover:
        return Mover(self.store, self.backends(*first), caller=OPERATOR, clock=self.clock)

    async def make(self, number: int, backend: KeyBackend, state: KeyState = KeyState.ENABLED) -> KeyRef:
        """Make a key as an owner does, with a data key that was wrapped before anything moved."""
        record = KeyRecord(
            uri=uri(number),
            owner="spiffe://cloister.test/ns/hospital-a/user/office",
            signer="did:key:z6MktwupdmLXVVqTzCw4i46r4uGyosGXRnR3XjN4Zq7oMMsw",
            state=KeyState.ENABLED,
            purposes=frozenset({Purpose.TRAIN}),
            created_ms=1,
        )
        key = KeyRef.of(record, 1)
        handle = await backend.create(key)
        self.sealed[record.uri] = await backend.generate(key, handle)
        await self.store.write(
            lambda t: (t.insert_key(record, KeyVersion(1, handle, backend.name, 1)), self._log(t, record))
        )
        if state is not KeyState.ENABLED:
            handle = await backend.restate(key, handle, state)
            changed = replace(record, state=state)
            await self.store.write(lambda t: self._put(t, changed, KeyVersion(1, handle, backend.name, 1)))
            key = KeyRef.of(changed, 1)
        return key

    async def set_state(self, number: int, state: KeyState) -> None:
        """Do what an owner does: bring the version into another state, wherever it is."""
        async with self.store.turns.changing(uri(number)):
            stored = await self.stored(number)
            version = self.version(stored)
            handle = await self.backends().restate(KeyRef.of(stored.record, 1), version.handle, state)
            record = replace(stored.record, state=state)
            await self.store.write(lambda t: self._put(t, record, replace(version, handle=handle)))

    async def opens(self, number: int) -> bool:
        """Say whether the data key from the beginning opens with what the store says now."""
        stored = await self.stored(number)
        fresh = self.sealed[uri(number)]
        key = KeyRef.of(stored.record, 1)
        return await self.backends().unwrap(key, self.version(stored).handle, fresh.wrapped) == fresh.secret

    async def stored(self, number: int) -> StoredKey:
        found = await self.store.read(lambda t: t.key(uri(number), version=1))
        assert found is not None
        return found

    def version(self, stored: StoredKey) -> KeyVersion:
        assert stored.version is not None
        return stored.version

    async def where(self) -> dict[str, int]:
        return await self.store.read(lambda t: t.versions_by_backend())

    async def left(self) -> int:
        return len(await self.store.read(lambda t: t.retired.all()))

    def _put(self, transaction: Transaction, record: KeyRecord, version: KeyVersion) -> None:
        transaction.update_key(record)
        transaction.put_version(record.uri, version)
        self._log(transaction, record)

    def _log(self, transaction: Transaction, record: KeyRecord) -> None:
        entry = Entry(
            action="change",
            tenant=TENANT,
            key_uri=str(record.uri),
            caller=record.owner,
            granted=True,
            blocks=(),
            record_digest=record.digest(),
        )
        transaction.append(entry, time_ms=1)


@asynccontextmanager
async def opened(directory: Path, root: RootKey) -> AsyncIterator[House]:
    path = directory / "store.sqlite"
    store = await (KeyStore.open(path, root) if path.exists() else KeyStore.create(path, root, SealRecord()))
    try:
        yield House(store, root, directory)
    finally:
        store.close()


@pytest.fixture
def root() -> RootKey:
    return RootKey(SecretBytes(secrets.token_bytes(32)))


@pytest.fixture
async def house(tmp_path: Path, root: RootKey) -> AsyncIterator[House]:
    async with opened(tmp_path, root) as found:
        yield found


async def test_keys_move_to_another_back_end_and_open_what_they_opened(house: House, tmp_path: Path) -> None:
    for number in range(5):
        await house.make(number, house.embedded)
    done = await house.mover(house.memory).migrate(limit=3)
    assert (done.moved, done.left, done.problem) == (3, 2, None)
    done = await house.mover(house.memory).migrate(limit=100)
    assert (done.moved, done.left) == (2, 0)
    assert await house.where() == {"memory": 5}
    assert all([await house.opens(number) for number in range(5)])
    again = await house.mover(house.memory).migrate(limit=100)
    assert (again.moved, again.left) == (0, 0)
    house.store.close()
    reopened = await KeyStore.open(tmp_path / "store.sqlite", house.root)  # every row and the log hold
    reopened.close()


async def test_the_owner_reads_in_the_log_where_the_key_went_and_who_moved_it(house: House) -> None:
    await house.make(0, house.embedded)
    await house.mover(house.memory).migrate(limit=1)
    entry = (await house.store.read(lambda t: t.newest_entries(TENANT, key_uri=str(uri(0)), limit=1)))[0].entry
    assert (entry.action, entry.caller) == ("move", OPERATOR)
    assert [(block.name, block.wanted, block.got) for block in entry.blocks] == [("backend", "memory", "embedded")]


async def test_a_disabled_key_moves_and_stays_disabled(house: House) -> None:
    await house.make(0, house.memory, KeyState.DISABLED)
    await house.mover(house.second).migrate(limit=1)
    assert house.other.disabled == set(house.other.keys)
    await house.set_state(0, KeyState.ENABLED)
    assert await house.opens(0)


async def test_one_key_that_cannot_be_moved_does_not_stop_the_others(house: House) -> None:
    await house.make(0, house.memory)
    await house.make(1, house.memory)
    lost = next(iter(house.custodian.keys))
    del house.custodian.keys[lost]
    done = await house.mover(house.second).migrate(limit=10)
    assert (done.moved, done.left) == (1, 1)
    assert done.problem is not None
    assert done.problem.code is Code.CUSTODIAN_KEY_LOST


async def test_a_target_that_is_away_changes_nothing(house: House) -> None:
    await house.make(0, house.embedded)
    house.custodian.away = True
    done = await house.mover(house.memory).migrate(limit=10)
    assert (done.moved, done.left) == (0, 1)
    assert await house.where() == {"embedded": 1}
    assert await house.opens(0)


async def test_an_old_place_is_kept_for_a_week_for_the_sake_of_backups_and_then_given_up(house: House) -> None:
    await house.make(0, house.memory)
    before = house.version(await house.stored(0)).handle
    await house.mover(house.second).migrate(limit=1)
    mover = house.mover(house.second)
    house.clock.advance(days=6)
    assert await mover.give_up() == 0
    # A backup from before the move is of use.
    key = KeyRef.of((await house.stored(0)).record, 1)
    await house.memory.unwrap(key, before, house.sealed[uri(0)].wrapped)
    house.clock.advance(days=1)
    assert await mover.give_up() == 1
    assert house.custodian.keys == {}
    assert await house.left() == 0
    assert await house.opens(0)


@pytest.mark.parametrize("state", [KeyState.DISABLED, KeyState.DESTRUCTION_SCHEDULED])
async def test_an_old_place_of_a_closed_key_is_given_up_at_once(house: House, state: KeyState) -> None:
    """The handle from before the move would open the key though its owner has disabled it since."""
    await house.make(0, house.memory)
    await house.mover(house.second).migrate(limit=1)
    await house.set_state(0, state)
    mover = house.mover(house.second)
    assert await mover.give_up() == 0  # a release may be under way
    house.clock.now += GRACE
    assert await mover.give_up() == 1
    assert house.custodian.keys == {}


async def test_giving_up_is_tried_again_while_the_old_back_end_is_away(house: House) -> None:
    await house.make(0, house.memory)
    await house.mover(house.embedded).migrate(limit=1)
    house.clock.now += KEPT
    house.custodian.away = True
    assert await house.mover(house.embedded).give_up() == 0
    assert await house.left() == 1
    house.custodian.away = False
    assert await house.mover(house.embedded).give_up() == 1
    assert house.custodian.keys == {}


async def test_a_row_that_this_broker_did_not_write_destroys_nothing(
    house: House, tmp_path: Path, root: RootKey
) -> None:
    """Who can write to the disk must not have keys destroyed that a backup would bring back."""
    await house.make(0, house.memory)
    handle = house.version(await house.stored(0)).handle
    house.store.close()
    connection = apsw.Connection(str(tmp_path / "store.sqlite"))
    connection.execute(
        "INSERT INTO retired_handles VALUES (?, ?, 1, 'memory', 1, ?)", (handle, str(uri(0)), b"\x00" * 48)
    )
    connection.close()
    with pytest.raises(CloisterError) as caught:
        await KeyStore.open(tmp_path / "store.sqlite", root)
    assert caught.value.code is Code.STORE_DAMAGED
    assert len(house.custodian.keys) == 1


async def test_a_key_that_grows_old_is_renewed_in_time_and_its_old_place_kept_as_long(house: House) -> None:
    house.custodian.lifetime = Lifetime(timedelta(days=300), timedelta(days=340))
    await house.make(0, house.memory)
    mover = house.mover(house.memory)
    assert (await mover.maintain()).moved == 0
    house.clock.advance(days=301)
    assert (await mover.maintain()).moved == 1
    assert (await mover.maintain()).moved == 0
    assert len(house.custodian.keys) == 2
    house.clock.advance(days=100)
    await mover.give_up()
    assert len(house.custodian.keys) == 1
    assert await house.opens(0)


async def test_custodians_are_told_of_every_place_in_use_old_ones_among_them(house: House) -> None:
    class Remembering(MemoryCustodian):
        told: frozenset[bytes] = frozenset()

        async def reconcile(self, in_use: Collection[bytes]) -> None:
            self.told = frozenset(in_use)

    remembering = Remembering()
    house.memory._custodian = remembering
    await house.make(0, house.memory)
    await house.make(1, house.memory)
    await house.mover(house.second).migrate(limit=1)
    await house.mover(house.second).maintain()
    assert remembering.told == set(remembering.keys)
    assert len(remembering.told) == 2


async def test_an_owner_who_changes_the_key_meanwhile_waits_and_nothing_is_lost(house: House) -> None:
    for number in range(6):
        await house.make(number, house.memory)

    async def toggle(number: int) -> None:
        for state in (KeyState.DISABLED, KeyState.ENABLED) * 3:
            await house.set_state(number, state)

    async def move() -> None:
        for first in (house.second, house.embedded, house.memory, house.second):
            await house.mover(first).migrate(limit=100)

    await asyncio.gather(move(), *(toggle(number) for number in range(6)))
    house.clock.now += KEPT
    await house.mover(house.second).give_up()
    assert await house.where() == {"other": 6}
    assert all([await house.opens(number) for number in range(6)])
    assert house.custodian.keys == {}
    assert len(house.other.keys) == 6
    assert house.other.disabled == set()


async def test_what_the_store_could_not_be_told_is_not_left_at_the_new_place(house: House) -> None:
    await house.make(0, house.embedded)
    house.store.retire()  # sealed in this very moment

    async def reading(work: Callable[[Transaction], object]) -> object:
        return await house.store._database.read(
            lambda connection: work(Transaction(connection, house.root, house.store._registries))
        )

    house.store.read = reading  # type: ignore[assignment,method-assign]
    done = await house.mover(house.memory).migrate(limit=1)
    assert done.moved == 0
    assert house.custodian.keys == {}


async def test_old_places_survive_another_root_key(house: House, tmp_path: Path) -> None:
    await house.make(0, house.memory)
    await house.mover(house.second).migrate(limit=1)
    after = RootKey(SecretBytes(secrets.token_bytes(32)))
    handles = await rekey.remade_handles(house.store, house.backends(house.second), after, {})
    entry = Entry(action="rekey", tenant="ops", key_uri="", caller=OPERATOR, granted=True, blocks=())
    await house.store._database.write(
        lambda connection: rekey.replace(
            connection, old=house.root, new=after, record=SealRecord(), handles=handles, entry=entry, time_ms=1
        )
    )
    house.store.close()
    async with opened(tmp_path, after) as heir:
        assert await heir.left() == 1
        heir.custodian.keys = house.custodian.keys
        heir.clock.now += KEPT
        assert await heir.mover(heir.second).give_up() == 1
        assert house.custodian.keys == {}
