# SPDX-License-Identifier: Apache-2.0
"""The cache in front of a PCCS over HTTPS: the nine rules, on clocks that the test turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from cloister.collateral.cache import CollateralCache
from cloister.collateral.family import Edition, Family
from cloister.collateral.resources import DocumentKind
from cloister.errors import CloisterError, Code
from fakes.collateral_authority import NOW, SGX_FAMILY, TDX_FAMILY, CollateralAuthority, Wish
from fakes.collateral_harness import DAY, Clocks, get, open_cache, serving
from fakes.fake_pccs import FakePccs, lies

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


class TestFetching:
    async def test_the_nine_strings_come_back_as_they_were_signed(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        served = authority.collateral(TDX_FAMILY)
        pccs.serve(TDX_FAMILY, served)
        found = await get(cache)
        assert found.tcb_info.decode() == served["tcb_info"]
        assert found.qe_identity_signature.decode() == served["qe_identity_signature"]
        assert found.pck_crl.hex() == served["pck_crl"]
        assert found.root_ca_crl.hex() == served["root_ca_crl"]
        assert found.tcb_info_issuer_chain.decode() == served["tcb_info_issuer_chain"]

    async def test_sgx_families_have_their_own_paths_and_ca(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        pccs.serve(SGX_FAMILY, authority.collateral(SGX_FAMILY))
        found = await get(cache, SGX_FAMILY)
        assert b'"id":"SGX"' in found.tcb_info
        assert "/sgx/certification/v4/pckcrl?ca=processor&encoding=der" in pccs.requests

    async def test_what_is_kept_is_not_asked_for_again(self, cache: CollateralCache, pccs: FakePccs) -> None:
        first = await get(cache)
        again = await get(cache)
        assert again is first
        assert len(pccs.requests) == 4

    async def test_a_hundred_callers_make_one_request(self, cache: CollateralCache, pccs: FakePccs) -> None:
        pccs.gate.clear()
        callers = [asyncio.create_task(get(cache)) for _ in range(100)]
        await pccs.asked.wait()
        pccs.gate.set()
        found = await asyncio.gather(*callers)
        assert len(pccs.requests) == 4
        assert len({collateral.digest for collateral in found}) == 1

    async def test_a_caller_that_gives_up_takes_nothing_from_the_others(
        self, cache: CollateralCache, pccs: FakePccs
    ) -> None:
        pccs.gate.clear()
        impatient, patient = asyncio.create_task(get(cache)), asyncio.create_task(get(cache))
        await pccs.asked.wait()
        impatient.cancel()
        pccs.gate.set()
        await patient
        assert len(pccs.requests) == 4

    async def test_families_share_what_is_the_same(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs
    ) -> None:
        other = Family.of("90c06f000000", "platform", "tdx")
        pccs.serve(other, authority.collateral(other))
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY))
        await get(cache)
        await get(cache, other)
        assert len(pccs.requests) == 5
        assert pccs.count(TCB) == 2

    async def test_early_and_standard_never_stand_in_for_each_other(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        early = Family(TDX_FAMILY.fmspc, TDX_FAMILY.ca, TDX_FAMILY.tee, Edition.EARLY)
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as standard:
            await get(standard)
        async with open_cache(pccs, path, authority.trust_root, clocks, edition=Edition.EARLY) as cache:
            await refused(cache, Code.COLLATERAL_NOT_FOUND)
        pccs.serve(early, authority.collateral(early, Wish(number=21)))
        path.unlink()
        async with open_cache(pccs, path, authority.trust_root, clocks, edition=Edition.EARLY) as cache:
            assert b'"tcbEvaluationDataNumber":21' in (await get(cache)).tcb_info


class TestTime:
    async def test_it_is_served_until_the_last_second_without_a_server_and_never_after(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks
    ) -> None:
        first = await get(cache)
        for kind in DocumentKind:
            pccs.lie(kind, lies.status(500))
        clocks.advance(END - NOW)
        assert await get(cache) is first
        clocks.advance(SECOND)
        error = await refused(cache, Code.COLLATERAL_EXPIRED)
        assert error.what.startswith("collateral for FMSPC b0c06f000000 expired")
        clocks.advance(3 * DAY)
        error = await refused(cache, Code.COLLATERAL_EXPIRED)
        assert error.what == "collateral for FMSPC b0c06f000000 expired 3 days ago"
        assert error.todo == "run `cloister collateral fetch`"

    @pytest.mark.parametrize(
        ("wish", "end"),
        [
            (Wish(life=10 * DAY), NOW + 9 * DAY),
            (Wish(crl_life=5 * DAY), NOW + 4 * DAY),
        ],
    )
    async def test_the_earliest_end_counts(
        self,
        cache: CollateralCache,
        authority: CollateralAuthority,
        pccs: FakePccs,
        clocks: Clocks,
        wish: Wish,
        end: datetime,
    ) -> None:
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, wish))
        await get(cache)
        for kind in DocumentKind:
            pccs.lie(kind, lies.status(500))
        clocks.now = end
        await get(cache)
        clocks.advance(SECOND)
        await refused(cache, Code.COLLATERAL_EXPIRED)

    async def test_the_end_of_the_signers_certificate_counts(self, tmp_path: Path, clocks: Clocks) -> None:
        short = CollateralAuthority(signer_life=2 * DAY)
        async with FakePccs() as pccs:
            pccs.serve(TDX_FAMILY, short.collateral(TDX_FAMILY))
            async with open_cache(pccs, tmp_path / "cache.db", short.trust_root, clocks) as cache:
                await get(cache)
                clocks.advance(2 * DAY)
                await get(cache)
                clocks.advance(SECOND)
                await refused(cache, Code.COLLATERAL_EXPIRED)

    async def test_it_is_refreshed_in_the_background_when_half_its_time_has_gone(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        first = await get(cache)
        clocks.advance((END - NOW) / 2 - SECOND)
        assert await get(cache) is first
        assert len(pccs.requests) == 4
        newer = Wish(issued=clocks.now, crl_issued=clocks.now, crl_number=2)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, newer))
        clocks.advance(SECOND)
        pccs.asked.clear()
        assert await get(cache) is first, "nobody waits for a refresh"
        await cache.refresh_due()
        assert len(pccs.requests) == 8
        assert (await get(cache)).tcb_info != first.tcb_info
        assert len(pccs.requests) == 8

    async def test_what_ends_while_another_document_is_fetched_is_not_served(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        await get(cache)
        other = Family.of("90c06f000000", "platform", "tdx")
        pccs.serve(other, authority.collateral(other, Wish(life=100 * DAY, crl_life=100 * DAY)))
        clocks.now = END - SECOND
        clocks.jitter = 1.0
        pccs.gate.clear()
        pccs.asked.clear()
        caller = asyncio.create_task(get(cache, other))
        await pccs.asked.wait()
        clocks.advance(2 * SECOND)
        for kind in (DocumentKind.ROOT_CRL, DocumentKind.PCK_CRL, DocumentKind.QE_IDENTITY):
            pccs.lie(kind, lies.status(500))
        pccs.gate.set()
        with pytest.raises(CloisterError) as caught:
            await caller
        assert caught.value.code is Code.COLLATERAL_EXPIRED

    async def test_it_keeps_itself_fresh(self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks) -> None:
        await get(cache)
        clocks.advance(20 * DAY)
        pccs.asked.clear()
        running = asyncio.create_task(cache.run())
        await asyncio.wait_for(pccs.asked.wait(), 5)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    async def test_a_refresh_that_fails_is_tried_again_later_and_later(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks
    ) -> None:
        first = await get(cache)
        pccs.lie(TCB, lies.status(500))
        clocks.advance(20 * DAY)
        await cache.refresh_due()
        assert pccs.count(TCB) == 2
        await cache.refresh_due()
        assert pccs.count(TCB) == 2, "it is on hold"
        clocks.advance(2 * SECOND)
        await cache.refresh_due()
        assert pccs.count(TCB) == 3
        assert (await get(cache)).tcb_info == first.tcb_info

    async def test_a_clock_set_back_before_what_was_signed_is_refused(
        self, cache: CollateralCache, clocks: Clocks, pccs: FakePccs
    ) -> None:
        await get(cache)
        clocks.set_back(2 * DAY)
        error = await refused(cache, Code.COLLATERAL_NOT_YET_VALID)
        assert "clock" in error.why
        assert len(pccs.requests) == 4
        clocks.advance(2 * DAY)
        await get(cache)

    async def test_what_was_seen_expired_is_not_revived_by_a_clock_set_back(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks
    ) -> None:
        await get(cache)
        for kind in DocumentKind:
            pccs.lie(kind, lies.status(500))
        clocks.advance(30 * DAY)
        await refused(cache, Code.COLLATERAL_EXPIRED)
        clocks.set_back(10 * DAY)
        await refused(cache, Code.COLLATERAL_EXPIRED)
        # A clock that was wrong for a while heals with a fetch.
        pccs.honest()
        clocks.elapsed_s += 1000
        await get(cache)

    async def test_waiting_goes_by_elapsed_time_whatever_the_clock_says(
        self, cache: CollateralCache, pccs: FakePccs, clocks: Clocks
    ) -> None:
        pccs.lie(DocumentKind.ROOT_CRL, lies.status(500))
        await refused(cache, Code.COLLATERAL_UNAVAILABLE)
        clocks.set_back(365 * DAY)
        clocks.elapsed_s += 2
        pccs.honest()
        with pytest.raises(CloisterError):  # not valid yet, but it was asked for
            await get(cache)
        assert pccs.count(DocumentKind.ROOT_CRL) == 2


class TestNoWayBack:
    @pytest.mark.parametrize(
        "older",
        [
            Wish(number=19, issued=NOW),
            Wish(issued=NOW - 2 * DAY),
            Wish(crl_number=0, crl_issued=NOW),
            Wish(crl_issued=NOW - 2 * DAY),
        ],
        ids=["evaluation number", "issue date", "CRL number", "CRL date"],
    )
    async def test_older_documents_never_replace_newer_ones_even_expired(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks, older: Wish
    ) -> None:
        first = await get(cache)
        long_lived = older.but(life=100 * DAY, crl_life=100 * DAY)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, long_lived))
        clocks.advance(20 * DAY)
        await cache.refresh_due()
        after = await get(cache)
        kept = {name: getattr(after, name) for name in ("tcb_info", "qe_identity", "pck_crl", "root_ca_crl")}
        changed = [name for name, value in kept.items() if value != getattr(first, name)]
        is_crl = older.crl_number == 0 or older.crl_issued < NOW - DAY
        assert changed == (["tcb_info", "qe_identity"] if is_crl else ["pck_crl", "root_ca_crl"])[: len(changed)]
        clocks.advance(10 * DAY)
        error = await refused(cache, Code.COLLATERAL_EXPIRED)
        assert "known already" in error.why

    async def test_a_reset_accepts_what_is_older(
        self, cache: CollateralCache, authority: CollateralAuthority, pccs: FakePccs, clocks: Clocks
    ) -> None:
        await get(cache)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, Wish(number=19, issued=NOW - 2 * DAY)))
        await cache.reset(TDX_FAMILY)
        assert b'"tcbEvaluationDataNumber":19' in (await get(cache)).tcb_info

    async def test_a_restart_remembers_what_is_newest(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            await get(cache)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, Wish(number=19, issued=NOW, life=60 * DAY)))
        clocks.advance(40 * DAY)
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            await refused(cache, Code.COLLATERAL_EXPIRED)


class TestDisk:
    async def test_a_restart_needs_no_server(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            first = await get(cache)
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            assert (await get(cache)).digest == first.digest
        assert len(pccs.requests) == 4
        assert path.stat().st_mode & 0o777 == 0o600

    async def test_two_roots_never_share_a_cache(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        path = tmp_path / "cache.db"
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            await get(cache)
        with pytest.raises(CloisterError) as caught:
            async with open_cache(pccs, path, CollateralAuthority().trust_root, clocks):
                pass
        assert caught.value.code is Code.CONFIG_INVALID
        async with open_cache(pccs, path, authority.trust_root, clocks) as cache:
            await get(cache)

    async def test_two_processes_never_share_a_cache(
        self, cache: CollateralCache, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        with pytest.raises(CloisterError, match="in use"):
            async with open_cache(pccs, tmp_path / "cache.db", authority.trust_root, clocks):
                pass

    async def test_a_file_that_is_no_database_is_named(
        self, pccs: FakePccs, tmp_path: Path, authority: CollateralAuthority, clocks: Clocks
    ) -> None:
        (tmp_path / "cache.db").write_bytes(b"not a database" * 500)
        with pytest.raises(CloisterError) as caught:
            async with open_cache(pccs, tmp_path / "cache.db", authority.trust_root, clocks):
                pass
        assert caught.value.code is Code.IO_FAILED
