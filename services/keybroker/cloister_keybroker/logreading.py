# SPDX-License-Identifier: Apache-2.0
"""The whole log read again in every life of the broker and every day, a little at a time.

A start compares what the broker counts and looks up by, in seconds; the bytes of old entries it leaves alone
(logcheck.py). They are hashed here, behind the work of the day. What does not verify ends all work: a broker that
knows its log to be changed must not go on as if it were not.
"""

from __future__ import annotations

import asyncio
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.merkle import Frontier
from cloister.runtime.logging import get_logger
from cloister_keybroker import logcheck
from cloister_keybroker.store import KeyStore

_STEP: Final = 256  # entries: some 5 ms of the database's one thread
_EVERY_S: Final = 24 * 3600.0
PAUSE_S: Final = 0.25  # between two steps: a million entries in twenty minutes, at a fiftieth of that thread


async def keep_reading(store: KeyStore) -> None:
    """Read the whole log now and every day, until cancelled."""
    while True:
        await read_whole_log(store)
        await asyncio.sleep(_EVERY_S)


async def read_whole_log(store: KeyStore, *, pause_s: float = PAUSE_S) -> None:
    """Hash every entry of every complete segment; what is behind them was hashed at the start."""
    try:
        segments = await store.read(lambda transaction: transaction.log.head().size // logcheck.SEGMENT)
        for number in range(segments):
            await _read_segment(store, number, pause_s)
    except CloisterError as error:
        if error.code is not Code.STORE_DAMAGED:
            raise
        get_logger().critical("the decision log was changed", what=error.what, why=error.why)
        store.condemn(error)
    else:
        get_logger().info("decision log read", segments=segments)


async def _read_segment(store: KeyStore, number: int, pause_s: float) -> None:
    begin = number * logcheck.SEGMENT
    frontier = Frontier()
    for first in range(begin, begin + logcheck.SEGMENT, _STEP):
        before = frontier
        frontier = await store.read(
            lambda transaction: transaction.log.walk(before, first, first + _STEP)  # noqa: B023 - run at once
        )
        await asyncio.sleep(pause_s)
    await store.read(lambda transaction: transaction.log.check_segment(number, frontier.root()))
