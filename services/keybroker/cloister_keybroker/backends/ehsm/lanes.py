# SPDX-License-Identifier: Apache-2.0
"""A bulkhead: so many calls of one kind at once, so many waiting; another kind is not held up by them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cloister.errors import CloisterError, Code


class Lane:
    """Calls of one kind."""

    def __init__(self, backend: str, *, width: int, waiting: int) -> None:
        self.width = width
        self._backend = backend
        self._limit = width + waiting
        self._inside = 0
        self._places = asyncio.Semaphore(width)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place; raise CUSTODIAN_BUSY when too many wait already."""
        if self._inside >= self._limit:
            raise CloisterError(
                Code.CUSTODIAN_BUSY,
                what=f"the back end {self._backend} is asked too much at once",
                why=f"{self._limit} calls of this kind wait for it",
                todo="try again in a moment; if it stays so, the back end is too slow for the load",
            )
        self._inside += 1
        try:
            async with self._places:
                yield
        finally:
            self._inside -= 1
