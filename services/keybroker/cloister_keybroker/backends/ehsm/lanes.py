# SPDX-License-Identifier: Apache-2.0
"""A bulkhead: so many calls of one kind at once, so many waiting; another kind is not held up by them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cloister.errors import Code
from cloister_keybroker.backends.ehsm.failures import Undone


class Lane:
    """Calls of one kind."""

    def __init__(self, backend: str, *, width: int, waiting: int) -> None:
        self._backend = backend
        self._limit = width + waiting
        self._inside = 0
        self._places = asyncio.Semaphore(width)

    @asynccontextmanager
    async def place(self, deadline: float) -> AsyncIterator[None]:
        """Wait for a place until `deadline` (the loop's time); raise CUSTODIAN_BUSY when there is none."""
        if self._inside >= self._limit:
            raise self._busy(f"{self._limit} calls of this kind run or wait")
        self._inside += 1
        try:
            try:
                async with asyncio.timeout_at(deadline):
                    await self._places.acquire()
            except TimeoutError:
                raise self._busy("there was no place in time: it answers too slowly") from None
            try:
                yield
            finally:
                self._places.release()
        finally:
            self._inside -= 1

    def _busy(self, why: str) -> Undone:
        return Undone(
            Code.CUSTODIAN_BUSY,
            what=f"the back end {self._backend} is asked too much at once",
            why=why,
            todo="try again in a moment; if it stays so, the back end is too slow for the load",
        )
