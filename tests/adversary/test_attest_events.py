# SPDX-License-Identifier: Apache-2.0
"""What a policy wants of an event log, and of RTMR3, decides an enrolment; who booted something else gets none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from contextlib import AbstractContextManager

import pytest

from cloister.appraisal.policy import parse_td_policy
from cloister.errors import CloisterError, Code
from cloister.guest.verdictbundle import VerdictBundle, replay
from cloister.identity import Role
from cloister.tdx import workload
from cloister.tdx.eventlog import EventLog
from cloister.tlv import sha384
from fakes.attest_harness import CONFIG, ENVIRONMENT, IMAGE, SCRIPT, LocalAttest, local_attest

OTHER = "66" * 48
MACHINE, KERNEL = (sha384(f"simulated {what}".encode()).hex() for what in ("machine configuration", "kernel"))
BOOT = (
    "required: ["
    f'{{register: rtmr0, digests: ["{MACHINE}"]}}, '
    f'{{register: rtmr1, type: EV_EFI_BOOT_SERVICES_APPLICATION, digests: ["{KERNEL}"]}}, '
    f'{{register: rtmr2, type: EV_IPL, digests: ["{sha384(IMAGE).hex()}"]}}], closed: [rtmr0, rtmr1, rtmr2]'
)
SEALED_LAST = (
    "required: [{register: rtmr3, name: cloister.workload.script}, {register: rtmr3, name: cloister.workload.sealed}], "
    "order: as-listed, forbidden: [{register: rtmr3, name: cloister.workload.dataset}]"
)


def judged_by(spec: str) -> AbstractContextManager[LocalAttest]:
    head = "apiVersion: cloister.dev/v1\nkind: AppraisalPolicy\nmetadata: {name: test, version: 1}\n"
    return local_attest(policy=parse_td_policy(f"{head}spec:\n  tcb: {{status: [UpToDate]}}\n  {spec}\n".encode()))


async def failed_checks(attest: LocalAttest, role: Role = Role.TRAINER) -> list[str]:
    """Enrol; return the names of the checks that stopped it, none when it got its identity."""
    with contextlib.suppress(CloisterError):
        await attest.enrolment.attest(await attest.request(attest.td(role)))
    (verdict,) = await attest.verdicts.newest(limit=1)
    assert verdict.accepted == all(check.ok for check in verdict.checks)
    return [check.name for check in verdict.checks if not check.ok]


@pytest.mark.parametrize("rules", [BOOT, SEALED_LAST])
async def test_a_td_whose_log_is_as_wanted_gets_its_identity(rules: str) -> None:
    with judged_by(f"event_log: {{{rules}}}") as attest:
        assert await failed_checks(attest) == []
        (verdict,) = await attest.verdicts.newest(limit=1)
        assert [check.name for check in verdict.checks if check.name.startswith("event-log.required")]


@pytest.mark.parametrize(
    ("right", "wrong", "refused_by"),
    [
        (MACHINE, OTHER, ["event-log.required[0]", "event-log.closed.rtmr0"]),
        (KERNEL, OTHER, ["event-log.required[1]", "event-log.closed.rtmr1"]),
        ("EV_IPL", "EV_EFI_ACTION", ["event-log.required[2]", "event-log.closed.rtmr2"]),
    ],
)
async def test_a_td_that_booted_something_else_is_refused(right: str, wrong: str, refused_by: list[str]) -> None:
    with judged_by(f"event_log: {{{BOOT.replace(right, wrong)}}}") as attest:
        assert await failed_checks(attest) == refused_by


async def test_a_forbidden_measurement_and_a_wrong_order_are_refused() -> None:
    with judged_by(f"event_log: {{{SEALED_LAST.replace('workload.dataset', 'trust-bundle')}}}") as attest:
        assert await failed_checks(attest) == ["event-log.forbidden[0]"]
    turned = SEALED_LAST.replace("workload.script", "x").replace("workload.sealed", "workload.script")
    with judged_by(f"event_log: {{{turned.replace('.x}', '.workload.sealed}')}}}") as attest:
        assert await failed_checks(attest) == ["event-log.order"]


async def test_a_log_that_only_claims_what_a_policy_wants_does_not_replay() -> None:
    """The rules come after the registers: an event that was not extended is not there."""
    with judged_by(f"event_log: {{{BOOT.replace(KERNEL, OTHER)}}}") as attest:
        request = await attest.request(attest.td(Role.TRAINER))
        events = json.loads(request.evidence.event_log)
        events[1]["digest"] = OTHER
        request.evidence.event_log = json.dumps(events).encode()
        with pytest.raises(CloisterError) as caught:
            await attest.enrolment.attest(request)
        assert caught.value.code is Code.EVENT_LOG_MISMATCH


def plan(attest: LocalAttest, **changes: bytes) -> workload.WorkloadPlan:
    planned = workload.WorkloadPlan(
        role=Role.TRAINER, environment=ENVIRONMENT, trust_bundle=attest.bundle.digest, script=SCRIPT, config=CONFIG
    )
    return dataclasses.replace(planned, **changes)


async def test_rtmr3_can_be_pinned_before_a_workload_runs() -> None:
    with local_attest() as first:
        expected = plan(first).rtmr3
        td = first.td(Role.TRAINER)
        assert td.event_log.replay()[3] == expected
        assert plan(first, config=b"\x66" * 48).rtmr3 != expected


async def pinned(register: bytes, attest: LocalAttest) -> None:
    head = "apiVersion: cloister.dev/v1\nkind: AppraisalPolicy\nmetadata: {name: test, version: 1}\n"
    text = f'{head}spec:\n  tcb: {{status: [UpToDate]}}\n  measurements: {{rtmr3: ["{register.hex()}"]}}\n'
    attest.verifier.policy = parse_td_policy(text.encode())


async def test_a_pinned_rtmr3_admits_that_workload_and_no_other() -> None:
    with local_attest() as attest:
        await pinned(plan(attest).rtmr3, attest)
        assert await failed_checks(attest) == []
        assert await failed_checks(attest, Role.GATEWAY) == ["measurements.rtmr3"]
        await pinned(plan(attest, script=b"\x66" * 48).rtmr3, attest)
        assert await failed_checks(attest) == ["measurements.rtmr3"]


async def test_keys_that_a_workload_received_later_do_not_change_what_was_pinned() -> None:
    with local_attest() as attest:
        await pinned(plan(attest).rtmr3, attest)
        td = attest.td(Role.TRAINER)
        before = td.event_log.replay()[3]
        td.record_key("cloister-key://hospital-a/data", 1, b"\x01" * 48)
        assert td.event_log.replay()[3] != before
        assert workload.sealed_register(td.event_log) == before
        await attest.enrolment.attest(await attest.request(td))


async def test_a_refusal_by_an_event_can_be_replayed() -> None:
    with judged_by(f"event_log: {{{BOOT.replace(KERNEL, OTHER)}}}") as attest:
        await failed_checks(attest)
        (verdict,) = await attest.verdicts.newest(limit=1)
        bundle = VerdictBundle.parse(await attest.verdicts.bundle(verdict.number))
        again = await replay(bundle)
        assert again.same
        assert not again.accepted


def test_an_empty_log_has_no_register_of_a_sealed_workload() -> None:
    assert workload.sealed_register(EventLog()) == bytes(48)
