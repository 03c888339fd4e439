# SPDX-License-Identifier: Apache-2.0
"""Certificates that live for seconds: renewal under load, loss of attest, restart of attest."""

from __future__ import annotations

import asyncio
import re
import secrets
import socket

import pytest

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.server import GrpcServer
from fakes.attest_harness import CONFIG, JOB, SCRIPT, AttestProcess, attest_process, measure


async def test_renewal_under_a_running_server_drops_no_call() -> None:
    async with attest_process(svid_ttl_s=2) as attest:
        broker, trainer = await attest.service(Role.KEYBROKER), await attest.service(Role.TRAINER)
        broker.start_renewal()
        trainer.start_renewal()
        server = GrpcServer(
            section="127.0.0.1:0", credentials=broker, services=[mounted_evidence(broker)], callers=EVIDENCE_CALLERS
        )
        await server.start()
        first = (broker.current().not_after, trainer.current().not_after)
        calls = 0
        async with open_channel(server.endpoint, role=Role.KEYBROKER, credentials=trainer) as channel:
            stub = evidence_pb2_grpc.EvidenceServiceStub(channel)
            # Until both have outlived their first certificate and renewed at least twice.
            while min(a.current().not_after - b for a, b in zip((broker, trainer), first, strict=True)).seconds < 3:
                nonce = secrets.token_bytes(32)
                request = evidence_pb2.GetEvidenceRequest(nonce=nonce, audience=str(trainer.spiffe_id))
                response = await invoke(stub.GetEvidence, request, timeout_s=5, what="get evidence")
                assert response.evidence.nonce == nonce
                calls += 1
        assert calls > 20
        await server.drain(1)
        await broker.aclose()
        await trainer.aclose()


async def test_without_attest_an_identity_expires_with_a_clear_error() -> None:
    async with attest_process(svid_ttl_s=2) as attest:
        identity = await attest.service(Role.TRAINER)
        identity.start_renewal(jitter=lambda: 0.0)
        await attest.stop(kill=True)
        with pytest.raises(CloisterError) as caught:
            await identity.refresh()
        assert caught.value.code is Code.UNREACHABLE
        with pytest.raises(CloisterError) as caught:
            await _until_expired(identity)
        assert caught.value.code is Code.CERTIFICATE_EXPIRED
        assert "nothing listens" in caught.value.why or "reached" in caught.value.why
        await identity.aclose()


async def test_fresh_evidence_for_a_relying_party_brings_a_certificate_of_its_own() -> None:
    async with attest_process() as attest:
        identity = await attest.service(Role.TRAINER)
        changes: list[None] = []
        identity.on_change(lambda: changes.append(None))
        before = await identity.attested()
        nonce = secrets.token_bytes(32)
        fresh = await identity.attested(nonce)
        assert fresh.ear.nonces[1] == nonce.hex()
        assert fresh.ear.certificate_sha256 != before.ear.certificate_sha256
        assert identity.current() is fresh.material
        assert len(changes) == 1
        # Concurrent requests do not mix: each result names the certificate it came with.
        several = await asyncio.gather(*(identity.attested(secrets.token_bytes(32)) for _ in range(8)))
        assert len({result.ear.certificate_sha256 for result in several}) == 8
        await identity.aclose()


async def test_after_a_restart_the_registry_is_there_and_the_old_authority_is_not() -> None:
    async with attest_process() as attest:
        old_bundle = attest.bundle
        trainer = await attest.service(Role.TRAINER)
        await _register(attest, trainer, "j-1")
        await _register(attest, trainer, "j-closed")
        async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=trainer) as channel:
            stub = attest_pb2_grpc.RegistryServiceStub(channel)
            request = attest_pb2.CloseJobRequest(job_id="j-closed")
            await invoke(stub.CloseJob, request, timeout_s=10, what="close a job")

        assert await attest.stop() == 0
        await attest.start()

        assert attest.bundle.epoch != old_bundle.epoch
        with pytest.raises(CloisterError) as caught:  # its TD measured the old bundle
            await trainer.refresh()
        assert caught.value.code is Code.UNREACHABLE
        guest = attest.launch()
        measure(guest, Role.RANK, bundle=attest.bundle.digest)
        rank = await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=attest.bundle)
        assert rank.spiffe_id.job == JOB.job_id

        again = await attest.service(Role.TRAINER)
        await _register(attest, again, "j-1")
        with pytest.raises(CloisterError) as caught:
            await _register(attest, again, "j-closed")
        assert caught.value.code is Code.WORKLOAD_EXISTS
        for identity in (trainer, rank, again):
            await identity.aclose()


