# SPDX-License-Identifier: Apache-2.0
"""A denial reaches certificates that are out already: the next call is refused, the running one ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cloister.api.attest.v1 import attest_pb2
from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import GrpcServer, Mounted
from fakes.attest_harness import JOB, RankClaim, attest_process, measure

SERVICE = "cloister.api.common.v1.EvidenceService"
CALLERS: CallerTable = {f"/{SERVICE}/GetEvidence": frozenset(Role)}
LOOK_S = 0.2


class Waiting(evidence_pb2_grpc.EvidenceServiceServicer):
    """A service whose calls with a nonce last until they are cancelled; others are answered at once."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()

    async def GetEvidence(self, request: Any, _context: Any) -> evidence_pb2.GetEvidenceResponse:
        if request.nonce:
            self.entered.set()
            await asyncio.Event().wait()
        return evidence_pb2.GetEvidenceResponse()


@contextlib.asynccontextmanager
async def service(broker: Identity) -> AsyncIterator[tuple[Waiting, str]]:
    servicer = Waiting()
    add = evidence_pb2_grpc.add_EvidenceServiceServicer_to_server
    server = GrpcServer(
        section="127.0.0.1:0", credentials=broker, services=[Mounted(SERVICE, add, servicer)], callers=CALLERS
    )
    await server.start()
    try:
        yield servicer, server.endpoint
    finally:
        await server.drain(0)


async def ask(endpoint: str, who: Identity, nonce: bytes = b"") -> None:
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=who) as channel:
        method = evidence_pb2_grpc.EvidenceServiceStub(channel).GetEvidence
        await invoke(method, evidence_pb2.GetEvidenceRequest(nonce=nonce), timeout_s=30, what="ask")


async def test_a_denied_rank_is_refused_in_the_middle_of_its_certificates_life_and_of_its_call() -> None:
    async with attest_process() as attest:
        broker, trainer = await attest.service(Role.KEYBROKER), await attest.service(Role.TRAINER)
        broker.start_renewal(look_s=LOOK_S)
        job = attest_pb2.RegisterJobRequest(
            job_id=JOB.job_id, tenant=JOB.tenant, world_size=2, script_digest=JOB.script, config_digest=JOB.config
        )
        await attest.call("RegistryService", "RegisterJob", job, trainer)
        ranks = []
        for number in (0, 1):
            guest = await asyncio.to_thread(attest.launch)
            claim = RankClaim(JOB.tenant, JOB.job_id, number, 2)
            measure(guest, Role.RANK, bundle=attest.bundle.digest, rank=claim)
            ranks.append(
                await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=attest.bundle)
            )
        bad, good = ranks
        await bad.refresh()  # a second certificate of the same identity
        async with service(broker) as (servicer, endpoint):
            await ask(endpoint, bad)
            running = asyncio.create_task(ask(endpoint, bad, b"long"))
            await servicer.entered.wait()

            deny = attest_pb2.DenyRequest(kind=attest_pb2.DENIAL_KIND_IDENTITY, value=str(bad.spiffe_id))
            answer = await attest.call("IdentityService", "Deny", deny)
            assert (answer.certificates, answer.complete) == (2, True)

            with pytest.raises(CloisterError) as caught:
                await asyncio.wait_for(running, 10)
            assert caught.value.code is Code.DENY_LISTED
            with pytest.raises(CloisterError) as caught:
                await ask(endpoint, bad)
            assert caught.value.code is Code.DENY_LISTED
            await ask(endpoint, good)
            # Attest itself has heard it first.
            with pytest.raises(CloisterError) as caught:
                await bad.refresh()
            assert caught.value.code is Code.DENY_LISTED

            readmit = attest_pb2.ReadmitRequest(kind=attest_pb2.DENIAL_KIND_IDENTITY, value=str(bad.spiffe_id))
            assert (await attest.call("IdentityService", "Readmit", readmit)).was_denied
            before = broker.trust.sequence
            while broker.trust.sequence == before:
                await asyncio.sleep(0.02)
            await ask(endpoint, bad)
        for identity in (broker, trainer, *ranks):
            await identity.aclose()


async def test_a_denied_measurement_ends_the_certificates_of_all_that_run_it() -> None:
    async with attest_process() as attest:
        broker = await attest.service(Role.KEYBROKER)
        broker.start_renewal(look_s=LOOK_S)
        config = b"\x33" * 48
        guest = await asyncio.to_thread(attest.launch)
        measure(guest, Role.TRAINER, bundle=attest.bundle.digest, config=config)
        trainer = await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=attest.bundle)
        gateway = await attest.service(Role.GATEWAY)
        async with service(broker) as (_, endpoint):
            await ask(endpoint, trainer)
            deny = attest_pb2.DenyRequest(kind=attest_pb2.DENIAL_KIND_MEASUREMENT, value=config.hex())
            assert (await attest.call("IdentityService", "Deny", deny)).certificates == 1
            while not broker.trust.revoked.certificates:
                await asyncio.sleep(0.02)
            with pytest.raises(CloisterError) as caught:
                await ask(endpoint, trainer)
            assert caught.value.code is Code.DENY_LISTED
            await ask(endpoint, gateway)
        for identity in (broker, trainer, gateway):
            await identity.aclose()
