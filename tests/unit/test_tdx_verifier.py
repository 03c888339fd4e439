# SPDX-License-Identifier: Apache-2.0
"""Claims about what a verifier remembers: it gives the verdicts of one that remembers nothing, at any time."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from cloister.tdx.defaultpolicy import DefaultPolicy, Wanted, appraise, appraise_platform
from cloister.tdx.quote import QuoteRejected, parse_quote
from cloister.tdx.tcbinfo import TcbStatus
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import Verdict
from fakes.forged_collateral import BODY_15, SERIALS, World, level, serial, svns
from fakes.forged_quotes import BODY
from fakes.forged_rows_policy import LOG, REPORT_DATA


def verifier(*worlds: World, **limits: int) -> Verifier:
    return Verifier([world.platform.trust_root for world in worlds], **limits)


def rejection(subject: Verifier, world: World) -> str:
    with pytest.raises(QuoteRejected) as caught:
        subject.verify(world.quote(), world.collateral(), now=world.now)
    return caught.value.check


def test_what_was_verified_is_kept_once() -> None:
    world = World()
    subject, collateral, quote = verifier(world), world.collateral(), world.quote()
    for _ in range(3):
        assert subject.verify(quote, collateral, now=world.now).status is TcbStatus.UP_TO_DATE
    assert subject.kept == (1, 1, 1)


def test_collateral_that_expires_while_it_is_kept_is_not_used_any_more() -> None:
    world = World()
    subject, collateral, quote = verifier(world), world.collateral(), world.quote()
    end = datetime(2026, 12, 1, tzinfo=UTC)
    assert subject.verify(quote, collateral, now=end).earliest_expiry == end
    with pytest.raises(QuoteRejected) as caught:
        subject.verify(quote, collateral, now=end + timedelta(seconds=1))
    assert caught.value.check == "T7"
    assert subject.verify(quote, collateral, now=end)


def test_a_clock_that_steps_back_finds_it_not_yet_valid() -> None:
    world = World()
    subject, collateral, quote = verifier(world), world.collateral(), world.quote()
    assert subject.verify(quote, collateral, now=world.now)
    for back, check in ((timedelta(days=2), "R1"), (timedelta(days=365), "P6"), (timedelta(days=365 * 20), "X1")):
        with pytest.raises(QuoteRejected) as caught:
            subject.verify(quote, collateral, now=world.now - back)
        assert caught.value.check == check
    assert subject.verify(quote, collateral, now=world.now)


def test_a_chain_that_is_kept_is_revoked_by_the_next_list() -> None:
    world = World()
    subject, quote = verifier(world), world.quote()
    assert subject.verify(quote, world.collateral(), now=world.now)
    world.revoked["ca"] = [serial(SERIALS["leaf"])]
    with pytest.raises(QuoteRejected) as caught:
        subject.verify(quote, world.collateral(), now=world.now)
    assert caught.value.check == "R4"


def test_a_failure_is_not_kept_and_spoils_nothing() -> None:
    world = World()
    subject, good, quote = verifier(world), world.collateral(), world.quote()
    assert subject.verify(quote, good, now=world.now)
    bad = replace(good, tcb_info_signature=good.qe_identity_signature)
    for _ in range(2):
        with pytest.raises(QuoteRejected) as caught:
            subject.verify(quote, bad, now=world.now)
        assert caught.value.check == "T2"
    assert subject.verify(quote, good, now=world.now)
    assert subject.kept == (1, 1, 1)


def test_a_chain_that_is_kept_vouches_only_for_its_own_quotes() -> None:
    mine, other = World(), World()
    subject = verifier(mine, other)
    assert subject.verify(mine.quote(), mine.collateral(), now=mine.now)
    assert subject.verify(other.quote(), other.collateral(), now=other.now)
    mine.chain = other.platform.quote()[1226:]  # the other's chain behind my signatures
    assert rejection(subject, mine) == "R1"
    mine.edit = lambda quote: quote[:700] + other.quote()[700:]
    with pytest.raises(QuoteRejected) as caught:
        subject.verify(mine.quote(), other.collateral(), now=mine.now)
    assert caught.value.check == "E3"


def test_a_report_that_is_kept_vouches_for_its_very_bytes_and_its_own_platform() -> None:
    world, other = World(), World()
    subject, collateral = verifier(world, other), world.collateral()
    quote = world.quote()
    assert subject.verify(quote, collateral, now=world.now)
    signature = parse_quote(quote).signature
    for part, row in (
        (signature.qe_report, "E1"),
        (signature.qe_report_signature, "E1"),
        (signature.attestation_key, "E4"),  # no point on the curve any more
        (signature.signature, "E3"),
    ):
        place = quote.index(part) + len(part) - 1
        forged = quote[:place] + bytes([quote[place] ^ 1]) + quote[place + 1 :]
        for _ in range(2):  # a failure is not kept
            with pytest.raises(QuoteRejected) as caught:
                subject.verify(forged, collateral, now=world.now)
            assert caught.value.check == row
    assert subject.verify(other.quote(), other.collateral(), now=other.now)
    other.edit = lambda its: its.replace(parse_quote(its).signature.qe_report, signature.qe_report).replace(
        parse_quote(its).signature.qe_report_signature, signature.qe_report_signature
    )
    assert rejection(subject, other) == "E1"
    assert subject.verify(quote, collateral, now=world.now)
    assert subject.kept[2] == 2


def test_memory_is_bounded() -> None:
    worlds = [World() for _ in range(4)]
    subject = verifier(*worlds, max_collateral=2, max_chains=2)
    for world in [*worlds, *worlds]:
        assert subject.verify(world.quote(), world.collateral(), now=world.now)
        assert max(subject.kept) <= 2


def test_threads_share_a_verifier() -> None:
    worlds = [World() for _ in range(3)]
    subject = verifier(*worlds, max_collateral=2, max_chains=2)
    cases = [(world.quote(), world.collateral(), world.now) for world in worlds]
    verdicts: list[Verdict] = []

    def work() -> None:
        verdicts.extend(subject.verify(quote, parts, now=now) for _ in range(5) for quote, parts, now in cases)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verdicts) == 60


def test_only_verification_makes_a_verdict() -> None:
    verdict = World().verify()
    with pytest.raises((TypeError, ValueError)):
        replace(verdict, now=verdict.now)
    with pytest.raises(TypeError, match="only verification"):
        Verdict(verdict.quote, verdict.chain, verdict.collateral, verdict.tcb, verdict.now, witness=None)


# What the default policy accepts.


def test_the_default_policy_accepts_what_was_asked_for() -> None:
    world = World()
    world.body = replace(BODY, rtmrs=LOG.replay())
    appraisal = appraise(
        world.verify(),
        report_data=REPORT_DATA,
        policy=DefaultPolicy(
            mr_seams=frozenset({BODY.mr_seam}),
            wanted=Wanted(mr_td=frozenset({BODY.mr_td}), rtmrs=(None, None, None, frozenset({LOG.replay()[3]}))),
        ),
        event_log=LOG.replay,
    )
    assert appraisal.accepted
    assert appraisal.first_failure is None
    names = {"A1", "A2", "A3", "A4", "A5", "A6", "A7", "A8", "A9", "A10", "A11", "T13", "status"}
    assert {check.name for check in appraisal.checks} == names


def test_a_quote_for_somebody_else_is_looked_at_without_its_binding() -> None:
    world = World()
    world.body = replace(BODY, report_data=bytes(64))
    assert appraise_platform(world.verify()).accepted
    assert appraise_platform(World().of_enclave().verify()).accepted


@pytest.mark.parametrize(
    ("bits", "policy"),
    [
        (1 << 30, DefaultPolicy()),
        (1 << 63, DefaultPolicy(features=frozenset({"PERFMON"}))),
        (1 << 31 | 1 << 27, DefaultPolicy(features=frozenset({"KL", "LASS"}))),
        (1 << 29, DefaultPolicy(migratable=True)),
    ],
)
def test_features_that_a_policy_allows_are_accepted(bits: int, policy: DefaultPolicy) -> None:
    world = World()
    world.body = replace(BODY, td_attributes=(1 << 28 | bits).to_bytes(8, "little"))
    assert appraise_platform(world.verify(), policy=policy).accepted


def test_a_service_td_and_statuses_that_a_policy_allows_are_accepted() -> None:
    world = World()
    world.body = replace(BODY_15, mr_service_td=b"s" * 48)
    assert appraise_platform(world.verify(), policy=DefaultPolicy(service_tds=frozenset({b"s" * 48}))).accepted
    world = World()
    world.tcb_info["tcbLevels"] = [level(svns(), "SWHardeningNeeded")]
    allowed = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.SW_HARDENING_NEEDED})
    assert appraise_platform(world.verify(), policy=DefaultPolicy(statuses=allowed)).accepted


def test_a_relaunch_status_that_a_policy_allows_is_accepted() -> None:
    world = World().of_module(b"\3\1", b"\5\1")
    levels = [level({"isvsvn": 5}), level({"isvsvn": 3}, "OutOfDate")]
    world.tcb_info["tdxModuleIdentities"][0]["tcbLevels"] = levels
    allowed = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.TD_RELAUNCH_ADVISED})
    assert appraise_platform(world.verify(), policy=DefaultPolicy(statuses=allowed)).accepted
    assert not appraise_platform(world.verify()).accepted
