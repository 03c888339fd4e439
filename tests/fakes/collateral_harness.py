# SPDX-License-Identifier: Apache-2.0
"""Clocks that tests turn, and caches that use them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cloister.collateral.cache import CollateralCache, Rhythm
from cloister.collateral.client import ClientLimits, CollateralClient
from cloister.tdx.trustroot import TrustRoot
from fakes.collateral_authority import NOW
from fakes.fake_pccs import FakePccs

LIMITS = ClientLimits(connect_s=2.0, total_s=2.0)


class Clocks:
    """Wall clock and elapsed time; `advance` moves both, `set_back` only what can be set."""

    def __init__(self, now: datetime = NOW) -> None:
        self.now = now
        self.elapsed_s = 1000.0
        self.jitter = 0.0
        self.rhythm = Rhythm(lambda: self.now, lambda: self.elapsed_s, lambda: self.jitter)

    def advance(self, span: timedelta) -> None:
        self.now += span
        self.elapsed_s += span.total_seconds()

    def set_back(self, span: timedelta) -> None:
        self.now -= span


@asynccontextmanager
async def open_cache(
    pccs: FakePccs, path: Path, root: TrustRoot, clocks: Clocks, **options: Any
) -> AsyncIterator[CollateralCache]:
    """Open a cache in front of a PCCS; close both ends of it at the end."""
    async with CollateralClient(pccs.server, clock=lambda: clocks.now, limits=LIMITS) as client:
        cache = await CollateralCache.open(client, path, root=root, rhythm=clocks.rhythm, **options)
        try:
            yield cache
        finally:
            await cache.aclose()
