# SPDX-License-Identifier: Apache-2.0
"""What a TD trusts is part of what it is: attest issues to nobody who trusts an ended epoch, or somebody else."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from cloister.api.attest.v1 import attest_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.guest import Guest
from cloister.guest.verdictbundle import RecordedEvidence
from cloister.identity import Role
from cloister.protocol import RECOVERY_AUDIENCE
from cloister.runtime.credentials import Revoked
from cloister.runtime.pem import read_leaf
from cloister.runtime.trust import Trust, sign_update
from cloister_attest.authority import Authority, bundle_of
from cloister_attest.denylist import Denial, DenialKind
from cloister_attest.epochs import CALLS_OUTLIVE, Schedule
from fakes.attest_harness import TRUST_DOMAIN, LocalAttest, csr, local_attest

PLAN = Schedule(lead=timedelta(minutes=3), overlap=timedelta(hours=2))
EVIL = bundle_of([Authority.create(now=datetime.now(UTC))], trust_domain=TRUST_DOMAIN, sequence=2**40)


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest(schedule=PLAN) as local:
        yield local


async def enrol(attest: LocalAttest, guest: Guest) -> bytes:
    response = await attest.enrolment.attest(await attest.request(guest))
    return response.certificate_chain_pem


async def refused(attest: LocalAttest, guest: Guest) -> tuple[Code, str]:
    with pytest.raises(CloisterError) as caught:
        await enrol(attest, guest)
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert not verdict.accepted
    return caught.value.code, verdict.checks[-1].name


async def change(attest: LocalAttest) -> bytes:
    """Take the CA through a whole planned change; return the digest of the bundle before."""
    before = attest.bundle.digest
    await attest.ca.start()
    attest.clock.turn(minutes=3)
    await attest.ca.advance()
    attest.clock.turn(hours=2)
    await attest.ca.advance()
    return before


async def test_a_td_that_runs_is_led_over_and_one_that_starts_with_the_ended_epoch_is_not_let_in(
    attest: LocalAttest,
) -> None:
    running, late = attest.td(Role.TRAINER), attest.td(Role.TRAINER)
    identity = await attest.enrol(running)
    before = await change(attest)
    await identity.refresh()
    assert identity.bundle.digest == attest.bundle.digest != before
    # Held and measured differ now, and the evidence says both.
    evidence = running.evidence(nonce=bytes(32), audience="x", trust_domain=TRUST_DOMAIN)
    assert evidence.trust_bundle == attest.bundle.digest
    # The other one measured the same, and trusts it still: whoever has the old keys could tell it anything.
    assert await refused(attest, late) == (Code.BUNDLE_STALE, "workload.trust-bundle")


async def test_after_a_retirement_nobody_is_let_in_who_trusts_the_retired_epoch(attest: LocalAttest) -> None:
    await attest.ca.start()
    both, old = attest.bundle.digest, attest.ca.issuing.epoch
    holds_both = attest.td(Role.TRAINER)
    await enrol(attest, holds_both)
    await attest.ca.retire(old)
    assert await refused(attest, holds_both) == (Code.BUNDLE_STALE, "workload.trust-bundle")
    assert both in attest.ca.told.known
    holds_both.hold_trust(attest.bundle.digest)
    await enrol(attest, holds_both)


async def test_a_td_that_was_told_to_trust_somebody_else_as_well_is_turned_away(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    guest.hold_trust(EVIL.digest)
    assert await refused(attest, guest) == (Code.APPRAISAL_FAILED, "workload.trust-bundle")


async def test_a_td_that_began_with_a_foreign_bundle_is_turned_away_whatever_it_holds_now(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER, bundle=EVIL.digest)
    assert await refused(attest, guest) == (Code.APPRAISAL_FAILED, "workload.trust-bundle")
    guest.hold_trust(attest.bundle.digest)
    assert await refused(attest, guest) == (Code.APPRAISAL_FAILED, "workload.measured-bundle")


async def test_what_a_td_holds_cannot_be_changed_on_the_way(attest: LocalAttest) -> None:
    before = await change(attest)
    guest = attest.td(Role.TRAINER, bundle=before)
    for held in (attest.bundle.digest, b"\x01" * 48):
        request = await attest.request(guest)
        request.evidence.trust_bundle = held
        with pytest.raises(CloisterError) as caught:
            await attest.enrolment.attest(request)
        assert caught.value.code is Code.REPORT_DATA_MISMATCH
    guest.hold_trust(attest.bundle.digest)
    request = await attest.request(guest)
    request.evidence.ClearField("trust_bundle")
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request)
    assert caught.value.code is Code.REPORT_DATA_MISMATCH
    request = await attest.request(guest)
    request.evidence.trust_bundle = b"\x01" * 47
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request)
    assert caught.value.code is Code.ARGUMENT_INVALID


async def test_a_recorded_verdict_holds_what_the_td_held(attest: LocalAttest) -> None:
    guest = attest.td(Role.TRAINER)
    guest.hold_trust(EVIL.digest)
    evidence = guest.evidence(nonce=bytes(32), audience="x", trust_domain=TRUST_DOMAIN)
    assert RecordedEvidence.of(evidence).evidence() == evidence
    assert evidence.trust_bundle == EVIL.digest


async def test_evidence_made_for_a_holder_of_shares_is_evidence_for_nobody_else(attest: LocalAttest) -> None:
    guest = attest.td(Role.ATTEST)
    request = await attest.request(guest)
    shown = guest.evidence(nonce=request.challenge_nonce, audience=RECOVERY_AUDIENCE, trust_domain=TRUST_DOMAIN)
    request.evidence.CopyFrom(shown)
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request)
    assert caught.value.code is Code.REPORT_DATA_MISMATCH


async def test_a_forged_successor_leaves_a_td_as_it_was(attest: LocalAttest) -> None:
    identity = await attest.enrol(attest.td(Role.TRAINER))
    stolen = attest.ca.issuing.root
    held = identity.trust
    evil = Authority.create(now=attest.clock())
    for forged in (
        sign_update(Trust(EVIL, 2**41), [evil.root]),
        sign_update(Trust(replace(attest.bundle, sequence=1), 2**41), []),
        b"",
        b"{}",
    ):
        with pytest.raises(CloisterError) as caught:
            identity.learn(forged)
        assert caught.value.code is Code.BUNDLE_INVALID
    assert identity.trust == held
    # With the keys of an epoch that it still trusts, there is no telling: this is what retiring is for. Attest notices.
    identity.learn(sign_update(Trust(EVIL, 2**41), [stolen]))
    with pytest.raises(CloisterError) as caught:
        await identity.refresh()
    assert caught.value.code is Code.APPRAISAL_FAILED
    # One that has learnt of the retirement does not listen to the stolen keys.
    other = await attest.enrol(attest.td(Role.TRAINER))
    await attest.ca.retire(attest.ca.issuing.epoch)
    await other.refresh()
    with pytest.raises(CloisterError) as caught:
        other.learn(sign_update(Trust(EVIL, 2**42), [stolen]))
    assert caught.value.code is Code.BUNDLE_INVALID


async def test_a_certificate_that_is_made_while_it_is_denied_is_not_given_out(attest: LocalAttest) -> None:
    """A denial that comes between the check and the register: one of the two sees the other."""
    guest = attest.td(Role.TRAINER)
    who = f"spiffe://{TRUST_DOMAIN}/service/trainer"
    remember = attest.issued.add

    async def deny_then_remember(*args: object, **named: object) -> None:
        await attest.denials.add(Denial(DenialKind.IDENTITY, who, "", "olga", attest.clock()))
        await remember(*args, **named)  # type: ignore[arg-type]

    attest.issued.add = deny_then_remember  # type: ignore[method-assign]
    assert await refused(attest, guest) == (Code.DENY_LISTED, "still-not-denied")


async def test_what_is_told_of_revoked_certificates_is_no_more_than_their_digests(attest: LocalAttest) -> None:
    chain = await enrol(attest, attest.td(Role.TRAINER))
    who = f"spiffe://{TRUST_DOMAIN}/service/trainer"
    await attest.denials.add(Denial(DenialKind.IDENTITY, who, "", "olga", attest.clock()))
    assert await attest.revocation.tell() == (1, True)
    told = attest.ca.told
    assert told.trust.revoked == Revoked(frozenset({hashlib.sha256(read_leaf(chain).der).digest()}))
    for name in (b"trainer\\", b"service/trainer", b"olga"):
        assert name not in told.update


async def test_a_revoked_certificate_is_told_until_no_call_it_let_in_can_run_and_forgotten_then(
    attest: LocalAttest,
) -> None:
    await enrol(attest, attest.td(Role.TRAINER))
    who = f"spiffe://{TRUST_DOMAIN}/service/trainer"
    await attest.denials.add(Denial(DenialKind.IDENTITY, who, "", "olga", attest.clock()))
    assert await attest.revocation.tell() == (1, True)
    attest.clock.turn(hours=2)  # it has run out; a stream of its may not have
    await attest.revocation.tell()
    assert attest.ca.told.trust.revoked.certificates
    attest.clock.turn(seconds=CALLS_OUTLIVE.total_seconds())
    await attest.revocation.tell()
    assert not attest.ca.told.trust.revoked.certificates


async def test_a_user_of_an_ended_epoch_gets_a_certificate_of_the_next(attest: LocalAttest) -> None:
    request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key))
    before = await attest.enrolment.issue_user(request)
    await change(attest)
    after = await attest.enrolment.issue_user(request)
    issuers = [read_leaf(chain.certificate_chain_pem).issuer_key_id for chain in (before, after)]
    assert issuers[0] != issuers[1]
    assert after.trust_bundle == attest.bundle.to_bytes()
