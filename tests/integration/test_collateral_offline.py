# SPDX-License-Identifier: Apache-2.0
"""Collateral used: from files without a network, with quotes, and Intel's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloister.collateral.bundle import CollateralBundle, bundle_path
from cloister.collateral.commands import family_of
from cloister.collateral.family import Edition, Family, PckCa
from cloister.collateral.offline import OfflineCollateral
from cloister.errors import CloisterError, Code
from cloister.runtime.marks import Marks
from cloister.tdx.collateral import Collateral
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verifier import Verifier
from cloister_sim import SimulatedPlatform
from fakes.collateral_authority import NOW, TDX_FAMILY, CollateralAuthority, Wish
from fakes.collateral_harness import DAY, EARLY, Clocks, bundle, get, open_cache, run_import
from fakes.fake_pccs import FakePccs
from fakes.real_vectors import DIRECTORY, needs_vectors

NEWEST = Wish(crl_number=2)
REAL = sorted((DIRECTORY / "collateral").glob("*.json"))


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "collateral"


class TestOffline:
    async def test_it_serves_until_the_end_and_never_after_even_when_the_clock_steps_back(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        clocks = Clocks()
        source = OfflineCollateral(directory, root=authority.trust_root, clock=lambda: clocks.now)
        with pytest.raises(CloisterError) as caught:
            await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
        assert caught.value.code is Code.COLLATERAL_NOT_FOUND
        carried = tmp_path / "carried.json"
        carried.write_bytes(bundle(authority).to_json())
        run_import(carried, directory, authority)
        for now in (NOW, NOW + 29 * DAY):
            clocks.now = now
            await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
        for now in (NOW + 29 * DAY + timedelta(seconds=1), NOW):
            clocks.now = now
            with pytest.raises(CloisterError) as caught:
                await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
            assert caught.value.code is Code.COLLATERAL_EXPIRED

    async def test_a_newer_file_is_picked_up_and_a_worse_one_is_not(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        path = bundle_path(directory, TDX_FAMILY)
        directory.mkdir()
        source = OfflineCollateral(directory, root=authority.trust_root, clock=lambda: NOW)

        async def number() -> int:
            collateral = await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
            return int(json.loads(collateral.tcb_info)["tcbEvaluationDataNumber"])

        path.write_bytes(bundle(authority).to_json())
        assert await number() == 20
        path.write_bytes(bundle(authority, Wish(number=21)).to_json() + b"\n")
        assert await number() == 21
        for worse in (
            bundle(authority, Wish(number=19)).to_json() + b"\n\n",
            b"damaged",
            bundle(CollateralAuthority(), Wish(number=30)).to_json(),
        ):
            path.write_bytes(worse)
            assert await number() == 21
        path.unlink()
        assert await number() == 21

    @pytest.mark.parametrize(
        "older", [NEWEST.but(number=19), NEWEST.but(issued=NOW - 5 * DAY), NEWEST.but(crl_number=1)]
    )
    async def test_an_older_file_is_refused_after_a_restart_too(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority, older: Wish
    ) -> None:
        path = bundle_path(directory, TDX_FAMILY)
        directory.mkdir()

        @contextmanager
        def restarted(of: CollateralAuthority = authority) -> Iterator[OfflineCollateral]:
            marks = Marks.open(tmp_path / "marks.sqlite")
            try:
                yield OfflineCollateral(directory, root=of.trust_root, clock=lambda: NOW, marks=marks)
            finally:
                marks.close()

        path.write_bytes(bundle(authority, NEWEST).to_json())
        with restarted() as source:
            await get(source)
        path.write_bytes(bundle(authority, older).to_json())
        with restarted() as source:
            with pytest.raises(CloisterError) as caught:
                await get(source)
            assert caught.value.code is Code.COLLATERAL_INVALID
            assert "older" in caught.value.what
            path.write_bytes(bundle(authority, NEWEST.but(number=21)).to_json())
            await get(source)
        path.write_bytes(bundle(authority, NEWEST).to_json())
        with restarted() as source, pytest.raises(CloisterError):
            await get(source)
        # What is known of one root says nothing about another's documents.
        other = CollateralAuthority()
        path.write_bytes(bundle(other, older).to_json())
        with restarted(other) as source:
            await get(source)

    async def test_without_marks_only_this_process_remembers(
        self, directory: Path, authority: CollateralAuthority
    ) -> None:
        directory.mkdir()
        path = bundle_path(directory, TDX_FAMILY)
        for wish in (Wish(number=21), Wish(number=19)):
            path.write_bytes(bundle(authority, wish).to_json())
            await get(OfflineCollateral(directory, root=authority.trust_root, clock=lambda: NOW))

    async def test_a_clock_that_is_behind_what_was_signed_is_refused(
        self, directory: Path, authority: CollateralAuthority
    ) -> None:
        directory.mkdir()
        bundle_path(directory, TDX_FAMILY).write_bytes(bundle(authority).to_json())
        source = OfflineCollateral(directory, root=authority.trust_root, clock=lambda: NOW - 2 * DAY)
        with pytest.raises(CloisterError) as caught:
            await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
        assert caught.value.code is Code.COLLATERAL_NOT_YET_VALID

    async def test_it_warns_from_seven_days_before_the_end(
        self, directory: Path, authority: CollateralAuthority
    ) -> None:
        directory.mkdir()
        bundle_path(directory, TDX_FAMILY).write_bytes(bundle(authority).to_json())
        clocks = Clocks()
        source = OfflineCollateral(directory, root=authority.trust_root, clock=lambda: clocks.now)
        for days, expiring in ((21, 0), (1, 4)):
            clocks.advance(days * DAY)
            await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
            found = source.watch.registry.get_sample_value("cloister_collateral_expiring_documents")
            assert found == expiring

    async def test_a_file_under_another_familys_name_is_refused(
        self, directory: Path, authority: CollateralAuthority
    ) -> None:
        directory.mkdir()
        bundle_path(directory, EARLY).write_bytes(bundle(authority).to_json())
        source = OfflineCollateral(directory, root=authority.trust_root, edition=Edition.EARLY, clock=lambda: NOW)
        with pytest.raises(CloisterError) as caught:
            await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
        assert caught.value.code is Code.COLLATERAL_INVALID


class TestWithQuotes:
    async def test_a_simulated_platform_is_verified_with_what_a_pccs_serves(self, tmp_path: Path) -> None:
        now = datetime.now(UTC)
        clocks = Clocks(now)
        platform = SimulatedPlatform.create(tmp_path / "platform", now=now)
        root = TrustRoot.from_pem(platform.root_pem, simulated=True)
        evidence = platform.launch(bytes(48)).quote(bytes(64))
        family = family_of(evidence, roots=[root])
        async with FakePccs() as pccs:
            pccs.serve(family, platform.collateral(now))
            async with open_cache(pccs, tmp_path / "cache.db", root, clocks) as cache:
                collateral = await cache.get(family.fmspc, family.ca, family.tee)
                assert Verifier([root]).verify(evidence, collateral, now=now).status == "UpToDate"
                # A month later, signed anew.
                clocks.advance(20 * DAY)
                pccs.serve(family, platform.collateral(clocks.now))
                await cache.refresh_due()
                clocks.advance(20 * DAY)
                later = await cache.get(family.fmspc, family.ca, family.tee)
                assert Verifier([root]).verify(evidence, later, now=clocks.now).status == "UpToDate"

    def test_a_quote_of_another_root_names_no_family(self, tmp_path: Path, authority: CollateralAuthority) -> None:
        evidence = SimulatedPlatform.create(tmp_path / "platform").launch(bytes(48)).quote(bytes(64))
        with pytest.raises(CloisterError) as caught:
            family_of(evidence, roots=[authority.trust_root])
        assert caught.value.code is Code.QUOTE_REJECTED

    @needs_vectors
    @pytest.mark.parametrize("path", REAL, ids=[path.stem for path in REAL])
    def test_intels_collateral_goes_through_a_bundle_unchanged(self, path: Path) -> None:
        root = TrustRoot((DIRECTORY / "root_ca.der").read_bytes(), simulated=False)
        nine = json.loads(path.read_bytes())
        info = json.loads(nine["tcb_info"])
        outcomes = {}
        for ca in PckCa:
            family = Family.of(info["fmspc"], ca, info["id"].lower())
            again = CollateralBundle.parse(CollateralBundle(family, NOW, Collateral.of(nine)).to_json())
            assert json.loads(again.collateral.to_json()) == nine
            try:
                found = again.verify(root)
                found.require_valid(found.expires)
                outcomes[ca] = ""
            except CloisterError as error:
                outcomes[ca] = error.why
        good = [ca for ca, why in outcomes.items() if not why]
        refusals = [why for why in outcomes.values() if why]
        assert len(good) == 1, "of exactly one CA"
        assert "Intel SGX PCK" in refusals[0]

    @needs_vectors
    async def test_intels_collateral_goes_through_a_pccs_and_the_cache(self, tmp_path: Path) -> None:
        root = TrustRoot((DIRECTORY / "root_ca.der").read_bytes(), simulated=False)
        path = next(path for path in REAL if "tdx10_v4_b0c06f000000" in path.name and "2026-10-08" in path.name)
        nine = json.loads(path.read_bytes())
        async with FakePccs() as pccs:
            pccs.serve(TDX_FAMILY, nine, hex_crls=True)
            clocks = Clocks(NOW)
            async with open_cache(pccs, tmp_path / "cache.db", root, clocks) as cache:
                found = await cache.get(TDX_FAMILY.fmspc, "platform", "tdx")
                assert json.loads(found.to_json()) == nine
                clocks.advance(10 * DAY)
                with pytest.raises(CloisterError) as caught:
                    await cache.get(TDX_FAMILY.fmspc, "platform", "tdx")
                assert caught.value.code is Code.COLLATERAL_EXPIRED
