# SPDX-License-Identifier: Apache-2.0
"""Calls that block, in threads of their own: so many at once, so many waiting, and never longer than the deadline."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from cloister.errors import CloisterError, Code
from cloister_keybroker.backends.failures import unavailable

_T = TypeVar("_T")


class Workers:
    """A bulkhead around the calls to one back end. A call that hangs keeps its place; what waits does not pile up."""

    def __init__(self, name: str, threads: ThreadPoolExecutor, *, limit: int, deadline_s: float) -> None:
        self._name = name
        self._threads = threads
        self._limit = limit  # calls that run or wait
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._inside = 0

    async def run(self, work: Callable[[], _T]) -> _T:
        """Return what `work` returns; raise CUSTODIAN_BUSY or CUSTODIAN_UNAVAILABLE instead of waiting for long."""
        with self._lock:
            busy = self._inside >= self._limit
            self._inside += not busy
        if busy:
            raise CloisterError(
                Code.CUSTODIAN_BUSY,
                what=f"the back end {self._name} is asked too much at once",
                why=f"{self._limit} calls wait for it",
                todo="try again in a moment; if it stays so, the back end is too slow for the load",
            )
        future = self._threads.submit(work)
        future.add_done_callback(self._left)
        try:
            async with asyncio.timeout(self._deadline_s):
                return await asyncio.wrap_future(future)  # what has not begun at the deadline never begins
        except TimeoutError:
            raise unavailable(self._name, f"no answer within {self._deadline_s:g} s") from None

    def _left(self, _future: Future[Any]) -> None:
        with self._lock:
            self._inside -= 1
