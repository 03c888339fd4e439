# SPDX-License-Identifier: Apache-2.0
"""Every row of the check list has its adversarial input, and what is beside it is accepted."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.tdx.collateral import Collateral, verify_collateral
from cloister.tdx.pckchain import load_pck_chain
from cloister.tdx.quote import QuoteRejected, parse_quote
from cloister.tdx.tcb import merge_status, relaunch_status
from cloister.tdx.tcbinfo import COMPONENT_STATUSES, PLATFORM_STATUSES, TcbStatus
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import Verdict, verify_with_collateral
from fakes import forged_rows_collateral, forged_rows_policy, forged_rows_quote
from fakes.forged_collateral import BODY_15, BODY_15_EX, SERIALS, World, level, module_identity, serial, svns
from fakes.forged_quotes import pem
from fakes.forged_rows import PROVEN, ROWS, Case, proves

S = TcbStatus
CASES = [*forged_rows_quote.CASES, *forged_rows_collateral.CASES]
DOCUMENT = Path(__file__).parents[2] / "docs" / "attestation.md"


def rejection(world: World) -> QuoteRejected:
    with pytest.raises(QuoteRejected) as caught:
        world.verify()
    assert caught.value.reason
    return caught.value


def test_an_unchanged_world_is_accepted_check_by_check() -> None:
    verdict = World().verify()
    assert verdict.status is S.UP_TO_DATE
    assert verdict.simulated
    assert all(check.ok for check in verdict.checks)
    assert verdict.earliest_expiry == datetime(2026, 12, 1, tzinfo=UTC)
    assert (verdict.tcb_date, verdict.tcb_evaluation_number) == (datetime(2026, 4, 1, tzinfo=UTC), 20)
    assert verdict.warnings == ()


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_it_is_refused_by_its_row(case: Case) -> None:
    assert rejection(case.world()).check == case.row


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in forged_rows_policy.CASES])
def test_the_default_policy_refuses_it_by_its_row(case: forged_rows_policy.PolicyCase) -> None:
    appraisal = case.appraise()
    assert not appraisal.accepted
    assert {check.name for check in appraisal.checks if not check.ok} == {case.row}


def test_every_row_of_the_check_list_has_a_test() -> None:
    tested = {case.row for case in CASES} | {case.row for case in forged_rows_policy.CASES} | PROVEN
    assert len(ROWS) == 69
    assert set(ROWS) - tested == set()
    assert tested - set(ROWS) == {"status"}


def test_every_row_of_the_check_list_is_in_the_documentation() -> None:
    rows = set(re.findall(r"^\| ([A-Z][0-9]+) \|", DOCUMENT.read_text(), re.MULTILINE))
    assert rows == set(ROWS)


# What stands beside the refusals.


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.tcb_info.update(fmspc="00806f050000"),
        lambda w: w.tcb_info.update(issueDate="2026-11-22T12:00:00Z"),
        lambda w: w.tcb_info.update(nextUpdate="2026-11-22T13:00:00+01:00"),
        lambda w: w.tcb_info.update(more={"unknown": [1, None, "members"]}),
        lambda w: w.tcb_info["tcbLevels"].reverse(),
        lambda w: w.tcb_info["tcbLevels"].insert(0, level(svns(bytes(16), 0), "OutOfDate")),
        lambda w: w.tcb_info["tcbLevels"].append(level(svns())),
        lambda w: w.qe_identity["tcbLevels"].reverse(),
        lambda w: w.of_module(b"\5\x0a").tcb_info.update(tdxModuleIdentities=[module_identity("TDX_0a")]),
        lambda w: w.of_module(b"\5\x0a").tcb_info.update(tdxModuleIdentities=[module_identity("TDX_0A")]),
        # From version 1 on, the module's own SVNs are not compared with the level's first two.
        lambda w: w.of_module().tcb_info.update(tcbLevels=[level(svns(tdx=b"\xff\xff" + bytes(14)))]),
        lambda w: w.parts.update(root_ca_crl=w.crl("root").hex().upper(), pck_crl=w.crl("ca").hex()),
        lambda w: w.parts.update(
            pck_crl=b"-----BEGIN X509 CRL-----\n" + pem_text(w.crl("ca")) + b"-----END X509 CRL-----\n"
        ),
        lambda w: w.revoked.update(ca=[serial(number) for number in range(100_000, 110_000)]),
        lambda w: w.revoked.update(ca=[serial(SERIALS["leaf"] << 8), serial(SERIALS["leaf"] + 1)]),
        lambda w: w.parts.update(tcb_info_signature=w.collateral().tcb_info_signature.upper()),
        World.of_enclave,
        lambda w: setattr(w.of_enclave(), "version", 5),
        lambda w: setattr(w, "version", 5),
        lambda w: setattr(w, "body", BODY_15),
        lambda w: setattr(w, "body", BODY_15_EX),
        lambda w: setattr(w, "edit", lambda quote: quote + bytes(100)),
    ],
)
def test_what_is_merely_unusual_is_accepted(change: Callable[[World], object]) -> None:
    world = World()
    change(world)
    assert world.verify().status is S.UP_TO_DATE


def pem_text(der: bytes) -> bytes:
    return base64.encodebytes(der)


@proves("R3", "R5")
def test_a_serial_with_its_highest_bit_set_is_compared_as_a_number() -> None:
    world = World()
    world.platform.ca_der = world.platform.certificate(
        replace(forged_rows_quote.CA, serial=0xCAFE), "ca", "root", forged_rows_quote.ROOT
    )
    world.platform.chain = (world.platform.leaf_der, world.platform.ca_der, world.platform.root_der)
    assert world.verify().status is S.UP_TO_DATE
    world.revoked["root"] = [b"\0\xca\xfe"]
    assert rejection(world).check == "R3"


@proves("R3")
def test_another_edition_of_the_ca_in_the_quote_is_asked_for_too() -> None:
    world = World()
    edition = world.platform.certificate(
        replace(forged_rows_quote.CA, serial=0xBAD), "ca", "root", forged_rows_quote.ROOT
    )
    world.chain = pem(world.platform.leaf_der, edition, world.platform.root_der)
    assert world.verify().status is S.UP_TO_DATE
    world.revoked["root"] = [serial(0xBAD)]
    assert rejection(world).check == "R3"


@proves("M1", "M2")
@pytest.mark.parametrize("platform", sorted(PLATFORM_STATUSES - {S.REVOKED}))
@pytest.mark.parametrize("component", sorted(COMPONENT_STATUSES))
@pytest.mark.parametrize("which", ["module", "enclave"])
def test_a_component_worsens_the_platform(platform: TcbStatus, component: TcbStatus, which: str) -> None:
    world = World().of_module()
    world.tcb_info["tcbLevels"] = [level(svns(), platform, "INTEL-SA-PLATFORM", date="2026-06-01")]
    world.qe_identity["tcbLevels"] = [level({"isvsvn": 4}, "UpToDate", "INTEL-SA-QE", date="2026-02-02")]
    if which == "module":
        world.tcb_info["tdxModuleIdentities"] = [module_identity(status=component)]
    else:
        world.qe_identity["tcbLevels"][0]["tcbStatus"] = component
    if component is S.REVOKED:
        assert rejection(world).check == "M3"
        return
    configuration = platform in (S.CONFIGURATION_NEEDED, S.CONFIGURATION_AND_SW_HARDENING_NEEDED)
    worse = S.OUT_OF_DATE_CONFIGURATION_NEEDED if configuration else S.OUT_OF_DATE
    stays = component is S.UP_TO_DATE or platform is S.OUT_OF_DATE_CONFIGURATION_NEEDED
    verdict = world.verify()
    assert verdict.status is (platform if stays else worse)
    assert verdict.advisories == ("INTEL-SA-MODULE", "INTEL-SA-PLATFORM", "INTEL-SA-QE")
    assert verdict.tcb_date == datetime(2026, 2, 2, tzinfo=UTC)


@proves("M3")
def test_revoked_is_stronger_than_everything() -> None:
    for status in PLATFORM_STATUSES:
        assert merge_status(status, (S.OUT_OF_DATE, S.REVOKED)) is S.REVOKED
    assert merge_status(S.REVOKED, (S.UP_TO_DATE, S.OUT_OF_DATE)) is S.REVOKED


RELAUNCH, RELAUNCH_CONFIGURE = S.TD_RELAUNCH_ADVISED, S.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
BEHIND, BEHIND_CONFIGURE = S.OUT_OF_DATE, S.OUT_OF_DATE_CONFIGURATION_NEEDED


@proves("T14")
@pytest.mark.parametrize(
    ("launch", "current", "status"),
    [
        (BEHIND, S.UP_TO_DATE, RELAUNCH),
        (BEHIND, S.SW_HARDENING_NEEDED, RELAUNCH),
        (BEHIND, S.CONFIGURATION_NEEDED, RELAUNCH_CONFIGURE),
        (BEHIND, S.CONFIGURATION_AND_SW_HARDENING_NEEDED, RELAUNCH_CONFIGURE),
        (BEHIND, BEHIND, BEHIND),
        (BEHIND, BEHIND_CONFIGURE, BEHIND),
        (BEHIND, S.REVOKED, BEHIND),
        (BEHIND_CONFIGURE, S.UP_TO_DATE, RELAUNCH_CONFIGURE),
        (BEHIND_CONFIGURE, S.SW_HARDENING_NEEDED, RELAUNCH_CONFIGURE),
        (BEHIND_CONFIGURE, S.CONFIGURATION_NEEDED, RELAUNCH_CONFIGURE),
        (BEHIND_CONFIGURE, S.CONFIGURATION_AND_SW_HARDENING_NEEDED, RELAUNCH_CONFIGURE),
        (BEHIND_CONFIGURE, BEHIND, BEHIND_CONFIGURE),
        (BEHIND_CONFIGURE, BEHIND_CONFIGURE, BEHIND_CONFIGURE),
        (S.UP_TO_DATE, BEHIND, S.UP_TO_DATE),
        (S.UP_TO_DATE, S.UP_TO_DATE, S.UP_TO_DATE),
        (S.CONFIGURATION_NEEDED, S.UP_TO_DATE, S.CONFIGURATION_NEEDED),
    ],
)
def test_a_newer_module_advises_a_relaunch(launch: TcbStatus, current: TcbStatus, status: TcbStatus) -> None:
    assert relaunch_status(launch, current) is status


@proves("T14")
@pytest.mark.parametrize(
    ("launch", "current", "status", "statuses"),
    [
        (b"\5\1", b"\5\1", S.UP_TO_DATE, (S.UP_TO_DATE, S.UP_TO_DATE)),
        (b"\3\1", b"\5\1", RELAUNCH, (S.OUT_OF_DATE, S.UP_TO_DATE)),
        (b"\3\1", b"\4\1", S.OUT_OF_DATE, (S.OUT_OF_DATE, S.OUT_OF_DATE)),
        (b"\5\1", b"\3\1", S.UP_TO_DATE, (S.UP_TO_DATE, S.OUT_OF_DATE)),
        (b"\5\1", b"\2\1", S.UP_TO_DATE, (S.UP_TO_DATE, S.REVOKED)),
    ],
)
def test_launch_and_current_status_are_both_told(
    launch: bytes, current: bytes, status: TcbStatus, statuses: tuple[TcbStatus, TcbStatus]
) -> None:
    world = World().of_module(launch, current)
    levels = [(5, "UpToDate"), (3, "OutOfDate"), (2, "Revoked")]
    identity = module_identity() | {"tcbLevels": [level({"isvsvn": svn}, status) for svn, status in levels]}
    world.tcb_info["tdxModuleIdentities"] = [identity]
    verdict = world.verify()
    assert (verdict.status, verdict.launch_status, verdict.current_status) == (status, *statuses)


@proves("T13")
def test_evaluation_numbers_that_differ_are_told_and_old_ones_refused() -> None:
    world = World()
    world.tcb_info["tcbEvaluationDataNumber"] = 21
    verdict = world.verify()
    assert verdict.warnings == ("T13: TCB info is of evaluation 21, the QE identity of 20",)
    roots = [world.platform.trust_root]
    assert Verifier(roots, minimum_evaluation_number=20).verify(world.quote(), world.collateral(), now=world.now)
    with pytest.raises(QuoteRejected) as caught:
        Verifier(roots, minimum_evaluation_number=21).verify(world.quote(), world.collateral(), now=world.now)
    assert caught.value.check == "T13"


@proves("T13")
@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.tcb_info.update(tcbEvaluationDataNumber=19),
        lambda w: w.qe_identity.update(tcbEvaluationDataNumber=19),
        lambda w: w.tcb_info.update(issueDate="2026-10-31T00:00:00Z"),
        lambda w: w.parts.update(pck_crl=w.crl("ca", number=0)),
        lambda w: w.parts.update(root_ca_crl=w.crl("root", number=0)),
    ],
)
def test_validly_signed_collateral_does_not_replace_newer(change: Callable[[World], Any]) -> None:
    world = World()
    chain = load_pck_chain(parse_quote(world.quote()).signature.pck_chain_pem, roots=[world.platform.trust_root])
    newer = verify_collateral(world.collateral(), chain)
    newer.require_not_older(newer)
    change(world)
    older = verify_collateral(world.collateral(), chain)
    newer.require_not_older(older)
    with pytest.raises(QuoteRejected) as caught:
        older.require_not_older(newer)
    assert caught.value.check == "T13"


@proves("X1", "T7", "R1", "R2", "P6")
def test_every_part_is_asked_for_the_time() -> None:
    world = World()
    outcomes: list[str] = []
    for days in (-400, -30, -2, 0, 9, 35, 400):
        world.now = datetime(2026, 11, 22, 12, tzinfo=UTC) + timedelta(days=days)
        try:
            outcomes.append(verify_fixed(world, world.now).status)
        except QuoteRejected as error:
            outcomes.append(error.check)
    assert outcomes == ["P6", "R1", "R1", "UpToDate", "T7", "R1", "P6"]


def verify_fixed(world: World, now: datetime) -> Verdict:
    return verify_with_collateral(world.quote(), world.collateral(), roots=[world.platform.trust_root], now=now)


@proves("P2")
def test_collateral_under_another_root_says_nothing_about_a_quote() -> None:
    mine, other = World(), World()
    roots = [mine.platform.trust_root, other.platform.trust_root]
    with pytest.raises(QuoteRejected) as caught:
        verify_with_collateral(mine.quote(), other.collateral(), roots=roots, now=mine.now)
    assert caught.value.check == "R1"


@proves("X2")
def test_collateral_that_is_no_object_is_refused() -> None:
    for data in (b"", b"[]", b"\xff", b"[" * 100_000, b" " * (17 << 20)):
        with pytest.raises(QuoteRejected) as caught:
            Collateral.parse(data)
        assert caught.value.check == "X2"
    world = World()
    collateral = world.collateral()
    again = Collateral.parse(collateral.to_json())
    assert again.tcb_info == collateral.tcb_info
    assert verify_with_collateral(world.quote(), again, roots=[world.platform.trust_root], now=world.now)
