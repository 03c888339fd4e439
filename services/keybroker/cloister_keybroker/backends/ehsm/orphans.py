# SPDX-License-Identifier: Apache-2.0
"""Keys that EHSM made for this broker and that nothing uses: a broker that was killed, or an answer that was lost.

A key whose id is known is disabled when nothing uses it, and deleted a week later: should the list of what is in use
ever be wrong, the key is missed before it is gone. A key whose answer was lost has no name; what appeared at EHSM in
those minutes and is used by nothing is disabled, and left to EHSM's own sweep. Disabling can be undone.

An appid therefore belongs to one broker: another user's keys would look like these.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cloister import ehsm
from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger
from cloister_keybroker.backends import Clock
from cloister_keybroker.backends.ehsm.answers import ListedKey
from cloister_keybroker.backends.ehsm.client import EhsmClient
from cloister_keybroker.backends.ehsm.intents import Intent, Journal

# A request may be delayed on the way for as long as EHSM takes its timestamp, and clocks may differ by as much.
SETTLED_MS: Final = 2 * ehsm.TIMESTAMP_WINDOW_MS
# An answered request of this process is in the store within seconds, or never will be.
IN_FLIGHT_S: Final = SETTLED_MS / 1000
DELETE_AFTER_MS: Final = 7 * 86_400_000


class Orphans:
    """Tell keys that are in use, or about to be, from those that nobody will ever use."""

    def __init__(
        self,
        client: EhsmClient,
        journal: Journal,
        *,
        name: str,
        clock: Clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._journal = journal
        self._name = name
        self._clock = clock
        self._monotonic = monotonic
        self._creating = 0
        # Of this process, when they began: the clock on the wall may step, this one does not.
        self._begun: dict[Path, float] = {}
        self._reconciling = asyncio.Lock()

    @contextmanager
    def creating(self) -> Iterator[None]:
        """Mark that a key is being made: until it is over, a new key at EHSM may be this one."""
        self._creating += 1
        try:
            yield
        finally:
            self._creating -= 1

    def watch(self, intent: Intent) -> None:
        """Note that an intent is of this process."""
        self._begun[intent.path] = self._monotonic()

    def forget(self, keyid: str) -> None:
        """Drop the intent of a key that was deleted."""
        for intent in self._journal.all():
            if intent.keyid == keyid:
                self._drop(intent)

    async def reconcile(self, in_use: frozenset[str]) -> None:
        """Settle every intent that can be settled now; raise CloisterError when EHSM does not answer."""
        async with self._reconciling:
            now_ms = int(self._clock().timestamp() * 1000)
            intents = await asyncio.to_thread(self._journal.all)
            for intent in intents:
                if intent.keyid is not None:
                    await self._settle_known(intent, intent.keyid, in_use, now_ms)
            lost = [intent for intent in intents if intent.keyid is None and self._settled(intent, now_ms)]
            if lost and not self._creating:
                await self._settle_lost(lost, in_use | {intent.keyid for intent in intents if intent.keyid})

    async def _settle_known(self, intent: Intent, keyid: str, in_use: frozenset[str], now_ms: int) -> None:
        if keyid in in_use:
            await asyncio.to_thread(self._drop, intent)
        elif self._in_flight(intent):
            return
        elif intent.orphaned_ms is None:
            if await self._disable(keyid, why="nothing uses it"):
                await asyncio.to_thread(self._journal.orphaned, intent, now_ms)
            else:
                await asyncio.to_thread(self._drop, intent)
        elif now_ms - intent.orphaned_ms >= DELETE_AFTER_MS:
            await self._client.delete_key(keyid)
            await asyncio.to_thread(self._drop, intent)
            get_logger().warning("unused key at the back end deleted", backend=self._name, keyid=keyid)

    async def _settle_lost(self, lost: list[Intent], known: frozenset[str]) -> None:
        listed = await self._client.list_keys()
        if self._creating:
            return  # one of these may be the key that is being made
        for key in listed:
            if key.enabled and key.keyid not in known and any(_may_be(key, intent) for intent in lost):
                await self._disable(key.keyid, why="the answer to a request for it was lost, and nothing uses it")
        for intent in lost:
            await asyncio.to_thread(self._drop, intent)

    async def _disable(self, keyid: str, *, why: str) -> bool:
        """Disable a key; return False when it is gone already."""
        try:
            await self._client.disable_key(keyid)
        except CloisterError as error:
            if error.code is Code.CUSTODIAN_KEY_LOST:
                return False
            raise
        get_logger().warning("unused key at the back end disabled", backend=self._name, keyid=keyid, why=why)
        return True

    def _settled(self, intent: Intent, now_ms: int) -> bool:
        """Say whether a request without an answer can no longer be done."""
        return not self._in_flight(intent) and abs(now_ms - intent.started_ms) > SETTLED_MS

    def _in_flight(self, intent: Intent) -> bool:
        begun = self._begun.get(intent.path)
        return begun is not None and self._monotonic() - begun < IN_FLIGHT_S

    def _drop(self, intent: Intent) -> None:
        self._journal.drop(intent)
        self._begun.pop(intent.path, None)


def _may_be(key: ListedKey, intent: Intent) -> bool:
    return abs(key.created_ms - intent.started_ms) <= SETTLED_MS
