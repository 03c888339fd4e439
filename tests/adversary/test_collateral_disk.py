# SPDX-License-Identifier: Apache-2.0
"""The operator owns the disk: whatever a cache file says, what is served has verified."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from cloister.collateral.cache import CollateralCache
from cloister.collateral.client import CollateralClient
from cloister.collateral.family import Family
from cloister.collateral.store import CollateralStore
from fakes.collateral_authority import TDX_FAMILY, CollateralAuthority
from fakes.collateral_harness import LIMITS, Clocks, get, open_cache, serving
from fakes.fake_pccs import FakePccs


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


@pytest.fixture(scope="module")
def evil() -> CollateralAuthority:
    """Return an authority with the same names and another root."""
    return CollateralAuthority()


@pytest.fixture
async def pccs(authority: CollateralAuthority) -> AsyncIterator[FakePccs]:
    async with serving(authority) as server:
        yield server


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


class TestCacheFile:
    async def test_a_row_that_was_changed_is_not_believed(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, evil: CollateralAuthority, clocks: Clocks
    ) -> None:
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            good = await get(cache)
        forged = evil.collateral(TDX_FAMILY)
        connection = apsw.Connection(str(path))
        body = f'{{"tcbInfo":{forged["tcb_info"]},"signature":"{forged["tcb_info_signature"]}"}}'
        connection.execute("UPDATE answers SET body = ? WHERE kind = 'tcb-info'", (body.encode(),))
        connection.execute("UPDATE answers SET body = x'30' WHERE kind = 'root-crl'")
        connection.close()
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            assert (await get(cache)).digest == good.digest
        assert len(pccs.requests) == 6, "the two were fetched again"

    @pytest.mark.parametrize(
        "change",
        [
            "UPDATE answers SET fetched_at = 9223372036854775807",
            "UPDATE answers SET fetched_at = 253402300799000",
            "UPDATE answers SET fetched_at = -62135596800000",
            "UPDATE answers SET kind = 'other'",
            "UPDATE answers SET tee = 'sgx' WHERE kind = 'tcb-info'",
            "UPDATE answers SET fmspc = x'00' WHERE kind = 'tcb-info'",
            "UPDATE answers SET chain_header = NULL",
            "UPDATE answers SET chain_header = '%'",
            "UPDATE answers SET url = 'http://[' || kind",
            "DELETE FROM answers",
        ],
    )
    async def test_whatever_the_file_says_the_cache_opens_and_serves(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks, change: str
    ) -> None:
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            good = await get(cache)
        connection = apsw.Connection(str(path))
        connection.execute(change)
        connection.close()
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            assert (await get(cache)).digest == good.digest

    async def test_one_familys_answer_under_another_familys_url_is_not_served(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        other = Family.of("90c06f000000", "platform", "tdx")
        pccs.serve(other, authority.collateral(other))
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY))
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            await cache.get(other.fmspc, other.ca, other.tee)
        connection = apsw.Connection(str(path))
        ours, theirs = pccs.server.tcb_info(TDX_FAMILY).url, pccs.server.tcb_info(other).url
        connection.execute("UPDATE answers SET url = ? WHERE url = ?", (ours, theirs))
        connection.close()
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            info = json.loads((await get(cache)).tcb_info)
        assert info["fmspc"] == "B0C06F000000"

    async def test_a_full_disk_costs_the_memory_after_a_restart_and_nothing_else(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        path = tmp_path / "cache.db"
        store = CollateralStore.open(path, root_fingerprint=authority.trust_root.fingerprint)
        database = store._database
        pages = database.read_sync(lambda connection: connection.pragma("page_count"))
        # SQLite answers SQLITE_FULL beyond it.
        database.read_sync(lambda connection: connection.pragma("max_page_count", pages))
        async with CollateralClient(pccs.server, limits=LIMITS) as client:
            cache = CollateralCache(client, store, root=authority.trust_root, rhythm=clocks.rhythm)
            good = await get(cache)
            assert await get(cache) is good
            await cache.aclose()
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            assert (await get(cache)).digest == good.digest
