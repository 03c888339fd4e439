# SPDX-License-Identifier: Apache-2.0
"""What Intel says about a platform, and what the policy wants of it, decides; nothing else does."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from cloister import ear
from cloister.api.attest.v1 import attest_pb2
from cloister.appraisal.policy import TdPolicy, parse_td_policy
from cloister.appraisal.references import ReferenceSet, parse_reference_set
from cloister.collateral.bundle import CollateralBundle, save
from cloister.collateral.family import Family
from cloister.collateral.offline import OfflineCollateral
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import EvidenceVerifier
from cloister.guest.verdictbundle import collateral_digest
from cloister.identity import Role
from cloister.tlv import sha384
from cloister_sim.collateral import EVALUATION_NUMBER
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import (
    ATTEST_ID,
    CONFIG,
    ENVIRONMENT,
    JOB,
    MANIFEST,
    SCRIPT,
    TRUST_DOMAIN,
    LocalAttest,
    local_attest,
)
from fakes.sim_collateral import collateral_of

MR_TD = sha384(b"simulated virtual firmware")
OTHER = "66" * 48


def a_policy(spec: str = "", tcb: str = "{status: [UpToDate]}") -> TdPolicy:
    head = "apiVersion: cloister.dev/v1\nkind: AppraisalPolicy\nmetadata: {name: test, version: 1}\n"
    return parse_td_policy(f"{head}spec:\n  tcb: {tcb}\n{spec}".encode())


def a_set(values: str, version: int = 3) -> ReferenceSet:
    head = "apiVersion: cloister.dev/v1\nkind: ReferenceSet\n"
    return parse_reference_set(f"{head}metadata: {{name: firmware, version: {version}}}\nspec: {values}\n".encode())


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest() as local:
        yield local


@contextmanager
def judged_by(policy: TdPolicy, *references: ReferenceSet) -> Iterator[LocalAttest]:
    with local_attest(policy=policy, references=references) as local:
        yield local


async def enrol(attest: LocalAttest) -> ear.Ear:
    """Enrol an acceptable trainer; return what its token says."""
    response = await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER)))
    return ear.verify(
        response.attestation_result,
        keys=attest.bundle.token_keys,
        issuer=ATTEST_ID,
        audience=f"spiffe://{TRUST_DOMAIN}",
        now=attest.clock(),
    )


async def refusal(attest: LocalAttest, request: attest_pb2.AttestRequest | None = None) -> tuple[list[str], Code, str]:
    """Enrol a trainer that must be refused; return all failed checks, the code and the advice."""
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request or await attest.request(attest.td(Role.TRAINER)))
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert not verdict.accepted
    return [check.name for check in verdict.checks if not check.ok], caught.value.code, caught.value.todo


async def test_a_token_says_what_collateral_says(attest: LocalAttest) -> None:
    said = collateral_of(attest.platform, attest.clock(), advisories=["INTEL-SA-00837"])
    attest.source.change(said)
    token = await enrol(attest)
    issued = attest.clock().replace(microsecond=0)
    assert (token.tee.tcb_status, token.tee.tcb_date) == ("UpToDate", "2026-05-13T00:00:00Z")
    assert (token.tee.advisories, token.tee.tcb_evaluation) == (("INTEL-SA-00837",), EVALUATION_NUMBER)
    assert token.tee.collateral_issued == f"{issued:%Y-%m-%dT%H:%M:%SZ}"
    assert token.tee.collateral_expires == f"{issued + timedelta(days=30):%Y-%m-%dT%H:%M:%SZ}"
    assert token.inputs["collateral"] == collateral_digest(said)
    assert token.inputs["policy"] == attest.verifier.policy.digest
    assert token.status == ear.AFFIRMING
    # Nothing good is said of hardware that is not there.
    assert token.trustworthiness == {"instance-identity": 2, "configuration": 2, "executables": 2}


async def test_expired_collateral_is_refused_even_when_its_source_serves_it(attest: LocalAttest) -> None:
    await enrol(attest)
    attest.clock.turn(days=30, seconds=1)
    failed, code, _ = await refusal(attest)
    assert code is Code.QUOTE_REJECTED
    assert failed[0] in {"quote.R1", "quote.R2", "quote.T7", "quote.Q3"}


async def test_collateral_from_the_future_is_refused(attest: LocalAttest) -> None:
    attest.source.change(collateral_of(attest.platform, attest.clock() + timedelta(hours=1)))
    failed, code, _ = await refusal(attest)
    assert code is Code.QUOTE_REJECTED
    assert failed[0].startswith("quote.")


async def test_a_source_that_has_nothing_current_ends_the_enrolment_with_its_own_advice(
    attest: LocalAttest, tmp_path: Path
) -> None:
    directory = attest.platform.publish(tmp_path / "collateral", attest.clock())
    offline = OfflineCollateral(directory, root=attest.root, clock=attest.clock)
    attest.enrolment._verifier = EvidenceVerifier(attest.root, offline)
    await enrol(attest)
    attest.clock.turn(days=33)
    failed, code, todo = await refusal(attest)
    assert (failed, code) == (["collateral.available"], Code.COLLATERAL_EXPIRED)
    assert "cloister collateral fetch" in todo
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert "expired 3 days ago" in verdict.checks[-1].got


async def test_nobody_makes_attest_ask_for_collateral_without_a_genuine_chain(
    attest: LocalAttest, tmp_path: Path
) -> None:
    stranger = SimulatedPlatform.create(tmp_path / "stranger")
    await refusal(attest, await attest.request(attest.td(Role.TRAINER, platform=stranger)))
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.quote = request.evidence.quote[:-500]
    await refusal(attest, request)
    assert attest.source.asked == []
    await enrol(attest)
    assert len(attest.source.asked) == 1


async def test_a_revoked_platform_is_refused(attest: LocalAttest) -> None:
    await enrol(attest)
    attest.source.change(collateral_of(attest.platform, attest.clock(), revoked=True))
    assert (await refusal(attest))[:2] == (["quote.R4"], Code.QUOTE_REJECTED)
    attest.source.change(collateral_of(attest.platform, attest.clock(), status="Revoked"))
    assert (await refusal(attest))[:2] == (["quote.M3"], Code.QUOTE_REJECTED)


async def test_collateral_of_another_authority_is_refused(attest: LocalAttest, tmp_path: Path) -> None:
    stranger = SimulatedPlatform.create(tmp_path / "stranger")
    attest.source.change(stranger.collateral(attest.clock()))
    failed, code, _ = await refusal(attest)
    assert code is Code.QUOTE_REJECTED
    assert len(failed) == 1
    forged = replace(attest.platform.collateral(attest.clock()), tcb_info=b"{}")
    attest.source.change(forged)
    assert (await refusal(attest))[0] == ["quote.T2"]


@pytest.mark.parametrize("status", ["SWHardeningNeeded", "ConfigurationNeeded", "OutOfDate"])
async def test_a_platform_that_is_not_up_to_date_needs_a_policy_that_says_so_and_is_a_warning(status: str) -> None:
    with local_attest() as strict:
        strict.source.change(collateral_of(strict.platform, strict.clock(), status=status))
        assert (await refusal(strict))[:2] == (["tcb.status"], Code.APPRAISAL_FAILED)
    with judged_by(a_policy(tcb=f"{{status: [UpToDate, {status}]}}")) as lenient:
        lenient.source.change(collateral_of(lenient.platform, lenient.clock(), status=status))
        token = await enrol(lenient)
        assert (token.tee.tcb_status, token.status) == (status, ear.WARNING)
        assert token.trustworthiness["hardware"] == 32


@pytest.mark.parametrize(
    ("tcb", "good", "bad", "check"),
    [
        ("min_date: 2026-05-13", {}, {"tcb_date": "2026-05-12T23:59:59Z"}, "tcb.date"),
        ("min_evaluation: 20", {}, {"evaluation": 19}, "tcb.evaluation"),
        ("advisories: {allow: []}", {}, {"advisories": ["INTEL-SA-00837"]}, "tcb.advisories"),
        (
            "advisories: {allow: [INTEL-SA-00837]}",
            {"advisories": ["INTEL-SA-00837"]},
            {"advisories": ["INTEL-SA-00837", "INTEL-SA-01111"]},
            "tcb.advisories",
        ),
    ],
)
async def test_what_is_open_on_a_platform_is_bounded(tcb: str, good: dict, bad: dict, check: str) -> None:  # type: ignore[type-arg]
    with judged_by(a_policy(tcb=f"{{status: [UpToDate], {tcb}}}")) as attest:
        attest.source.change(collateral_of(attest.platform, attest.clock(), **good))
        await enrol(attest)
        attest.source.change(collateral_of(attest.platform, attest.clock(), **bad))
        assert (await refusal(attest))[:2] == ([check], Code.APPRAISAL_FAILED)


async def test_an_evaluation_number_does_not_go_back_under_a_running_attest_nor_below_the_policys(
    attest: LocalAttest, tmp_path: Path
) -> None:
    directory, now = attest.platform.publish(tmp_path / "collateral", attest.clock()), attest.clock()
    older = collateral_of(attest.platform, now, evaluation=EVALUATION_NUMBER - 1)

    def restarted(policy: TdPolicy) -> EvidenceVerifier:
        offline = OfflineCollateral(directory, root=attest.root, clock=attest.clock)
        return EvidenceVerifier(attest.root, offline, policy=policy)

    attest.enrolment._verifier = restarted(a_policy())
    await enrol(attest)
    await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER)))
    family = Family.of(attest.platform_fmspc.hex(), "platform", "tdx")
    save(CollateralBundle(family, now, older), directory, root=attest.root, now=now, reset=True)
    assert (await enrol(attest)).tee.tcb_evaluation == EVALUATION_NUMBER
    attest.enrolment._verifier = restarted(a_policy(tcb=f"{{status: [UpToDate], min_evaluation: {EVALUATION_NUMBER}}}"))
    assert (await refusal(attest))[0] == ["tcb.evaluation"]


async def test_only_listed_platforms_enrol() -> None:
    for wanted, check in (("{fmspc: [000000000000]}", "platform.fmspc"), (f"{{piid: [{'66' * 16}]}}", "platform.piid")):
        with judged_by(a_policy(f"  platforms: {wanted}\n")) as attest:
            assert (await refusal(attest))[:2] == ([check], Code.APPRAISAL_FAILED)
    with local_attest() as attest:
        fmspc, piid = attest.platform_fmspc.hex(), attest.platform_piid.hex()
        policy = a_policy(f"  platforms: {{fmspc: [{fmspc}], piid: [{piid}]}}\n")
        attest.enrolment._verifier = EvidenceVerifier(attest.root, attest.source, policy=policy)
        await enrol(attest)


async def test_old_collateral_is_refused_or_a_warning_as_the_policy_says() -> None:
    with judged_by(a_policy("  collateral: {max_age: 10d}\n")) as strict:
        strict.clock.turn(days=9)
        assert (await enrol(strict)).status == ear.AFFIRMING
        strict.clock.turn(days=2)
        assert (await refusal(strict))[:2] == (["collateral.age"], Code.APPRAISAL_FAILED)
    with judged_by(a_policy("  collateral: {max_age: 10d, on_stale: warn}\n")) as lenient:
        lenient.clock.turn(days=11)
        token = await enrol(lenient)
        assert (token.status, token.trustworthiness["hardware"]) == (ear.WARNING, 32)


async def test_measurements_are_among_the_listed_ones() -> None:
    with judged_by(a_policy(f'  measurements: {{mr_td: ["{MR_TD.hex()}"], mr_owner: ["{"00" * 48}"]}}\n')) as attest:
        await enrol(attest)
    for register in ("mr_td", "mr_seam", "mr_config_id", "mr_owner", "mr_owner_config", "rtmr0", "rtmr1", "rtmr2"):
        with judged_by(a_policy(f'  measurements: {{{register}: ["{OTHER}"]}}\n')) as attest:
            assert (await refusal(attest))[:2] == ([f"measurements.{register}"], Code.APPRAISAL_FAILED)


async def test_an_environment_is_among_the_listed_ones() -> None:
    with judged_by(a_policy(f'  workload: {{environment: ["sha384:{ENVIRONMENT.hex()}"]}}\n')) as attest:
        await enrol(attest)
    with judged_by(a_policy(f'  workload: {{environment: ["sha384:{OTHER}"]}}\n')) as attest:
        assert (await refusal(attest))[0] == ["workload.environment"]


@pytest.mark.parametrize("name", ["script", "config"])
async def test_code_and_configuration_are_among_the_listed_ones(name: str) -> None:
    measured = {"script": SCRIPT, "config": CONFIG}[name].hex()
    with judged_by(a_policy(f'  workload: {{{name}: ["sha384:{OTHER}", "sha384:{measured}"]}}\n')) as attest:
        await enrol(attest)
    with judged_by(a_policy(f'  workload: {{{name}: ["sha384:{OTHER}"]}}\n')) as attest:
        assert (await refusal(attest))[0] == [f"workload.{name}"]


async def test_a_workload_reads_no_data_but_the_listed() -> None:
    for allowed, refused in (
        (f'["sha384:{MANIFEST.hex()}", "sha384:{OTHER}"]', []),
        (f'["sha384:{OTHER}"]', ["workload.datasets"]),
        ("[]", ["workload.datasets"]),
    ):
        with judged_by(a_policy(f"  workload: {{datasets: {allowed}}}\n")) as attest:
            await attest.registry.register_job(JOB)
            await enrol(attest)  # a trainer reads none
            with contextlib.suppress(CloisterError):
                await attest.enrolment.attest(await attest.request(attest.td(Role.RANK)))
            verdict = (await attest.verdicts.newest(limit=1))[0]
            assert [check.name for check in verdict.checks if not check.ok] == refused


async def test_a_reference_set_that_is_unknown_old_silent_or_other_allows_nothing() -> None:
    policy = a_policy("  measurements: {mr_td: {set: firmware, min_version: 3}}\n")
    right = a_set(f'{{mr_td: ["{OTHER}", "{MR_TD.hex()}"]}}')
    with judged_by(policy, right) as attest:
        token = await enrol(attest)
        assert "references" in token.inputs
    for references, got in (
        ((), "no such set here"),
        ((a_set(f'{{mr_td: ["{MR_TD.hex()}"]}}', version=2),), "the set has version 2"),
        ((a_set(f'{{rtmr0: ["{MR_TD.hex()}"]}}'),), "version 3 of the set has no values of mr_td"),
        ((a_set(f'{{mr_td: ["{OTHER}"]}}'),), MR_TD.hex()),
    ):
        with judged_by(policy, *references) as attest:
            assert (await refusal(attest))[:2] == (["measurements.mr_td"], Code.APPRAISAL_FAILED)
            assert (await attest.verdicts.newest(limit=1))[0].checks[-1].got == got


async def test_a_verdict_shows_all_that_is_wrong(attest: LocalAttest) -> None:
    attest.source.change(collateral_of(attest.platform, attest.clock(), status="OutOfDate"))
    migratable_and_under_debug = (1 << 29 | 1).to_bytes(8, "little")
    guest = attest.td(Role.TRAINER, attributes=migratable_and_under_debug)
    failed, code, _ = await refusal(attest, await attest.request(guest))
    assert failed == ["td.A1", "td.A3", "td.A11", "tcb.status"]
    assert code is Code.APPRAISAL_FAILED
