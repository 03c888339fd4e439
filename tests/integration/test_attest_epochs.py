# SPDX-License-Identifier: Apache-2.0
"""CA epochs with a running attest and running services: they change under load, end at once, and nobody restarts."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from cloister.api.attest.v1 import attest_pb2
from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.guest.owner import verify_service_evidence
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.server import GrpcServer
from fakes.attest_harness import SCRIPT, AttestProcess, attest_process, measure

LOOK_S = 0.3
OPERATOR = "OperatorService"


@contextlib.asynccontextmanager
async def serving(attest: AttestProcess) -> AsyncIterator[tuple[Identity, str]]:
    """A key broker in this process that keeps its identity, and where it listens."""
    broker = await attest.service(Role.KEYBROKER)
    broker.start_renewal(look_s=LOOK_S)
    server = GrpcServer(
        section="127.0.0.1:0", credentials=broker, services=[mounted_evidence(broker)], callers=EVIDENCE_CALLERS
    )
    await server.start()
    try:
        yield broker, server.endpoint
    finally:
        await server.drain(0)
        await broker.aclose()


async def ask(stub: evidence_pb2_grpc.EvidenceServiceStub, who: Identity) -> None:
    request = evidence_pb2.GetEvidenceRequest(nonce=secrets.token_bytes(32), audience=str(who.spiffe_id))
    response = await invoke(stub.GetEvidence, request, timeout_s=5, what="get evidence")
    assert response.evidence.nonce == request.nonce


async def until(condition: object, seconds: float = 30.0) -> None:
    end = asyncio.get_running_loop().time() + seconds
    while not condition():  # type: ignore[operator]
        assert asyncio.get_running_loop().time() < end, "it did not happen"
        await asyncio.sleep(0.02)


async def epochs(attest: AttestProcess) -> attest_pb2.ListEpochsResponse:
    response: attest_pb2.ListEpochsResponse = await attest.call(OPERATOR, "ListEpochs", attest_pb2.ListEpochsRequest())
    return response


async def start_epoch(attest: AttestProcess) -> str:
    response = await attest.call(OPERATOR, "StartEpoch", attest_pb2.StartEpochRequest())
    return str(response.epoch.epoch)


async def test_a_new_epoch_takes_over_under_load_and_no_call_is_dropped() -> None:
    # Announced for two seconds, then beside the old one for five; certificates live for four, and renew at two.
    async with attest_process(svid_ttl_s=4, ca="lead_s = 2\noverlap_s = 5") as attest, serving(attest) as (broker, at):
        trainer = await attest.service(Role.TRAINER)
        trainer.start_renewal(look_s=LOOK_S)
        old, measured = broker.bundle.epoch, broker.bundle.digest
        calls, failures, enough = 0, [], asyncio.Event()

        async def work(stub: evidence_pb2_grpc.EvidenceServiceStub) -> None:
            nonlocal calls
            while not enough.is_set():
                try:
                    await ask(stub, trainer)
                except CloisterError as error:
                    failures.append(str(error))
                calls += 1

        async with open_channel(at, role=Role.KEYBROKER, credentials=trainer) as channel:
            stub = evidence_pb2_grpc.EvidenceServiceStub(channel)
            workers = [asyncio.create_task(work(stub)) for _ in range(4)]
            new = await start_epoch(attest)
            states = [(found.epoch, found.state) for found in (await epochs(attest)).epochs]
            assert states == [(new, attest_pb2.EPOCH_STATE_ANNOUNCED), (old, attest_pb2.EPOCH_STATE_ISSUING)]
            # Until the old one is gone everywhere, and everybody has a certificate of the new one.
            await until(lambda: all(one.bundle.root_pem.count(b"BEGIN") == 1 for one in (broker, trainer))
                        and broker.bundle.epoch == new and broker.bundle.digest != measured)  # fmt: skip
            assert broker.current().is_trusted
            assert trainer.current().is_trusted
            before = calls
            await until(lambda: calls > before + 20)
            enough.set()
            await asyncio.gather(*workers)
        assert failures == []
        assert calls > 100
        # What the broker measured is of the past. What it holds is in its evidence, and an owner sees that.
        verified = await verify_service_evidence(
            at,
            role=Role.KEYBROKER,
            credentials=await attest.user(),
            verifier=attest.verifier,
            expected_scripts=[SCRIPT],
            now=datetime.now(UTC),
        )
        assert verified.evidence.workload.trust_bundle == measured
        assert verified.evidence.trust_bundle == attest.bundle.digest != measured
        await trainer.aclose()


async def test_a_retired_epoch_ends_at_once_and_services_come_back_by_themselves() -> None:
    async with attest_process() as attest, serving(attest) as (broker, at):
        trainer = await attest.service(Role.TRAINER)
        left_behind = await attest.service(Role.GATEWAY)  # does not follow
        trainer.start_renewal(look_s=LOOK_S)
        (old,) = (await epochs(attest)).epochs
        issuing = await attest.retire_epoch(old.epoch)
        assert issuing != old.epoch
        for identity in (broker, trainer):
            await until(lambda identity=identity: identity.bundle.epoch == issuing)
            await until(lambda identity=identity: identity.current().is_trusted)
        async with open_channel(at, role=Role.KEYBROKER, credentials=trainer) as channel:
            await ask(evidence_pb2_grpc.EvidenceServiceStub(channel), trainer)
        # Whoever shows a certificate of the retired epoch is nobody, for services and for attest.
        async with open_channel(at, role=Role.KEYBROKER, credentials=left_behind) as channel:
            with pytest.raises(CloisterError) as caught:
                await ask(evidence_pb2_grpc.EvidenceServiceStub(channel), left_behind)
        assert caught.value.code is Code.UNREACHABLE
        # It finds the way by itself when it renews: the update is signed by the root that it holds.
        await left_behind.refresh()
        assert left_behind.bundle.epoch == issuing
        async with open_channel(at, role=Role.KEYBROKER, credentials=left_behind) as channel:
            await ask(evidence_pb2_grpc.EvidenceServiceStub(channel), left_behind)
        for identity in (trainer, left_behind):
            await identity.aclose()


async def test_a_td_started_with_the_bundle_of_before_follows_while_that_can_be_followed() -> None:
    async with attest_process(ca="lead_s = 1\noverlap_s = 3600") as attest:
        before = attest.bundle
        await start_epoch(attest)
        await until(lambda: attest.bundle.digest != before.digest)
        issuing = [one.epoch for one in (await epochs(attest)).epochs if one.state == attest_pb2.EPOCH_STATE_ISSUING]
        while issuing == [before.epoch]:
            await asyncio.sleep(0.05)
            found = (await epochs(attest)).epochs
            issuing = [one.epoch for one in found if one.state == attest_pb2.EPOCH_STATE_ISSUING]
        guest = await asyncio.to_thread(attest.launch)
        measure(guest, Role.TRAINER, bundle=before.digest)
        identity = await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=before)
        assert identity.bundle.digest == attest.bundle.digest
        await identity.aclose()


async def test_only_operators_change_epochs() -> None:
    async with attest_process() as attest:
        trainer = await attest.service(Role.TRAINER)
        for method, request in (
            ("ListEpochs", attest_pb2.ListEpochsRequest()),
            ("StartEpoch", attest_pb2.StartEpochRequest()),
            ("RetireEpoch", attest_pb2.RetireEpochRequest(epoch=attest.bundle.epoch)),
        ):
            with pytest.raises(CloisterError) as caught:
                await attest.call(OPERATOR, method, request, trainer)
            assert caught.value.code is Code.CALLER_NOT_ALLOWED
        with pytest.raises(CloisterError) as caught:
            await attest.retire_epoch("20200101T000000Z-00000000")
        assert caught.value.code is Code.EPOCH_NOT_FOUND
        assert len((await epochs(attest)).epochs) == 1
        await trainer.aclose()
