# SPDX-License-Identifier: Apache-2.0
"""Many at the open port at once: nobody waits for another's verification, and who is turned away comes again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.remote import RemoteEnrolment
from cloister.identity import Role
from cloister.runtime.server import GrpcServer, Mounted
from cloister.tdx.collateral import Collateral
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import Verdict
from cloister_attest.ratelimit import RateLimit
from cloister_attest.service import ENROLMENT_CALLERS, MAX_HELD, EnrolmentServicer
from fakes.attest_harness import LocalAttest, local_attest

_CHALLENGE = attest_pb2.ChallengeRequest(role="trainer")


class SlowVerifier(Verifier):
    """Takes as long over a quote as a test wants."""

    def __init__(self, root: TrustRoot) -> None:
        super().__init__([root])
        self.begun, self.go_on = threading.Event(), threading.Event()

    def verify(self, data: bytes, collateral: Collateral, *, now: datetime) -> Verdict:
        self.begun.set()
        assert self.go_on.wait(30)
        return super().verify(data, collateral, now=now)


@pytest.fixture
def slow_attest() -> Iterator[tuple[LocalAttest, SlowVerifier]]:
    made: list[SlowVerifier] = []

    def quotes(root: TrustRoot) -> Verifier:
        made.append(SlowVerifier(root))
        return made[0]

    with local_attest(quotes=quotes) as attest:
        try:
            yield attest, made[0]
        finally:
            made[0].go_on.set()


async def test_a_slow_verification_delays_no_challenge(slow_attest: tuple[LocalAttest, SlowVerifier]) -> None:
    attest, verifier = slow_attest
    attempt = asyncio.create_task(attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER))))
    assert await asyncio.to_thread(verifier.begun.wait, 30)
    challenge = await attest.enrolment.challenge(_CHALLENGE)
    assert challenge.nonce
    assert not attempt.done()
    verifier.go_on.set()
    assert (await attempt).certificate_chain_pem


async def test_a_nonce_is_spent_before_its_verification_ends(slow_attest: tuple[LocalAttest, SlowVerifier]) -> None:
    attest, verifier = slow_attest
    request = await attest.request(attest.td(Role.TRAINER))
    attempt = asyncio.create_task(attest.enrolment.attest(request))
    assert await asyncio.to_thread(verifier.begun.wait, 30)
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(request)
    assert caught.value.code is Code.NONCE_UNKNOWN
    verifier.go_on.set()
    assert (await attempt).certificate_chain_pem


async def test_refusals_are_held_back_but_never_more_than_fit() -> None:
    held = asyncio.Semaphore(0)
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await held.acquire()

    with local_attest() as attest:
        limit = RateLimit(per_s=1, burst=1, clock_s=lambda: 0.0)
        servicer = EnrolmentServicer(attest.enrolment, limit, address_of=lambda peer: peer, pause=pause)
        context = SimpleNamespace(peer=lambda: "10.0.0.1")
        await servicer.Challenge(_CHALLENGE, context)  # its burst
        calls = [asyncio.create_task(servicer.Challenge(_CHALLENGE, context)) for _ in range(MAX_HELD + 2)]
        with pytest.raises(CloisterError) as caught:  # the last finds no place, and is refused at once
            await calls[-1]
        assert caught.value.code is Code.RATE_LIMITED
        assert not any(call.done() for call in calls[:-1])
        assert pauses == [1.0] * (MAX_HELD + 1)
        # Another address does not wait for any of them.
        assert await servicer.Challenge(_CHALLENGE, SimpleNamespace(peer=lambda: "10.0.0.2"))
        for _ in calls:
            held.release()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(outcomes[0], attest_pb2.ChallengeResponse)  # waited for its turn
        assert all(isinstance(outcome, CloisterError) for outcome in outcomes[1:])


class Busy(attest_pb2_grpc.EnrolmentServiceServicer):
    """Attest that turns the first calls away."""

    def __init__(self, attest: LocalAttest, errors: list[CloisterError]) -> None:
        self._attest, self._errors = attest, errors
        self.calls: list[str] = []

    async def Challenge(self, request: attest_pb2.ChallengeRequest, context: Any) -> attest_pb2.ChallengeResponse:
        self._answer("Challenge")
        return await self._attest.enrolment.challenge(request)

    async def Attest(self, request: attest_pb2.AttestRequest, context: Any) -> attest_pb2.AttestResponse:
        self._answer("Attest")
        return await self._attest.enrolment.attest(request)

    async def IssueUserCertificate(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetTrustBundle(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    async def GetTrustUpdate(self, request: Any, context: Any) -> Any:
        raise NotImplementedError

    def _answer(self, name: str) -> None:
        self.calls.append(name)
        if self._errors:
            raise self._errors.pop(0)


@asynccontextmanager
async def busy(attest: LocalAttest, *errors: CloisterError) -> AsyncIterator[tuple[Busy, str]]:
    servicer = Busy(attest, list(errors))
    add = attest_pb2_grpc.add_EnrolmentServiceServicer_to_server
    server = GrpcServer(
        section="127.0.0.1:0",
        credentials=await attest.enrol(attest.td(Role.ATTEST)),
        services=[Mounted("cloister.api.attest.v1.EnrolmentService", add, servicer)],
        callers=ENROLMENT_CALLERS,
        anonymous=True,
    )
    await server.start()
    try:
        yield servicer, server.endpoint
    finally:
        await server.drain(0)


def _busy() -> CloisterError:
    return CloisterError(Code.RATE_LIMITED, what="too many calls from this address")


async def test_a_td_that_is_turned_away_comes_again_and_gets_its_identity() -> None:
    with local_attest() as attest:
        async with busy(attest, _busy(), _busy()) as (servicer, endpoint):
            transport = RemoteEnrolment(endpoint, attest.bundle, first_wait_s=0.01)
            identity = await Identity.enrol_through(transport, attest.td(Role.TRAINER), bundle=attest.bundle)
            assert identity.spiffe_id.role is Role.TRAINER
            assert servicer.calls == ["Challenge", "Challenge", "Challenge", "Attest"]


async def test_a_td_gives_up_on_an_attest_that_stays_busy() -> None:
    with local_attest() as attest:
        async with busy(attest, *(_busy() for _ in range(1000))) as (servicer, endpoint):
            transport = RemoteEnrolment(endpoint, attest.bundle, busy_for_s=0.1, first_wait_s=0.01)
            with pytest.raises(CloisterError) as caught:
                await transport.challenge(_CHALLENGE)
            assert caught.value.code is Code.RATE_LIMITED
            assert 2 <= len(servicer.calls) <= 20


@pytest.mark.parametrize("code", [Code.APPRAISAL_FAILED, Code.MESSAGE_TOO_LARGE, Code.INTERNAL])
async def test_any_other_refusal_is_taken_at_its_word(code: Code) -> None:
    with local_attest() as attest:
        async with busy(attest, CloisterError(code, what="no")) as (servicer, endpoint):
            with pytest.raises(CloisterError) as caught:
                await RemoteEnrolment(endpoint, attest.bundle, first_wait_s=0.01).challenge(_CHALLENGE)
            assert caught.value.code is code
            assert servicer.calls == ["Challenge"]
