# SPDX-License-Identifier: Apache-2.0
"""Bundles: fetched, exported, imported, and used where there is no network."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cloister.collateral.bundle import CollateralBundle, bundle_path
from cloister.collateral.commands import Outcome, export, fetch
from cloister.collateral.family import Family
from cloister.collateral.offline import OfflineCollateral
from cloister.collateral.resources import DocumentKind
from cloister.errors import CloisterError, Code
from cloister.tdx.collateral import Collateral
from fakes.collateral_authority import NOW, SGX_FAMILY, TDX_FAMILY, CollateralAuthority, Wish
from fakes.collateral_harness import DAY, EARLY, LIMITS, bundle, run_import, serving
from fakes.fake_pccs import FakePccs, lies

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def authority() -> CollateralAuthority:
    return CollateralAuthority()


@pytest.fixture
async def pccs(authority: CollateralAuthority) -> AsyncIterator[FakePccs]:
    async with serving(authority) as server:
        yield server


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "collateral"


async def run_fetch(
    pccs: FakePccs, directory: Path, authority: CollateralAuthority, *families: Family, **options: Any
) -> list[Outcome]:
    return await fetch(
        families or [TDX_FAMILY],
        directory,
        server=pccs.server,
        root=authority.trust_root,
        clock=lambda: NOW,
        limits=LIMITS,
        **options,
    )


class TestFetch:
    async def test_a_family_becomes_a_file_that_works_without_a_network(
        self, pccs: FakePccs, directory: Path, authority: CollateralAuthority
    ) -> None:
        (outcome,) = await run_fetch(pccs, directory, authority)
        assert outcome.path == directory / "tdx-b0c06f000000-platform-standard.json"
        assert (outcome.evaluation_number, outcome.expires) == (20, NOW + 29 * DAY)
        members = json.loads(outcome.path.read_bytes())
        assert members["format"] == "cloister-collateral-1"
        assert len(members["collateral"]) == 9
        source = OfflineCollateral(directory, root=authority.trust_root, clock=lambda: NOW)
        found = await source.get(TDX_FAMILY.fmspc, "platform", "tdx")
        assert found.tcb_info.decode() == members["collateral"]["tcb_info"]

    async def test_families_share_requests(
        self, pccs: FakePccs, directory: Path, authority: CollateralAuthority
    ) -> None:
        other = Family.of("90c06f000000", "platform", "tdx")
        pccs.serve(other, authority.collateral(other))
        assert len(await run_fetch(pccs, directory, authority, TDX_FAMILY, other)) == 2
        assert len(pccs.requests) == 5

    async def test_what_cannot_be_had_changes_nothing(
        self, pccs: FakePccs, directory: Path, authority: CollateralAuthority
    ) -> None:
        (outcome,) = await run_fetch(pccs, directory, authority)
        before = outcome.path.read_bytes()
        for kind in DocumentKind:
            for lie in (lies.status(404), lies.html_with_headers(), lies.status(503)):
                pccs.lie(kind, lie)
                with pytest.raises(CloisterError, match="no collateral for FMSPC b0c06f000000"):
                    await run_fetch(pccs, directory, authority)
            pccs.honest()
        pccs.serve(TDX_FAMILY, CollateralAuthority().collateral(TDX_FAMILY))
        with pytest.raises(CloisterError) as caught:
            await run_fetch(pccs, directory, authority)
        assert caught.value.code is Code.COLLATERAL_INVALID
        assert outcome.path.read_bytes() == before

    async def test_a_stale_server_is_named_as_the_cause(
        self, pccs: FakePccs, directory: Path, authority: CollateralAuthority
    ) -> None:
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, Wish(issued=NOW - 33 * DAY)))
        with pytest.raises(CloisterError) as caught:
            await run_fetch(pccs, directory, authority)
        assert caught.value.code is Code.COLLATERAL_EXPIRED
        assert "that is served expired" in caught.value.why
        assert "refresh the PCCS" in caught.value.todo

    async def test_a_revoked_signer_is_refused(
        self, pccs: FakePccs, directory: Path, authority: CollateralAuthority
    ) -> None:
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, revoked=[authority.signer]))
        with pytest.raises(CloisterError) as caught:
            await run_fetch(pccs, directory, authority)
        assert caught.value.code is Code.COLLATERAL_INVALID
        assert not bundle_path(directory, TDX_FAMILY).exists()

    async def test_older_collateral_is_taken_only_on_purpose(
        self, pccs: FakePccs, directory: Path, authority: CollateralAuthority
    ) -> None:
        (outcome,) = await run_fetch(pccs, directory, authority)
        pccs.serve(TDX_FAMILY, authority.collateral(TDX_FAMILY, Wish(number=19)))
        with pytest.raises(CloisterError) as caught:
            await run_fetch(pccs, directory, authority)
        assert caught.value.code is Code.COLLATERAL_INVALID
        assert "TCB evaluation number 19" in caught.value.why
        (outcome,) = await run_fetch(pccs, directory, authority, reset=True)
        assert outcome.evaluation_number == 19


class TestImportAndExport:
    async def test_what_is_exported_can_be_imported_elsewhere(
        self, pccs: FakePccs, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        await run_fetch(pccs, directory, authority)
        carried = tmp_path / "carried.json"
        export(TDX_FAMILY, directory, carried, root=authority.trust_root, now=NOW)
        elsewhere = tmp_path / "elsewhere"
        imported = run_import(carried, elsewhere, authority)
        assert [outcome.family for outcome in imported.taken] == [TDX_FAMILY]
        assert bundle_path(elsewhere, TDX_FAMILY).read_bytes() == bundle_path(directory, TDX_FAMILY).read_bytes()

    def test_what_is_not_there_cannot_be_exported(self, directory: Path, authority: CollateralAuthority) -> None:
        with pytest.raises(CloisterError) as caught:
            export(TDX_FAMILY, directory, directory / "x", root=authority.trust_root, now=NOW)
        assert caught.value.code is Code.COLLATERAL_NOT_FOUND
        assert "cloister collateral fetch" in caught.value.todo

    def test_expired_bundles_are_refused_both_ways(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        carried = tmp_path / "carried.json"
        carried.write_bytes(bundle(authority).to_json())
        run_import(carried, directory, authority)
        later = NOW + 32 * DAY
        for attempt in (
            lambda: run_import(carried, tmp_path / "other", authority, now=later, reset=True),
            lambda: export(TDX_FAMILY, directory, tmp_path / "x", root=authority.trust_root, now=later),
        ):
            with pytest.raises(CloisterError) as caught:
                attempt()
            assert caught.value.code is Code.COLLATERAL_EXPIRED
            assert caught.value.what == "collateral for FMSPC b0c06f000000 expired 3 days ago"
        with pytest.raises(CloisterError) as caught:
            run_import(carried, tmp_path / "other", authority, now=NOW - 5 * DAY)
        assert caught.value.code is Code.COLLATERAL_NOT_YET_VALID

    def test_a_bundle_of_a_revoked_signer_is_refused(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        for certificate in (authority.signer, authority.cas[TDX_FAMILY.ca]):
            nine = authority.collateral(TDX_FAMILY, revoked=[certificate])
            carried = tmp_path / "carried.json"
            carried.write_bytes(CollateralBundle(TDX_FAMILY, NOW, Collateral.of(nine)).to_json())
            with pytest.raises(CloisterError) as caught:
                run_import(carried, directory, authority)
            assert caught.value.code is Code.COLLATERAL_INVALID
            assert "revoked" in caught.value.why

    def test_two_roots_never_share_a_directory(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        other = CollateralAuthority()
        for number, each in enumerate((authority, other)):
            (tmp_path / f"{number}.json").write_bytes(bundle(each).to_json())
        run_import(tmp_path / "0.json", directory, authority)
        attempts: list[Callable[[], object]] = [
            lambda: run_import(tmp_path / "1.json", directory, other),
            lambda: export(TDX_FAMILY, directory, tmp_path / "x", root=other.trust_root, now=NOW),
            lambda: OfflineCollateral(directory, root=other.trust_root),
        ]
        for attempt in attempts:
            with pytest.raises(CloisterError) as caught:
                attempt()
            assert caught.value.code is Code.CONFIG_INVALID

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.pop("fmspc"),
            lambda m: m.update(format="cloister-collateral-2"),
            lambda m: m.update(fmspc="00" * 6),
            lambda m: m.update(fmspc=7),
            lambda m: m.update(ca="processor"),
            lambda m: m.update(tee="sgx"),
            lambda m: m.update(edition="late"),
            lambda m: m.update(fetched_at="yesterday"),
            lambda m: m.update(fetched_at="2026-11-01T12:00:00"),
            lambda m: m.update(more=1),
            lambda m: m.update(collateral=[]),
            lambda m: m["collateral"].pop("pck_crl"),
            lambda m: m["collateral"].update(pck_crl="zz"),
            lambda m: m["collateral"].update(pck_crl=m["collateral"]["root_ca_crl"]),
            lambda m: m["collateral"].update(tcb_info=""),
            lambda m: m["collateral"].update(tcb_info=m["collateral"]["tcb_info"] + " "),
            lambda m: m["collateral"].update(tcb_info_signature="00" * 64),
            lambda m: m["collateral"].update(tcb_info_signature="ab"),
            lambda m: m["collateral"].update(qe_identity=m["collateral"]["tcb_info"]),
            lambda m: m["collateral"].update(tcb_info_issuer_chain=m["collateral"]["pck_crl_issuer_chain"]),
        ],
    )
    def test_a_bundle_that_was_changed_is_refused(
        self,
        directory: Path,
        tmp_path: Path,
        authority: CollateralAuthority,
        change: Callable[[dict[str, Any]], object],
    ) -> None:
        members = json.loads(bundle(authority).to_json())
        change(members)
        path = tmp_path / "changed.json"
        path.write_text(json.dumps(members))
        with pytest.raises(CloisterError) as caught:
            run_import(path, directory, authority)
        assert caught.value.code is Code.COLLATERAL_INVALID
        assert not bundle_path(directory, TDX_FAMILY).exists()

    @pytest.mark.parametrize(
        "data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"collaterals":{}}', b'{"collaterals":1}']
    )
    def test_a_file_that_is_something_else_is_refused(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority, data: bytes
    ) -> None:
        path = tmp_path / "file"
        path.write_bytes(data)
        with pytest.raises(CloisterError) as caught:
            run_import(path, directory, authority)
        assert caught.value.code is Code.COLLATERAL_INVALID

    def test_a_file_that_is_not_there_is_named(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        with pytest.raises(CloisterError, match=r"nothing\.json") as caught:
            run_import(tmp_path / "nothing.json", directory, authority)
        assert caught.value.code is Code.FILE_NOT_FOUND


def platform_collateral(authority: CollateralAuthority, **wishes: Wish) -> dict[str, Any]:
    """Return what `pccsadmin fetch` writes of a TDX family and an SGX family."""
    tdx = authority.collateral(TDX_FAMILY, wishes.get("tdx"))
    early = authority.collateral(EARLY, Wish(number=21))
    sgx = authority.collateral(SGX_FAMILY)

    def signed(member: str, nine: dict[str, str], part: str) -> dict[str, Any]:
        return {member: json.loads(nine[part]), "signature": nine[f"{part}_signature"]}

    return {
        "platforms": [],
        "collaterals": {
            "version": 4,
            "pck_certs": [],
            "tcbinfos": [
                {
                    "fmspc": TDX_FAMILY.fmspc.hex().upper(),
                    "tdx_tcbinfo": signed("tcbInfo", tdx, "tcb_info"),
                    "tdx_tcbinfo_early": signed("tcbInfo", early, "tcb_info"),
                },
                {"fmspc": SGX_FAMILY.fmspc.hex(), "sgx_tcbinfo": signed("tcbInfo", sgx, "tcb_info")},
            ],
            "pckcacrl": {"platformCrl": tdx["pck_crl"], "processorCrl": sgx["pck_crl"]},
            # As text, as PCCS has it, and as an object.
            "qeidentity": json.dumps(signed("enclaveIdentity", sgx, "qe_identity"), separators=(",", ":")),
            "tdqeidentity": signed("enclaveIdentity", tdx, "qe_identity"),
            "tdqeidentity_early": signed("enclaveIdentity", early, "qe_identity"),
            "certificates": {
                "SGX-PCK-Certificate-Issuer-Chain": {
                    "PLATFORM": quote(tdx["pck_crl_issuer_chain"]),
                    "PROCESSOR": quote(sgx["pck_crl_issuer_chain"]),
                },
                "TCB-Info-Issuer-Chain": quote(tdx["tcb_info_issuer_chain"]),
                "SGX-Enclave-Identity-Issuer-Chain": quote(tdx["qe_identity_issuer_chain"]),
            },
            "rootcacrl": tdx["root_ca_crl"],
        },
    }


class TestPccsFile:
    def test_every_family_in_it_is_imported(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        path = tmp_path / "platform_collaterals.json"
        path.write_text(json.dumps(platform_collateral(authority), indent=2))
        imported = run_import(path, directory, authority)
        assert {outcome.family.name: outcome.evaluation_number for outcome in imported.taken} == {
            "tdx-b0c06f000000-platform-standard": 20,
            "tdx-b0c06f000000-platform-early": 21,
            "sgx-00606a000000-platform-standard": 20,
            "sgx-00606a000000-processor-standard": 20,
        }
        assert imported.refused == ()

    def test_a_family_that_is_bad_does_not_spoil_the_others(
        self, directory: Path, tmp_path: Path, authority: CollateralAuthority
    ) -> None:
        path = tmp_path / "platform_collaterals.json"
        path.write_text(json.dumps(platform_collateral(authority, tdx=Wish(issued=NOW - 100 * DAY))))
        imported = run_import(path, directory, authority)
        assert TDX_FAMILY not in [outcome.family for outcome in imported.taken]
        assert [(family, error.code) for family, error in imported.refused] == [(TDX_FAMILY, Code.COLLATERAL_EXPIRED)]

    @pytest.mark.parametrize(
        "change",
        [
            lambda c: c.pop("rootcacrl"),
            lambda c: c.pop("certificates"),
            lambda c: c.update(tcbinfos={}),
            lambda c: c.update(tcbinfos=[1]),
            lambda c: c.update(tcbinfos=[{}] * 2000),
            lambda c: c["tcbinfos"][0].pop("fmspc"),
            lambda c: c["tcbinfos"][0].update(tdx_tcbinfo={"signature": ""}),
            lambda c: c.update(pckcacrl={"platformCrl": "<html>"}),
            lambda c: c["certificates"].update({"TCB-Info-Issuer-Chain": "%"}),
        ],
    )
    def test_another_shape_is_refused(
        self,
        directory: Path,
        tmp_path: Path,
        authority: CollateralAuthority,
        change: Callable[[dict[str, Any]], object],
    ) -> None:
        members = platform_collateral(authority)
        change(members["collaterals"])
        path = tmp_path / "platform_collaterals.json"
        path.write_text(json.dumps(members))
        with pytest.raises(CloisterError) as caught:
            run_import(path, directory, authority)
        assert caught.value.code is Code.COLLATERAL_INVALID
