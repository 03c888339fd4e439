# SPDX-License-Identifier: Apache-2.0
"""Who changes a key takes a turn: a change reads, asks the back end, then writes, and none must be lost.

Owners, destruction and moves between back ends all wait here, each for the one key that it changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from cloister.keyuri import KeyUri


@dataclass(slots=True)
class _Turn:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    waiting: int = 0  # those who change the key, or wait to


class Turns:
    """One lock for every key that is being changed; for one event loop."""

    def __init__(self) -> None:
        self._turns: dict[KeyUri, _Turn] = {}

    @asynccontextmanager
    async def changing(self, uri: KeyUri) -> AsyncIterator[None]:
        """Wait for one's turn with a key."""
        turn = self._turns.setdefault(uri, _Turn())
        turn.waiting += 1
        try:
            async with turn.lock:
                yield
        finally:
            turn.waiting -= 1
            if not turn.waiting:
                del self._turns[uri]
