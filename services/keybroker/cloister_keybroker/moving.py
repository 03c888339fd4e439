# SPDX-License-Identifier: Apache-2.0
"""Key versions on the move: to the back end of the configuration, and to a new key in the one they are in.

A version's wrapping key stays the same, and with it everything that was ever sealed. First the new place is made; then
the store is told in one transaction, which also remembers the old place; that is given up later. At no moment is there
none, and what a crash cut short is finished afterwards.

An old place is kept for a week, since a backup from before the move knows no other. It is given up at once when its key
is disabled or destroyed: no copy of the disk may open what the owner has closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Final, TypeAlias

from cloister.errors import CloisterError
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block
from cloister.runtime.logging import get_logger
from cloister.transparency.entry import Entry
from cloister_keybroker.backends import Capability, KeyRef
from cloister_keybroker.backends.factory import Backends, backend_of
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.retired import Retired
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import Transaction

# The new handle of a version, or None when it stays where it is.
_Remake: TypeAlias = Callable[[KeyRef, bytes], Awaitable[bytes | None]]

KEPT: Final = timedelta(days=7)
GRACE: Final = timedelta(minutes=1)  # longer than any release takes that has read the old handle
_MAINTAIN_EVERY: Final = timedelta(hours=1)
_LOOK_EVERY_S: Final = 300.0


@dataclass(frozen=True, slots=True)
class Moved:
    """What one round did."""

    moved: int
    left: int  # key versions that are still elsewhere
    problem: CloisterError | None  # the first one, when there was any


class Mover:
    """Move, renew and give up places of one store; `caller` stands in the log for who had it done."""

    def __init__(self, store: KeyStore, backends: Backends, *, caller: str, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._backends = backends
        self._caller = caller
        self._clock = clock

    async def migrate(self, *, limit: int) -> Moved:
        """Bring up to `limit` key versions to the first back end. One that cannot be moved does not stop the others."""
        name = self._backends.name
        places = await self._store.read(lambda transaction: transaction.versions_elsewhere(name, limit=limit))
        moved, problem = await self._each(places, self._backends.move, "move")
        counts = await self._store.read(lambda transaction: transaction.versions_by_backend())
        return Moved(moved, sum(count for backend, count in counts.items() if backend != name), problem)

    async def maintain(self) -> Moved:
        """Make again what is due at its back end, before that deletes it; then look for what nothing uses there."""
        now = self._clock()

        async def remake(key: KeyRef, handle: bytes) -> bytes | None:
            return await self._backends.maintain(key, handle, now)

        moved, problem = 0, None
        for name in self._names(Capability.EXPIRES):
            versions = await self._store.read(partial(Transaction.versions_at, backend=name))
            done, first = await self._each([(uri, number) for uri, number, _ in versions], remake, "rewrap")
            moved, problem = moved + done, problem or first
        try:
            await self._backends.reconcile(
                await self._store.read(partial(_handles, names=self._names(Capability.SPLIT)))
            )
        except CloisterError as error:
            problem = problem or error
            get_logger().warning("keys that nothing uses were not looked for", problem=str(error))
        return Moved(moved, 0, problem)

    async def give_up(self) -> int:
        """Have back ends destroy the old places whose time is over; return how many they did."""
        done, now_ms = 0, self._now_ms()
        for retired in await self._store.read(partial(_over, now_ms=now_ms)):
            try:
                await self._backends.destroy(retired.key, retired.handle)
                await self._store.write(partial(_forget, handle=retired.handle))
                done += 1
            except CloisterError as error:
                get_logger().warning("an unused key stays at its back end", backend=retired.backend, problem=str(error))
        return done

    async def keep_up(self) -> None:
        """Give up old places and maintain the others, until cancelled."""
        maintained: datetime | None = None
        while True:
            try:
                if maintained is None or abs(self._clock() - maintained) >= _MAINTAIN_EVERY:
                    maintained = self._clock()
                    await self.maintain()
                await self.give_up()
            except CloisterError as error:
                get_logger().error("key versions could not be looked after", problem=str(error))
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _each(
        self, places: list[tuple[KeyUri, int]], remake: _Remake, action: str
    ) -> tuple[int, CloisterError | None]:
        moved, problem = 0, None
        for uri, number in places:
            try:
                async with self._store.turns.changing(uri):
                    moved += await self._move(uri, number, remake, action)
            except CloisterError as error:
                problem = problem or error
                get_logger().error("a key version was not moved", key_uri=str(uri), version=number, problem=str(error))
        return moved, problem

    async def _move(self, uri: KeyUri, number: int, remake: _Remake, action: str) -> bool:
        found = await self._store.read(lambda transaction: transaction.key(uri, version=number))
        if found is None or found.version is None:
            return False  # destroyed meanwhile
        key, old = KeyRef.of(found.record, number), found.version
        handle = await remake(key, old.handle)
        if handle is None:
            return False
        new = replace(old, handle=handle, backend=backend_of(key, handle))
        now_ms = self._now_ms()

        def work(transaction: Transaction) -> None:
            transaction.put_version(uri, new)
            transaction.retired.add(Retired(uri, number, old.handle, old.backend, now_ms))
            transaction.append(_entry(action, self._caller, found.record, old, new), time_ms=now_ms)

        try:
            await self._store.write(work)
        except CloisterError:
            await self._backends.destroy(key, handle)  # the store knows nothing of it
            raise
        return True

    def _names(self, capability: Capability) -> list[str]:
        return [backend.name for backend in self._backends.all() if capability in backend.capabilities]

    def _now_ms(self) -> int:
        return int(self._clock().timestamp() * 1000)


def _over(transaction: Transaction, *, now_ms: int) -> list[Retired]:
    """Return the old places whose time is over."""
    kept_ms, closed_ms = (now_ms - int(time.total_seconds() * 1000) for time in (KEPT, GRACE))
    return transaction.retired.over(kept_ms=kept_ms, closed_ms=closed_ms)


def _forget(transaction: Transaction, *, handle: bytes) -> None:
    transaction.retired.remove(handle)


def _handles(transaction: Transaction, *, names: list[str]) -> list[bytes]:
    """Return what the store has of these back ends, old places among it."""
    found = []
    for name in names:
        found += [handle for _, _, handle in transaction.versions_at(name)]
        found += transaction.retired.handles_at(name)
    return found


def _entry(action: str, caller: str, record: KeyRecord, old: KeyVersion, new: KeyVersion) -> Entry:
    """Return the entry by which the key's owner learns where a version is now."""
    return Entry(
        action=action,
        tenant=record.uri.tenant,
        key_uri=str(record.uri),
        caller=caller,
        granted=True,
        blocks=(Block("backend", True, new.backend, old.backend),),
        key_version=new.number,
        policy_digest=record.policy_digest,
        record_digest=record.digest(),
    )
