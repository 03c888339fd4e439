# SPDX-License-Identifier: Apache-2.0
"""What a cache makes of a server's answers, and what it tells its operators."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import prometheus_client
import pytest
import structlog

from cloister.collateral.cache import CollateralCache
from cloister.collateral.client import CollateralClient
from cloister.collateral.failures import FetchFailed
from cloister.collateral.family import Family
from cloister.collateral.resources import DocumentKind
from cloister.collateral.watch import CollateralWatch
from cloister.errors import CloisterError, Code
from fakes.collateral_authority import NOW, TDX_FAMILY, CollateralAuthority
from fakes.collateral_harness import DAY, LIMITS, Clocks, get, open_cache, serving
from fakes.fake_pccs import FakePccs, Reply, lies

SECOND = timedelta(seconds=1)
END = NOW + 29 * DAY  # of what the authority signs by default
TCB = DocumentKind.TCB_INFO


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


@pytest.fixture
async def pccs(authority: CollateralAuthority) -> AsyncIterator[FakePccs]:
    async with serving(authority) as server:
        yield server


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
async def cache(
    pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
) -> AsyncIterator[CollateralCache]:
    async with open_cache(pccs, tmp_path / "cache.db", authority.trust_root, clocks) as opened:
        yield opened


async def refused(cache: CollateralCache, code: Code, family: Family = TDX_FAMILY) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await get(cache, family)
    assert caught.value.code is code
    return caught.value


class TestServersAnswers:
    async def test_not_found_is_believed_for_minutes(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        unknown = Family.of("112233445566", "platform", "tdx")
        error = await refused(cache, Code.COLLATERAL_NOT_FOUND, unknown)
        assert "pccsadmin" in error.todo
        await refused(cache, Code.COLLATERAL_NOT_FOUND, unknown)
        assert pccs.count(TCB) == 1
        pccs.serve(unknown, authority.collateral(unknown))
        clocks.advance(timedelta(minutes=10))
        await get(cache, unknown)

    @pytest.mark.parametrize("status", [429, 503])
    async def test_retry_after_is_waited_out(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks, status: int
    ) -> None:
        pccs.lie(TCB, lies.status(status, retry_after="120"))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        pccs.honest()
        clocks.advance(timedelta(seconds=119))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        assert pccs.count(TCB) == 1
        clocks.advance(SECOND)
        await get(cache)

    async def test_a_retry_after_may_be_a_date(self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks) -> None:
        pccs.lie(TCB, lies.status(503, retry_after="Sun, 01 Nov 2026 12:05:00 GMT"))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        pccs.honest()
        clocks.advance(timedelta(minutes=4))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        clocks.advance(timedelta(minutes=1))
        await get(cache)

    @pytest.mark.parametrize("value", ["soon", "-5", "1e9", "", "Sun, 99 Nov 2026 12:05:00 GMT"])
    async def test_a_retry_after_that_is_neither_is_ignored(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks, value: str
    ) -> None:
        pccs.lie(TCB, lies.status(503, retry_after=value))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        pccs.honest()
        clocks.advance(timedelta(seconds=2))
        await get(cache)

    async def test_nobody_keeps_us_waiting_for_days(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks
    ) -> None:
        pccs.lie(TCB, lies.status(429, retry_after="999999999"))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        pccs.honest()
        clocks.advance(timedelta(hours=6))
        await get(cache)

    async def test_a_quota_holds_back_requests_for_other_documents_too(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        await get(cache)
        other = Family.of("90c06f000000", "platform", "tdx")
        third = Family.of("50806f000000", "platform", "tdx")
        pccs.lie(TCB, lies.status(429))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE, other)
        await refused(cache, Code.COLLATERAL_UNAVAILABLE, third)
        assert pccs.count(TCB) == 2

    async def test_an_evaluation_number_that_is_gone_is_dropped(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        for kind in (pccs.server.tcb_info, pccs.server.qe_identity):
            pccs.serve_at(kind(TDX_FAMILY, 18).url.removeprefix(pccs.server.base_url), Reply(410))
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks, evaluation_number=18) as cache:
            assert b'"tcbEvaluationDataNumber":20' in (await get(cache)).tcb_info
            assert [request for request in pccs.requests if "DataNumber=18" in request]

    async def test_a_server_that_ignores_the_evaluation_number_is_not_believed(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        base = pccs.server.base_url
        for kind in (pccs.server.tcb_info, pccs.server.qe_identity):
            standard = pccs.reply_of(kind(TDX_FAMILY).url.removeprefix(base))
            pccs.serve_at(kind(TDX_FAMILY, 18).url.removeprefix(base), standard)
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks, evaluation_number=18) as cache:
            error = await refused(cache, Code.COLLATERAL_INVALID)
            assert "evaluation 20" in error.why

    async def test_a_number_that_goes_while_its_documents_are_good_is_dropped_too(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        base = pccs.server.base_url
        pinned = [
            kind(TDX_FAMILY, 20).url.removeprefix(base) for kind in (pccs.server.tcb_info, pccs.server.qe_identity)
        ]
        for path in pinned:
            standard = path.replace("tcbEvaluationDataNumber=20", "update=standard")
            pccs.serve_at(path, pccs.reply_of(standard))
        file = tmp_path / "cache.db"
        async with open_cache(pccs, file, authority.trust_root, clocks, evaluation_number=20) as cache:
            await get(cache)
            assert not [request for request in pccs.requests if "update=" in request]
            for path in pinned:
                pccs.serve_at(path, Reply(410))
            clocks.advance(20 * DAY)
            await cache.refresh_due()
            await get(cache)
            assert [request for request in pccs.requests if "update=standard" in request]


class TestWarning:
    async def test_it_warns_once_a_day_from_seven_days_before_the_end(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        registry = prometheus_client.CollectorRegistry()
        with structlog.testing.capture_logs() as logs:
            watch = CollateralWatch(registry)
            path = tmp_path / "cache.db"
            async with open_cache(pccs, path, authority.trust_root, clocks, watch=watch) as cache:
                await get(cache)
                for kind in DocumentKind:
                    pccs.lie(kind, lies.status(500))

                async def warnings() -> list[str]:
                    logs.clear()
                    await cache.refresh_due()
                    return [line["event"] for line in logs if line["event"].startswith("collateral ")]

                clocks.advance(END - NOW - 7 * DAY - SECOND)
                assert "collateral expires soon" not in await warnings()
                assert registry.get_sample_value("cloister_collateral_expiring_documents") == 0
                clocks.advance(SECOND)
                assert (await warnings()).count("collateral expires soon") == 4
                assert registry.get_sample_value("cloister_collateral_expiring_documents") == 4
                assert "collateral expires soon" not in await warnings()
                clocks.advance(DAY)
                assert (await warnings()).count("collateral expires soon") == 4
                clocks.advance(7 * DAY)
                assert (await warnings()).count("collateral has expired") == 4
        expiry = registry.get_sample_value(
            "cloister_collateral_expiry_timestamp_seconds",
            {"document": "tcb-info", "tee": "tdx", "fmspc": "b0c06f000000", "ca": "", "edition": "standard"},
        )
        assert expiry == END.timestamp()

    async def test_fetches_are_counted_by_what_came_of_them(self, cache: CollateralCache, pccs: FakePccs) -> None:
        pccs.lie(TCB, lies.html_with_headers())
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        count = cache.watch.registry.get_sample_value
        name = "cloister_collateral_fetches_total"
        assert count(name, {"document": "tcb-info", "outcome": "not-collateral"}) == 1
        assert count(name, {"document": "root-crl", "outcome": "stored"}) == 1


async def test_a_client_asks_only_the_configured_server(pccs: FakePccs) -> None:
    async with FakePccs() as other, CollateralClient(pccs.server, limits=LIMITS) as client:
        with pytest.raises(FetchFailed, match="not of the configured"):
            await client.fetch(other.server.root_crl())
        assert other.requests == []
        assert (await client.fetch(pccs.server.root_crl())).body.startswith(b"308")
