# SPDX-License-Identifier: Apache-2.0
"""A few calls of an address at a time: whoever has many in flight waits for itself, not others for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Lets `at_once` calls of each address go on; those that come meanwhile wait in their order."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._gates: dict[str, tuple[asyncio.Semaphore, set[object]]] = {}

    def __len__(self) -> int:
        return len(self._gates)

    @asynccontextmanager
    async def of(self, address: str) -> AsyncIterator[None]:
        """Wait for a turn of this address, and give it back at the end."""
        gate, calls = self._gates.setdefault(address, (asyncio.Semaphore(self._at_once), set()))
        call = object()
        calls.add(call)
        try:
            async with gate:
                yield
        finally:
            calls.discard(call)
            if not calls:
                self._gates.pop(address, None)
