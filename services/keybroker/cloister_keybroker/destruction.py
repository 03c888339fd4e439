# SPDX-License-Identifier: Apache-2.0
"""The end of a key: scheduled by its owner, called off within a waiting period, carried out when that is over.

A key that is scheduled is released to nobody. Carrying out means: destroy every version at the back end, then put the
tombstone into the store, with its entry in the log. Both can be repeated, so an end that a crash cut short is
finished at the next start.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block
from cloister.release.keys import KeyState
from cloister.runtime.logging import get_logger
from cloister.transparency.entry import Entry
from cloister_keybroker.answers import argument_error
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.desk import Desk, Office, Owner
from cloister_keybroker.keys import KeyRecord
from cloister_keybroker.transaction import Transaction

WAITING_DEFAULT: Final = timedelta(days=30)
WAITING_LEAST: Final = timedelta(days=1)  # a weekend's mistake can be undone on Monday, a stolen certificate noticed
WAITING_MOST: Final = timedelta(days=365)
_LOOK_EVERY_S: Final = 60.0  # also how long a back end that failed is left alone


class DestructionDesk(Desk):
    """Schedule the end of keys, call it off, and carry out what is due."""

    def __init__(self, office: Office) -> None:
        super().__init__(office)
        self._scheduled = asyncio.Event()

    async def schedule(self, owner: Owner, uri: KeyUri, waiting: timedelta) -> KeyRecord:
        """Let a key be destroyed after a waiting period (zero: 30 days); until then nothing is released."""
        waiting = waiting or WAITING_DEFAULT
        if not WAITING_LEAST <= waiting <= WAITING_MOST:
            least, most = (int(limit.total_seconds()) for limit in (WAITING_LEAST, WAITING_MOST))
            raise argument_error("waiting_period_s", f"{int(waiting.total_seconds())}", f"{least} to {most}, or 0")
        async with self._office.changing(uri):
            before = await self._changeable(owner, uri, "schedule-destruction", KeyState.ENABLED, KeyState.DISABLED)
            due = self._office.now_ms() + int(waiting.total_seconds() * 1000)
            record = replace(before, state=KeyState.DESTRUCTION_SCHEDULED, destroy_at_ms=due)
            await self._restate(owner, "schedule-destruction", before, record)
        self.look_again()
        return record

    async def cancel(self, owner: Owner, uri: KeyUri) -> KeyRecord:
        """Call a destruction off; the key is disabled then."""
        action = "cancel-destruction"
        async with self._office.changing(uri):
            before = await self._changeable(owner, uri, action, KeyState.DESTRUCTION_SCHEDULED)
            if before.destroy_at_ms <= self._office.now_ms():
                # Its versions may be gone already, at least in part.
                block = Block("key.destroy_at", False, "within the waiting period", "after it")
                await self._deny(owner, action, uri, block)
                raise CloisterError(
                    Code.KEY_STATE,
                    what=f"the destruction of {uri} cannot be called off any more",
                    why="its waiting period is over",
                    todo="create another key",
                )
            record = replace(before, state=KeyState.DISABLED, destroy_at_ms=0)
            await self._restate(owner, action, before, record)
        return record

    def look_again(self) -> None:
        """Have `keep_carrying_out` look at what is due now."""
        self._scheduled.set()

    async def carry_out(self) -> None:
        """Destroy every key whose waiting period is over; one that fails is logged and stays due."""
        now, destroyed = self._office.now_ms(), False
        for uri in await self._store.read(lambda transaction: transaction.to_destroy(until_ms=now)):
            try:
                await self._destroy(uri)
                destroyed = True
            except CloisterError as error:
                get_logger().error("a key could not be destroyed yet", key_uri=str(uri), problem=str(error))
        if destroyed:
            await self._store.fold()

    async def keep_carrying_out(self) -> None:
        """Carry out what is due now and whenever something is, until cancelled."""
        while True:
            self._scheduled.clear()
            try:
                await self.carry_out()
                due = await self._store.read(lambda transaction: transaction.next_destruction_ms())
            except CloisterError as error:
                get_logger().error("what is due for destruction cannot be read", problem=str(error))
                due = None
            # The wall clock decides what is due, so it is looked at often enough to follow when somebody sets it.
            left_s = 0.0 if due is None else (due - self._office.now_ms()) / 1000
            with suppress(TimeoutError):
                # Nothing left of it means that the back end failed just now.
                await asyncio.wait_for(
                    self._scheduled.wait(), min(left_s, _LOOK_EVERY_S) if left_s > 0 else _LOOK_EVERY_S
                )

    async def _destroy(self, uri: KeyUri) -> None:
        async with self._office.changing(uri):
            stored = await self._store.read(lambda transaction: transaction.key(uri))
            # It may have been called off since it was listed.
            if stored is None or not _is_due(stored.record, self._office.now_ms()):
                return
            before = stored.record
            for version in await self._store.read(lambda transaction: transaction.versions(before)):
                await self._backend.destroy(KeyRef.of(before, version.number), version.handle)
            await self._bury(replace(before, state=KeyState.DESTROYED))
        get_logger().info("key destroyed", key_uri=str(uri))

    async def _bury(self, record: KeyRecord) -> None:
        """Put the tombstone into the store."""
        entry = Entry(
            action="destroy",
            tenant=record.uri.tenant,
            key_uri=str(record.uri),
            caller=str(self._office.broker_id),
            granted=True,
            blocks=(Block("key.destroy_at", True, "after the waiting period", "after the waiting period"),),
            key_version=record.newest,
            policy_digest=record.policy_digest,
            record_digest=record.digest(),
        )

        def work(transaction: Transaction) -> None:
            transaction.update_key(record)
            transaction.remove_versions(record.uri)
            transaction.append(entry, time_ms=self._office.now_ms())

        await self._store.write(work)


def _is_due(record: KeyRecord, now_ms: int) -> bool:
    return record.state is KeyState.DESTRUCTION_SCHEDULED and record.destroy_at_ms <= now_ms
