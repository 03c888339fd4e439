# SPDX-License-Identifier: Apache-2.0
"""Spread batches of segments over several threads.

The AEAD, pread and pwrite release the interpreter lock, and segments are independent of each other, so threads are
enough to use the cores. Threads live for one call: nothing outlasts it, and nothing is lost when a process forks.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Final

# More threads than this only wait for memory.
_MAX_WORKERS: Final = 8

Job = Callable[[int], None]


def cores() -> int:
    """Return how many threads this process may keep busy: the cores it is allowed to run on, at most 8."""
    return min(_MAX_WORKERS, len(os.sched_getaffinity(0)))


def spread(jobs: int, worker: Callable[[], Job], *, workers: int) -> None:
    """Run jobs 0 to `jobs` - 1, each once, on at most `workers` threads, the caller's among them.

    `worker` is called once in every thread and returns what runs one job there, with buffers of its own. Jobs start
    in order. After the first failure no further job starts; when all threads have ended, the failure of the earliest
    job is raised.
    """
    turn = _Turn(jobs)
    threads = [
        threading.Thread(target=turn.work, args=(worker,), name="cloister sealed", daemon=True)
        for _ in range(min(workers, jobs) - 1)
    ]
    for thread in threads:
        thread.start()
    turn.work(worker)
    for thread in threads:
        thread.join()
    turn.raise_first()


class _Turn:
    """Whose turn it is, and what went wrong."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._next = 0
        self._lock = threading.Lock()
        self._failures: dict[int, BaseException] = {}

    def work(self, worker: Callable[[], Job]) -> None:
        """Take jobs until there are none; what one raises is kept for the caller's thread."""
        run = worker()
        while (index := self._take()) >= 0:
            try:
                run(index)
            except BaseException as error:  # noqa: BLE001 - handed over to the caller's thread, which raises it
                with self._lock:
                    self._failures[index] = error

    def raise_first(self) -> None:
        if self._failures:
            raise self._failures[min(self._failures)]

    def _take(self) -> int:
        with self._lock:
            if self._next >= self._jobs or self._failures:
                return -1
            self._next += 1
            return self._next - 1
