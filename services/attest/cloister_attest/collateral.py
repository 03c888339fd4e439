# SPDX-License-Identifier: Apache-2.0
"""The source of collateral that the configuration names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import prometheus_client

from cloister.collateral.cache import CollateralCache
from cloister.collateral.client import CollateralClient
from cloister.collateral.offline import OfflineCollateral
from cloister.collateral.resources import INTEL_ROOT_CRL, CollateralServer
from cloister.collateral.source import CollateralSource
from cloister.collateral.watch import CollateralWatch
from cloister.runtime.marks import Marks
from cloister.tdx.trustroot import TrustRoot
from cloister_attest.config import CollateralSection


@asynccontextmanager
async def open_collateral(
    section: CollateralSection,
    *,
    root: TrustRoot,
    base: Path,
    state_dir: Path,
    registry: prometheus_client.CollectorRegistry,
    marks: Marks,
) -> AsyncIterator[CollateralSource]:
    """Give the source, kept fresh while it is in use; `base` is what its directory is relative to.

    `marks` remember what is newest of a directory of bundles; the file of a cache does so itself.
    """
    kind, _, place = section.source.partition(":")
    watch = CollateralWatch(registry)
    if kind == "offline":
        yield OfflineCollateral((base / place).resolve(), root=root, edition=section.update, watch=watch, marks=marks)
        return
    server = (
        CollateralServer(place.rstrip("/"), INTEL_ROOT_CRL, section.ca_file)
        if kind == "pcs"
        else CollateralServer.pccs(place, ca_file=section.ca_file)
    )
    async with CollateralClient(server) as client:
        path = state_dir / "collateral.sqlite"
        cache = await CollateralCache.open(client, path, root=root, edition=section.update, watch=watch)
        refresh = asyncio.create_task(cache.run(), name="collateral refresh")
        try:
            yield cache
        finally:
            refresh.cancel()
            await asyncio.gather(refresh, return_exceptions=True)
            await cache.aclose()
