# SPDX-License-Identifier: Apache-2.0
"""Evidence that an attacker would try gets no identity, and the verdict names the check that stopped it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from cloister import ear
from cloister.api.attest.v1 import attest_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.guest import TdKeys
from cloister.hpke import HpkeKeyPair
from cloister.identity import Role
from cloister.tdx.eventlog import Event, EventLog, EventLogRejected
from cloister.tdx.workload import BackendClaim, RankClaim
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import (
    ATTEST_ID,
    BACKEND,
    IMAGE,
    JOB,
    MANIFEST,
    SCRIPT,
    TRUST_DOMAIN,
    LocalAttest,
    csr,
    local_attest,
    spki,
)
from fakes.sim_collateral import collateral_of


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest() as local:
        await local.registry.register_job(JOB)
        yield local


async def refused(attest: LocalAttest, request: attest_pb2.AttestRequest, code: Code) -> str:
    """Send a request that must be refused with this code; return the name of the failed check on record."""
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request)
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert caught.value.code is code, caught.value
    assert not verdict.accepted
    assert verdict.spiffe_id == ""
    failed = [check.name for check in verdict.checks if not check.ok]
    assert caught.value.why.startswith(f"{failed[0]}: ")
    return failed[0]


async def test_the_honest_neighbour_of_all_these_requests_is_accepted(attest: LocalAttest) -> None:
    response = await attest.enrolment.attest(await attest.request(attest.td(Role.RANK)))
    assert response.spiffe_id == "spiffe://cloister.test/ns/hospital-a/job/j-1/rank/0"
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert verdict.accepted
    assert verdict.simulated
    assert all(check.ok for check in verdict.checks)


async def test_a_replayed_nonce_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    await attest.enrolment.attest(request)
    assert await refused(attest, request, Code.NONCE_UNKNOWN) == "nonce.outstanding"


async def test_a_failed_attempt_burns_its_nonce(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    good_csr = request.csr_der
    request.csr_der = b"no"
    assert await refused(attest, request, Code.CSR_INVALID) == "csr.form"
    request.csr_der = good_csr
    assert await refused(attest, request, Code.NONCE_UNKNOWN) == "nonce.outstanding"


async def test_of_many_concurrent_uses_of_a_nonce_one_succeeds(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    answers = await asyncio.gather(*(attest.enrolment.attest(request) for _ in range(16)), return_exceptions=True)
    assert sum(isinstance(answer, attest_pb2.AttestResponse) for answer in answers) == 1
    refusals = [answer for answer in answers if isinstance(answer, CloisterError)]
    assert {refusal.code for refusal in refusals} == {Code.NONCE_UNKNOWN}
    assert len(refusals) == 15


async def test_a_nonce_is_good_until_its_end_and_not_after(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    attest.clock.turn(seconds=59)
    await attest.enrolment.attest(request)
    request = await attest.request(attest.td(Role.TRAINER))
    attest.clock.turn(seconds=60)
    assert await refused(attest, request, Code.NONCE_UNKNOWN) == "nonce.unexpired"


async def test_a_clock_that_is_set_neither_ends_a_nonce_nor_brings_one_back(attest: LocalAttest) -> None:
    attest.source.change(collateral_of(attest.platform, attest.clock() - timedelta(minutes=10)))
    began = attest.clock()
    request = await attest.request(attest.td(Role.TRAINER))
    attest.clock.set_to(began + timedelta(minutes=5))
    await attest.enrolment.attest(request)
    request = await attest.request(attest.td(Role.TRAINER))
    attest.clock.turn(seconds=60)
    attest.clock.set_to(began)
    assert await refused(attest, request, Code.NONCE_UNKNOWN) == "nonce.unexpired"


@pytest.mark.parametrize("nonce", [b"", b"\x00" * 32, b"\x00" * 31])
async def test_a_nonce_of_ones_own_making_is_refused(attest: LocalAttest, nonce: bytes) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.challenge_nonce = nonce
    assert await refused(attest, request, Code.NONCE_UNKNOWN) == "nonce.outstanding"


async def test_a_nonce_for_another_role_is_refused(attest: LocalAttest) -> None:
    challenge = await attest.enrolment.challenge(attest_pb2.ChallengeRequest(role="gateway"))
    request = await attest.request(attest.td(Role.TRAINER))
    request.challenge_nonce = challenge.nonce
    assert await refused(attest, request, Code.NONCE_UNKNOWN) == "nonce.role"


async def test_evidence_over_an_older_nonce_is_refused(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    old = await attest.request(guest)
    request = await attest.request(guest)
    request.evidence.CopyFrom(old.evidence)
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "evidence.nonce"
    request = await attest.request(guest)
    request.evidence.quote = old.evidence.quote
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "report-data"


async def test_a_relying_party_nonce_that_the_quote_is_not_over_is_refused(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    request = await attest.request(guest, relying_party_nonce=b"\x01" * 32)
    request.relying_party_nonce = b"\x02" * 32
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "evidence.nonce"
    request = await attest.request(guest)
    request.relying_party_nonce = b"\x01" * 32
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "evidence.nonce"
    request = await attest.request(guest)
    request.relying_party_nonce = b"\x01" * 31
    assert await refused(attest, request, Code.ARGUMENT_INVALID) == "nonce.relying-party"


async def test_the_quote_of_one_td_with_the_keys_of_another_is_refused(attest: LocalAttest) -> None:
    victim, thief = attest.td(Role.TRAINER), attest.td(Role.TRAINER)
    request = await attest.request(victim)
    request.evidence.tls_spki_der = thief.keys.tls_spki_der
    request.csr_der = csr(thief.keys.tls)
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "report-data"


async def test_a_certificate_request_under_another_key_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.csr_der = csr(ec.generate_private_key(ec.SECP256R1()), "keybroker")
    assert await refused(attest, request, Code.CSR_INVALID) == "csr.key"


async def test_a_certificate_request_without_possession_is_refused(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    request = await attest.request(guest)
    stranger = ec.generate_private_key(ec.SECP256R1())
    request.csr_der = csr(stranger).replace(spki(stranger), guest.keys.tls_spki_der)
    assert await refused(attest, request, Code.CSR_INVALID) == "csr.signature"


async def test_another_kind_of_key_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.csr_der = csr(ec.generate_private_key(ec.SECP384R1()))
    assert await refused(attest, request, Code.CSR_INVALID) == "csr.algorithm"


async def test_a_swapped_hpke_key_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.hpke_public_key = HpkeKeyPair.generate().public_bytes
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "report-data"


async def test_a_swapped_or_added_receipt_key_is_refused(attest: LocalAttest) -> None:
    for role in (Role.KEYBROKER, Role.TRAINER):
        request = await attest.request(attest.td(role))
        request.evidence.receipt_spki_der = TdKeys.generate().receipt_spki_der
        assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "report-data"


async def test_evidence_for_somebody_else_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.audience = "spiffe://cloister.test/service/keybroker"
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "evidence.audience"
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.trust_domain = "other.test"
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "evidence.trust-domain"
    guest = attest.td(Role.TRAINER)
    request = await attest.request(guest)
    diverted = guest.evidence(nonce=request.challenge_nonce, audience="spiffe://evil", trust_domain=TRUST_DOMAIN)
    diverted.audience = ATTEST_ID
    request.evidence.CopyFrom(diverted)
    assert await refused(attest, request, Code.REPORT_DATA_MISMATCH) == "report-data"


@pytest.mark.parametrize("position", [0.1, 0.3, 0.6, 0.9])
async def test_a_flipped_bit_in_the_quote_is_refused(attest: LocalAttest, position: float) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    quote = bytearray(request.evidence.quote)
    quote[int(len(quote) * position)] ^= 1
    request.evidence.quote = bytes(quote)
    assert (await refused(attest, request, Code.QUOTE_REJECTED)).startswith("quote.")


@pytest.mark.parametrize("quote", [b"", b"\x04\x00", b"\x00" * 5000, b"\x04" * 70_000])
async def test_what_is_no_quote_is_refused(attest: LocalAttest, quote: bytes) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.quote = quote
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request)
    assert caught.value.code in {Code.QUOTE_REJECTED, Code.ARGUMENT_INVALID}


@pytest.mark.parametrize("needle", [SCRIPT.hex(), "cloister.workload.script"])
async def test_a_changed_name_or_payload_in_the_event_log_is_refused(attest: LocalAttest, needle: str) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    log = request.evidence.event_log
    request.evidence.event_log = log.replace(needle.encode(), needle[:-1].encode() + b"0", 1)
    assert request.evidence.event_log != log
    assert await refused(attest, request, Code.EVENT_LOG_MISMATCH) == "event-log.form"


async def test_the_payload_of_a_boot_event_is_a_comment_and_counts_for_nothing(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    request.evidence.event_log = request.evidence.event_log.replace(IMAGE.hex().encode(), b"00" * 48, 1)
    await attest.enrolment.attest(request)


async def test_a_flipped_bit_in_a_boot_digest_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER))
    events = json.loads(request.evidence.event_log)
    events[0]["digest"] = events[0]["digest"][:-1] + ("0" if events[0]["digest"][-1] != "0" else "1")
    request.evidence.event_log = json.dumps(events).encode()
    assert await refused(attest, request, Code.EVENT_LOG_MISMATCH) == "event-log.rtmr0"


async def test_a_removed_added_or_reordered_event_is_refused(attest: LocalAttest) -> None:
    def spoil(events: list[Any], how: str) -> list[Any]:
        match how:
            case "first removed":
                return events[1:]
            case "last removed":
                return events[:-1]
            case "one added":
                return [*events, events[-1]]
            case _:
                return [*events[:-2], events[-1], events[-2]]

    for how in ("first removed", "last removed", "one added", "swapped"):
        request = await attest.request(attest.td(Role.TRAINER))
        events = spoil(json.loads(request.evidence.event_log), how)
        request.evidence.event_log = json.dumps(events).encode()
        assert (await refused(attest, request, Code.EVENT_LOG_MISMATCH)).startswith("event-log.rtmr"), how


async def test_an_event_after_sealing_other_than_a_key_is_refused(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    event = Event.runtime("cloister.workload.script", b"\x66" * 48)
    guest._provider.extend(3, event.digest)
    guest._log = guest._log.appended(event)
    assert await refused(attest, await attest.request(guest), Code.EVENT_LOG_MISMATCH) == "event-log.workload"


async def test_a_key_event_after_sealing_is_welcome(attest: LocalAttest) -> None:
    guest = attest.td(Role.RANK)
    guest.record_key("cloister-key://hospital-a/datasets/reviews", 1, b"\x07" * 48)
    await attest.enrolment.attest(await attest.request(guest))


async def test_a_role_other_than_the_sealed_one_is_refused(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    guest._role = Role.GATEWAY
    assert await refused(attest, await attest.request(guest), Code.EVENT_LOG_MISMATCH) == "event-log.role"


@pytest.mark.parametrize("role", ["user", "root", "", "Trainer"])
async def test_roles_without_a_td_draw_no_nonce(attest: LocalAttest, role: str) -> None:
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.challenge(attest_pb2.ChallengeRequest(role=role))
    assert caught.value.code is Code.ARGUMENT_INVALID


async def test_a_debug_profiling_or_migratable_td_is_refused(attest: LocalAttest) -> None:
    ve_disabled = 1 << 28
    for attributes, check in (
        (ve_disabled | 1, "td.A1"),
        (ve_disabled | 1 << 4, "td.A2"),
        (0, "td.A3"),
        (ve_disabled | 1 << 29, "td.A11"),
    ):
        guest = attest.td(Role.TRAINER, attributes=attributes.to_bytes(8, "little"))
        assert await refused(attest, await attest.request(guest), Code.APPRAISAL_FAILED) == check


async def test_a_quote_under_another_root_is_refused(attest: LocalAttest, tmp_path: Any) -> None:
    stranger = SimulatedPlatform.create(tmp_path / "stranger")
    request = await attest.request(attest.td(Role.TRAINER, platform=stranger))
    assert (await refused(attest, request, Code.QUOTE_REJECTED)).startswith("quote.P")


async def test_a_td_that_trusts_another_authority_is_refused(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.TRAINER, bundle=b"\x01" * 48))
    assert await refused(attest, request, Code.APPRAISAL_FAILED) == "workload.trust-bundle"


@pytest.mark.parametrize("role", [role for role in Role if role.is_service])
async def test_other_code_does_not_become_a_service(attest: LocalAttest, role: Role) -> None:
    request = await attest.request(attest.td(role, script=b"\x66" * 48))
    assert await refused(attest, request, Code.WORKLOAD_NOT_REGISTERED) == "service.script"


@pytest.mark.parametrize(
    ("claim", "check"),
    [
        (RankClaim("hospital-a", "j-2", 0, 2), "job.registered"),
        (RankClaim("hospital-b", "j-1", 0, 2), "job.registered"),
        (RankClaim("hospital-a", "j-1", 0, 3), "job.world-size"),
        (RankClaim("hospital-a", "j-1", 2, 3), "job.world-size"),
        (RankClaim("hospital-a", "j-1", 0, 1), "job.world-size"),
    ],
)
async def test_a_rank_that_no_job_has_is_refused(attest: LocalAttest, claim: RankClaim, check: str) -> None:
    request = await attest.request(attest.td(Role.RANK, rank=claim))
    assert await refused(attest, request, Code.WORKLOAD_NOT_REGISTERED) == check


async def test_a_rank_with_another_script_or_configuration_is_refused(attest: LocalAttest) -> None:
    for changes, check in (({"script": b"\x66" * 48}, "job.script"), ({"config": b"\x66" * 48}, "job.config")):
        request = await attest.request(attest.td(Role.RANK, **changes))
        assert await refused(attest, request, Code.WORKLOAD_NOT_REGISTERED) == check


async def test_a_closed_job_enrols_nobody_not_even_its_own_ranks_again(attest: LocalAttest) -> None:
    guest = attest.td(Role.RANK)
    await attest.enrolment.attest(await attest.request(guest))
    await attest.registry.close_job(JOB.job_id)
    assert await refused(attest, await attest.request(guest), Code.WORKLOAD_NOT_REGISTERED) == "job.open"


async def test_a_backend_enrols_only_as_registered(attest: LocalAttest) -> None:
    request = await attest.request(attest.td(Role.BACKEND))
    assert await refused(attest, request, Code.WORKLOAD_NOT_REGISTERED) == "backend.registered"
    await attest.registry.register_backend(BACKEND)
    response = await attest.enrolment.attest(await attest.request(attest.td(Role.BACKEND)))
    assert response.spiffe_id == "spiffe://cloister.test/ns/hospital-a/model/reviews/backend/b-0"
    for changes, check in (
        ({"script": b"\x66" * 48}, "backend.script"),
        ({"config": b"\x66" * 48}, "backend.config"),
        ({"backend": BackendClaim("hospital-a", "reviews", "b-1")}, "backend.registered"),
        ({"backend": BackendClaim("hospital-b", "reviews", "b-0")}, "backend.registered"),
    ):
        request = await attest.request(attest.td(Role.BACKEND, **changes))
        assert await refused(attest, request, Code.WORKLOAD_NOT_REGISTERED) == check
    await attest.registry.close_backend(BACKEND.tenant, BACKEND.model, BACKEND.backend)
    request = await attest.request(attest.td(Role.BACKEND))
    assert await refused(attest, request, Code.WORKLOAD_NOT_REGISTERED) == "backend.open"


async def test_the_identity_comes_from_the_registry_never_from_the_request(attest: LocalAttest) -> None:
    guest = attest.td(Role.RANK)
    request = await attest.request(guest)
    request.csr_der = csr(guest.keys.tls, "spiffe://cloister.test/service/keybroker")
    response = await attest.enrolment.attest(request)
    assert response.spiffe_id == "spiffe://cloister.test/ns/hospital-a/job/j-1/rank/0"
    result = ear.verify(
        response.attestation_result,
        keys=attest.bundle.token_keys,
        issuer=ATTEST_ID,
        audience=f"spiffe://{TRUST_DOMAIN}",
        now=attest.clock(),
    )
    assert result.spiffe_id == response.spiffe_id
    assert result.workload.datasets == (MANIFEST,)
    assert (result.workload.rank, result.workload.world_size) == (0, 2)


async def test_refusals_do_not_push_accepted_verdicts_out() -> None:
    with local_attest(kept_verdicts=3) as attest:
        await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER)))
        for _ in range(5):
            with pytest.raises(CloisterError):
                await attest.enrolment.attest(attest_pb2.AttestRequest())
        found = await attest.verdicts.newest(limit=100)
        assert [verdict.accepted for verdict in found] == [False, False, False, True]


@pytest.mark.parametrize(
    "field", ["quote", "event_log", "tls_spki_der", "hpke_public_key", "receipt_spki_der", "nonce"]
)
async def test_arbitrary_bytes_end_in_a_refusal_that_names_a_check(attest: LocalAttest, field: str) -> None:
    generator = numbers_from(field)
    for _ in range(40):
        request = await attest.request(attest.td(Role.KEYBROKER))
        honest = getattr(request.evidence, field)
        spoilt = bytearray(honest)
        match next(generator) % 4:
            case 0:
                spoilt[next(generator) % len(spoilt)] ^= 1 << (next(generator) % 8)
            case 1:
                del spoilt[next(generator) % len(spoilt) :]
            case 2:
                spoilt += bytes([next(generator) % 256])
            case _:
                at = next(generator) % len(spoilt)
                spoilt[at : at + 4] = b"\xff\xff\xff\xff"
        if bytes(spoilt) == honest or (field == "event_log" and same_log(honest, bytes(spoilt))):
            continue
        setattr(request.evidence, field, bytes(spoilt))
        with pytest.raises(CloisterError) as caught:
            await attest.enrolment.attest(request)
        assert caught.value.code is not Code.INTERNAL


def numbers_from(seed: str) -> Iterator[int]:
    """Yield the same large numbers for the same seed."""
    state = seed.encode()
    while True:
        state = hashlib.sha256(state).digest()
        yield int.from_bytes(state[:4], "big")


def same_log(honest: bytes, spoilt: bytes) -> bool:
    """Say whether a changed log still says the same (a boot event's payload and type are comments)."""
    try:
        return EventLog.parse(honest).replay() == EventLog.parse(spoilt).replay()
    except EventLogRejected:
        return False
