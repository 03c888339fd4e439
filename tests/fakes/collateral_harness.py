# SPDX-License-Identifier: Apache-2.0
"""What tests of collateral begin with: bundles, clocks that they turn, a PCCS that serves, caches in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from cloister.collateral.bundle import CollateralBundle
from cloister.collateral.cache import CollateralCache, Rhythm
from cloister.collateral.client import ClientLimits, CollateralClient
from cloister.collateral.commands import Imported, import_
from cloister.collateral.family import Edition, Family
from cloister.collateral.source import CollateralSource
from cloister.tdx.collateral import Collateral
from cloister.tdx.trustroot import TrustRoot
from fakes.collateral_authority import NOW, TDX_FAMILY, CollateralAuthority, Wish
from fakes.fake_pccs import FakePccs

DAY = timedelta(days=1)
EARLY = Family(TDX_FAMILY.fmspc, TDX_FAMILY.ca, TDX_FAMILY.tee, Edition.EARLY)
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


def bundle(authority: CollateralAuthority, wish: Wish | None = None, family: Family = TDX_FAMILY) -> CollateralBundle:
    """Return what an authority says about a family, as a bundle that was fetched at NOW."""
    return CollateralBundle(family, NOW, Collateral.of(authority.collateral(family, wish)))


def run_import(source: Path, directory: Path, authority: CollateralAuthority, **options: Any) -> Imported:
    """Import a file at NOW, or at `now`."""
    return import_(source, directory, root=authority.trust_root, now=options.pop("now", NOW), **options)


async def get(source: CollateralSource, family: Family = TDX_FAMILY) -> Collateral:
    """Ask a source for a family."""
    return await source.get(family.fmspc, family.ca, family.tee)


@asynccontextmanager
async def serving(authority: CollateralAuthority) -> AsyncIterator[FakePccs]:
    """Run a PCCS that has the collateral of TDX_FAMILY."""
    async with FakePccs() as server:
        server.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY))
        yield server


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