async def test_attest_does_not_start_when_its_own_code_is_not_the_configured_one() -> None:
    async with attest_process() as attest:
        await attest.stop()
        attest.write_config(attest="00" * 48)
        code, errors = await attest.run_to_end()
        assert code == 3
        assert "CLO-1207" in errors
        assert "service.script" in errors


async def test_a_taken_port_is_named_and_nothing_is_left_behind() -> None:
    async with attest_process() as attest:
        await attest.stop()
        bundle = attest.bundle_file.read_bytes()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            text = attest.config_file.read_text()
            for section, option in (("[service]", "health_listen"), ("[attest]", "enrolment_listen")):
                listen = f'{section}\n{option} = "127.0.0.1:{port}"'
                without = re.sub(rf"^{option} = .*\n", "", text, flags=re.MULTILINE)
                attest.config_file.write_text(without.replace(section, listen, 1))
                code, errors = await attest.run_to_end()
                assert code == 6, errors
                assert "CLO-1009" in errors
                assert str(port) in errors
                assert attest.bundle_file.read_bytes() == bundle


async def test_an_address_that_floods_the_open_port_is_slowed_down() -> None:
    async with attest_process(calls_per_s=1, calls_burst=5) as attest:
        async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
            stub = attest_pb2_grpc.EnrolmentServiceStub(channel)
            ask = attest_pb2.GetTrustBundleRequest()
            calls = (invoke(stub.GetTrustBundle, ask, timeout_s=10, what="ask") for _ in range(8))
            answers = await asyncio.gather(*calls, return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, CloisterError)]
        assert len(refused) in (1, 2)  # five at once and one that waits a second; one more if that took a second
        assert {error.code for error in refused} == {Code.RATE_LIMITED}


async def test_more_tds_than_an_address_may_enrol_at_once_are_all_enrolled() -> None:
    async with attest_process(calls_per_s=20, calls_burst=2, connections=2) as attest:
        services = await asyncio.gather(*(attest.service(Role.TRAINER) for _ in range(8)))
        for service in services:
            await service.aclose()
        assert Code.RATE_LIMITED.text not in attest.log()  # they waited before the door


async def test_behind_the_door_nobody_is_served_who_did_not_come_in_by_it() -> None:
    async with attest_process() as attest:
        listening = re.search(r'"endpoint": "([^"]+)".*"anonymous": true', attest.log())
        assert listening
        assert listening[1] not in attest.endpoints.values()
        async with open_enrolment_channel(listening[1], bundle=attest.bundle) as channel:
            stub = attest_pb2_grpc.EnrolmentServiceStub(channel)
            with pytest.raises(CloisterError) as caught:
                await invoke(stub.Challenge, attest_pb2.ChallengeRequest(role="trainer"), timeout_s=10, what="ask")
            assert caught.value.code is Code.CALLER_NOT_ALLOWED


async def test_a_broken_configuration_is_named_with_file_and_line() -> None:
    async with attest_process() as attest:
        await attest.stop()
        text = attest.config_file.read_text()
        for wrong, right, named in (
            ('role = "rank"', 'role = "attest"', "role"),
            ("colour = 1\nsimulated = true", "simulated = true", "colour"),
        ):
            attest.config_file.write_text(text.replace(right, wrong, 1))
            code, errors = await attest.run_to_end()
            assert code == 2, errors
            assert "CLO-1001" in errors
            assert "line" in errors
            assert named in errors


async def _until_expired(identity: Identity) -> None:
    while identity.current():
        await asyncio.sleep(0.05)


async def _register(attest: AttestProcess, who: Identity, job_id: str) -> None:
    request = attest_pb2.RegisterJobRequest(
        job_id=job_id, tenant=JOB.tenant, world_size=2, script_digest=SCRIPT, config_digest=CONFIG
    )
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=who) as channel:
        stub = attest_pb2_grpc.RegistryServiceStub(channel)
        await invoke(stub.RegisterJob, request, timeout_s=10, what="register a job")
