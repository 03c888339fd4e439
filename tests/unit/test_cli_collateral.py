# SPDX-License-Identifier: Apache-2.0
"""`cloister collateral`, and `cloister quote verify` with it: from a PCCS, kept here, carried in a file."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloister.cli.collateralsource import choose_root
from cloister.cli.quoteverdict import examine
from cloister.collateral.bundle import CollateralBundle
from cloister.collateral.commands import family_of
from cloister.collateral.family import Family
from cloister.collateral.resources import DocumentKind
from cloister.tdx.intelroot import INTEL_ROOT_PEM
from cloister.tdx.trustroot import TrustRoot
from cloister.tlv import sha384
from cloister_sim import SimulatedPlatform
from fakes.cli_runner import Ran, run
from fakes.fake_pccs import FakePccs, lies

DAY = timedelta(days=1)


@dataclass
class World:
    """A platform with a quote in a file, a PCCS that serves its collateral, and a state directory."""

    platform: SimulatedPlatform
    pccs: FakePccs
    directory: Path
    family: Family

    @property
    def quote(self) -> Path:
        return self.directory / "quote.bin"

    @property
    def kept(self) -> Path:
        return next((self.directory / "state").glob("collateral-*")) / f"{self.family.name}.json"

    def serve(self, issued: datetime) -> None:
        self.pccs.serve(self.family, self.platform.collateral(issued))

    async def run(self, *arguments: object, server: bool = False, state: str = "state") -> Ran:
        where = ("--pccs", self.pccs.server.base_url, "--pccs-ca", self.pccs.ca_file) if server else ()
        options = (*where, "--root", self.directory / "root.pem", "--state", self.directory / state, "--json")
        # In a thread, so that the server in this loop answers meanwhile.
        return await asyncio.to_thread(run, *arguments, *options)


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> SimulatedPlatform:
    return SimulatedPlatform.create(tmp_path_factory.mktemp("platform"), now=datetime.now(UTC) - 100 * DAY)


@pytest.fixture
async def world(platform: SimulatedPlatform, tmp_path: Path) -> AsyncIterator[World]:
    quote = platform.launch(sha384(b"image")).quote(b"r" * 64)
    (tmp_path / "quote.bin").write_bytes(quote)
    (tmp_path / "root.pem").write_bytes(platform.root_pem)
    family = family_of(quote, roots=[TrustRoot.from_pem(platform.root_pem, simulated=True)])
    async with FakePccs() as pccs:
        made = World(platform, pccs, tmp_path, family)
        made.serve(datetime.now(UTC) - DAY)
        yield made


@pytest.mark.parametrize("command", ["fetch", "export", "import", "show"])
def test_every_command_has_help_and_json(command: str) -> None:
    ran = run("collateral", command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out


async def test_collateral_goes_from_a_server_to_a_machine_without_a_network(world: World) -> None:
    fetched = await world.run("collateral", "fetch", "--quote", world.quote, server=True)
    assert fetched.code == 0
    assert [row["family"] for row in fetched.document["families"]] == [world.family.name]
    carried = world.directory / "carried.json"
    assert (await world.run("collateral", "export", world.family.name, carried)).code == 0
    taken = await world.run("collateral", "import", carried, state="elsewhere")
    assert (taken.code, taken.document["refused"]) == (0, [])
    asked = len(world.pccs.requests)
    verified = await world.run("quote", "verify", world.quote, state="elsewhere")
    assert (verified.code, verified.document["verdict"]) == (0, "accept")
    assert "elsewhere" in verified.document["collateral"]
    # The file itself serves as well as what it was imported into.
    direct = await world.run("quote", "verify", world.quote, "--collateral", carried, state="third")
    assert direct.code == 0
    assert len(world.pccs.requests) == asked


async def test_the_state_directory_that_is_made_for_it_is_private(world: World) -> None:
    await world.run("collateral", "fetch", "--quote", world.quote, server=True)
    assert (world.directory / "state").stat().st_mode & 0o777 == 0o700


async def test_show_tells_what_is_kept_and_until_when(world: World) -> None:
    empty = await world.run("collateral", "show")
    assert (empty.code, empty.document) == (0, {"families": []})
    await world.run("collateral", "fetch", "--quote", world.quote, server=True)
    (row,) = (await world.run("collateral", "show")).document["families"]
    assert (row["family"], row["state"], row["evaluation_number"]) == (world.family.name, "valid", 20)
    documents = (await world.run("collateral", "show", world.family.name)).document["documents"]
    assert {document["document"] for document in documents} == {kind.value for kind in DocumentKind}
    assert (await world.run("collateral", "show", world.kept)).document["documents"] == documents
    world.kept.write_bytes(world.kept.read_bytes().replace(b"tcbLevels", b"tcblevels"))
    (row,) = (await world.run("collateral", "show")).document["families"]
    assert row["state"] == "not good"
    assert (await world.run("collateral", "show", world.family.name)).code == 3


async def test_fetch_without_names_refreshes_what_is_here(world: World) -> None:
    nothing = await world.run("collateral", "fetch", server=True)
    assert (nothing.code, nothing.document["error"]["code"]) == (2, "CLO-1002")
    digits = world.family.fmspc.hex()
    assert (await world.run("collateral", "fetch", "--fmspc", digits, server=True)).code == 0
    world.serve(datetime.now(UTC))
    before = (await world.run("collateral", "show")).document["families"][0]["expires"]
    assert (await world.run("collateral", "fetch", server=True)).code == 0
    assert (await world.run("collateral", "show")).document["families"][0]["expires"] > before


async def test_older_collateral_is_taken_only_with_reset(world: World) -> None:
    await world.run("collateral", "fetch", "--quote", world.quote, server=True)
    kept = world.kept.read_bytes()
    world.serve(datetime.now(UTC) - 3 * DAY)
    refused = await world.run("collateral", "fetch", server=True)
    assert (refused.code, refused.document["error"]["code"]) == (3, "CLO-1224")
    assert world.kept.read_bytes() == kept
    assert (await world.run("collateral", "fetch", "--reset", server=True)).code == 0


async def test_verify_fetches_what_is_not_here_once(world: World) -> None:
    first = await world.run("quote", "verify", world.quote, server=True)
    assert (first.code, first.document["collateral"]) == (0, world.pccs.server.base_url)
    asked = len(world.pccs.requests)
    assert asked == 4
    second = await world.run("quote", "verify", world.quote, server=True)
    assert (second.code, second.document["collateral"]) == (0, str(world.kept))
    assert len(world.pccs.requests) == asked


async def test_verify_replaces_what_was_damaged(world: World) -> None:
    await world.run("quote", "verify", world.quote, server=True)
    for damaged in (b"", b"{}", world.kept.read_bytes().replace(b"UpToDate", b"Revoked!")):
        world.kept.write_bytes(damaged)
        assert (await world.run("quote", "verify", world.quote, server=True)).code == 0
        assert b"UpToDate" in world.kept.read_bytes()


async def test_nothing_is_fetched_for_a_quote_that_nobody_signed(world: World) -> None:
    data = bytearray(world.quote.read_bytes())
    data[200] ^= 1
    world.quote.write_bytes(data)
    ran = await world.run("quote", "verify", world.quote, server=True)
    assert (ran.code, ran.document["check"]) == (3, "E3")
    assert world.pccs.requests == []


async def test_nothing_is_fetched_for_a_time_that_was_chosen(world: World) -> None:
    ran = await world.run("quote", "verify", world.quote, "--at", "2026-01-01T00:00:00Z", server=True)
    assert ran.code in (3, 5)
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
    ran = await world.run("quote", "verify", world.quote, "--at", now, server=True)
    assert (ran.code, ran.document["error"]["todo"]) == (5, "name it with --collateral")
    assert world.pccs.requests == []


@pytest.mark.parametrize(("status", "code"), [(503, 4), (404, 5), (500, 4)])
async def test_a_server_that_fails_gives_no_verdict(world: World, status: int, code: int) -> None:
    world.pccs.lie(DocumentKind.TCB_INFO, lies.status(status))
    ran = await world.run("quote", "verify", world.quote, server=True)
    assert ran.code == code
    assert "verdict" not in ran.document
    assert "--collateral" in ran.document["error"]["todo"]


async def test_what_is_kept_and_expired_is_replaced_or_says_since_when(world: World) -> None:
    await world.run("quote", "verify", world.quote, server=True)
    issued = datetime.now(UTC) - 33 * DAY - timedelta(hours=1)
    old = CollateralBundle(world.family, issued, world.platform.collateral(issued)).to_json()
    world.kept.write_bytes(old)
    world.pccs.lie(DocumentKind.TCB_INFO, lies.status(503))
    ran = await world.run("quote", "verify", world.quote, server=True)
    assert (ran.code, ran.document["error"]["code"]) == (6, "CLO-1220")
    assert ran.document["error"]["what"] == f"collateral for {world.family} expired 3 days ago"
    assert "run `cloister collateral fetch" in ran.document["error"]["todo"]
    assert (await world.run("collateral", "show")).document["families"][0]["state"] == "expired"
    assert (await world.run("collateral", "export", world.family.name, world.directory / "x")).code == 6
    world.pccs.honest()
    assert (await world.run("quote", "verify", world.quote, server=True)).code == 0
    assert world.kept.read_bytes() != old


async def test_a_server_with_other_collateral_is_not_believed(world: World, tmp_path: Path) -> None:
    other = SimulatedPlatform.create(tmp_path / "other")
    world.pccs.serve(world.family, other.collateral(datetime.now(UTC)))
    ran = await world.run("quote", "verify", world.quote, server=True)
    assert (ran.code, ran.document["error"]["code"]) == (3, "CLO-1224")


async def test_a_bundle_of_other_platforms_is_named(world: World) -> None:
    await world.run("collateral", "fetch", "--quote", world.quote, server=True)
    members = json.loads(world.kept.read_bytes())
    members["fmspc"] = "00906ed50000"
    other = world.directory / "other.json"
    other.write_text(json.dumps(members))
    ran = await world.run("quote", "verify", world.quote, "--collateral", other)
    assert (ran.code, ran.document["error"]["code"]) == (5, "CLO-1222")
    assert "00906ed50000" in ran.document["error"]["why"]
    renamed = world.kept.read_bytes()
    world.kept.write_text(json.dumps(members))
    ran = await world.run("quote", "verify", world.quote)
    assert (ran.code, ran.document["error"]["code"]) == (3, "CLO-1224")
    world.kept.write_bytes(renamed)
    assert (await world.run("quote", "verify", world.quote)).code == 0


async def test_collateral_of_two_roots_is_never_mixed(world: World) -> None:
    await world.run("collateral", "fetch", "--quote", world.quote, server=True)
    directory = world.kept.parent
    ran = run("collateral", "show", "--directory", directory, "--json")
    assert (ran.code, ran.document["error"]["code"]) == (2, "CLO-1001")
    assert run("collateral", "import", world.kept, "--directory", directory, "--json").code in (2, 3)


async def test_a_development_root_has_no_server_of_its_own(world: World) -> None:
    ran = await world.run("collateral", "fetch", "--quote", world.quote)
    assert ran.code == 2
    assert "--pccs" in ran.document["error"]["todo"]


def test_intels_root_in_a_file_is_intels(tmp_path: Path) -> None:
    (tmp_path / "intel.pem").write_bytes(INTEL_ROOT_PEM)
    assert not choose_root(tmp_path / "intel.pem").simulated
    assert not choose_root(None).simulated


@pytest.mark.parametrize("name", ["", "x", "tdx-b0c06f000000-platform", "tdx-zz-platform-standard", "a-b-c-d", "../x"])
def test_what_names_no_family_is_refused(name: str, tmp_path: Path) -> None:
    ran = run("collateral", "export", name, tmp_path / "out", "--state", tmp_path / "s", "--json")
    assert ran.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", ["http://pccs", "pccs:8081", "https://user:pw@pccs", "https://pccs/?x=1"])
def test_a_server_without_tls_is_refused(url: str, tmp_path: Path) -> None:
    ran = run("collateral", "fetch", "--fmspc", "b0c06f000000", "--pccs", url, "--state", tmp_path / "s", "--json")
    assert (ran.code, ran.document["error"]["code"]) == (2, "CLO-1001")


def test_a_certificate_without_a_pccs_is_refused(tmp_path: Path) -> None:
    ran = run("collateral", "fetch", "--fmspc", "b0c06f000000", "--pccs-ca", tmp_path / "x", "--state", tmp_path / "s")
    assert ran.code == 2


def test_the_document_of_a_verdict_knows_its_quote(platform: SimulatedPlatform) -> None:
    from cloister.cli.quote import Policy

    now = datetime.now(UTC)
    root = TrustRoot.from_pem(platform.root_pem, simulated=True)
    document = examine(
        platform.launch(sha384(b"image")).quote(b"r" * 64),
        lambda family: (platform.collateral(now), family.name),
        root=root, now=now, policy=Policy.DEFAULT,
    )  # fmt: skip
    assert document["collateral"].startswith("tdx-")
    assert ["header", "version", "4"] in document["quote"]
