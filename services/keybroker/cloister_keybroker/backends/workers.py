# SPDX-License-Identifier: Apache-2.0
"""Calls that block, in threads of their own: so many at once, so many waiting, and never longer than the deadline."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cloister.errors import CloisterError, Code
from cloister_keybroker.backends.failures import unavailable

_T = TypeVar("_T")


class Threads:
    """So many threads, begun when they are needed. A call that hangs in one does not keep the process from ending."""

    def __init__(self, name: str, count: int) -> None:
        self._name = name
        self._count = count
        self._queue: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._begun = 0

    def submit(self, work: Callable[[], _T]) -> Future[_T]:
        """Have `work` done; what it returns or raises is in the future."""
        future: Future[_T] = Future()
        with self._lock:
            if self._begun < self._count:
                self._begun += 1
                threading.Thread(target=self._serve, name=f"{self._name}-{self._begun}", daemon=True).start()
        self._queue.put((work, future))
        return future

    def close(self) -> None:
        """End the threads when what was submitted is done."""
        for _ in range(self._count):
            self._queue.put(None)

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            work, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits for the future
                future.set_exception(error)


class Workers:
    """A bulkhead around the calls to one back end. A call that hangs keeps its place; what waits does not pile up."""

    def __init__(self, name: str, threads: Threads, *, limit: int, deadline_s: float) -> None:
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
