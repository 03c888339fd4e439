# SPDX-License-Identifier: Apache-2.0
"""A real platform, a real attest: from nothing to an identity, and what that identity may do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.collateral.offline import OfflineCollateral
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.evidence import EvidenceVerifier
from cloister.guest.measure import digest_of_package
from cloister.guest.owner import verify_service_evidence
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.credentials import CredentialSource, StaticCredentials
from cloister.tdx.trustroot import TrustRoot
from cloister_sim.platform import SimulatedPlatform
from fakes.attest_harness import CONFIG, JOB, SCRIPT, AttestProcess, attest_process, csr, measure, user_material


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attest() -> AsyncIterator[AttestProcess]:
    async with attest_process() as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def call(attest: AttestProcess, who: CredentialSource, service: str, method: str, request: Any) -> Any:
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=who) as channel:
        stub = getattr(attest_pb2_grpc, f"{service}Stub")(channel)
        return await invoke(getattr(stub, method), request, timeout_s=10, what=method)


async def register_job(attest: AttestProcess, who: CredentialSource, job_id: str = JOB.job_id) -> None:
    request = attest_pb2.RegisterJobRequest(
        job_id=job_id, tenant=JOB.tenant, world_size=2, script_digest=SCRIPT, config_digest=CONFIG
    )
    await call(attest, who, "RegistryService", "RegisterJob", request)


async def user(attest: AttestProcess, key: ec.EllipticCurvePrivateKey | None = None) -> StaticCredentials:
    key = key or attest.user_key
    async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
        stub = attest_pb2_grpc.EnrolmentServiceStub(channel)
        request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(key))
        response = await invoke(stub.IssueUserCertificate, request, timeout_s=10, what="get a certificate")
    return StaticCredentials(user_material(key, response.certificate_chain_pem, attest.bundle))


async def test_a_rank_enrols_once_its_job_is_registered(attest: AttestProcess) -> None:
    trainer = await attest.service(Role.TRAINER)
    guest = attest.launch()
    measure(guest, Role.RANK, bundle=attest.bundle.digest)
    with pytest.raises(CloisterError) as caught:
        await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=attest.bundle)
    assert caught.value.code is Code.WORKLOAD_NOT_REGISTERED

    await register_job(attest, trainer)
    rank = await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=attest.bundle)
    assert str(rank.spiffe_id) == "spiffe://cloister.test/ns/hospital-a/job/j-1/rank/0"
    attested = await rank.attested()
    assert attested.ear.tee.simulated
    assert attested.ear.workload.script == SCRIPT
    await rank.aclose()
    await trainer.aclose()


async def test_a_service_gets_a_certificate_for_an_hour_that_names_it(attest: AttestProcess) -> None:
    identity = await attest.service(Role.KEYBROKER)
    leaf = x509.load_pem_x509_certificate(identity.current().chain_pem)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://cloister.test/service/keybroker"]
    assert names.get_values_for_type(x509.DNSName) == ["keybroker.cloister.test"]
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= timedelta(hours=1)
    await identity.aclose()


async def test_the_registry_is_for_those_who_start_workloads(attest: AttestProcess) -> None:
    keybroker, gateway, person = (
        await attest.service(Role.KEYBROKER),
        await attest.service(Role.GATEWAY),
        await user(attest),
    )
    for who in (keybroker, gateway, person):
        with pytest.raises(CloisterError) as caught:
            await register_job(attest, who, "j-not-theirs")
        assert caught.value.code is Code.CALLER_NOT_ALLOWED
    backend = attest_pb2.RegisterBackendRequest(
        tenant="hospital-a", model="reviews", backend_id="b-7", script_digest=SCRIPT, config_digest=CONFIG
    )
    with pytest.raises(CloisterError) as caught:
        await call(attest, keybroker, "RegistryService", "RegisterBackend", backend)
    assert caught.value.code is Code.CALLER_NOT_ALLOWED
    await call(attest, gateway, "RegistryService", "RegisterBackend", backend)
    await call(
        attest, gateway, "RegistryService", "CloseBackend",
        attest_pb2.CloseBackendRequest(tenant="hospital-a", model="reviews", backend_id="b-7"),
    )  # fmt: skip
    for identity in (keybroker, gateway):
        await identity.aclose()


async def test_a_registered_user_gets_a_certificate_and_sees_verdicts(attest: AttestProcess) -> None:
    person = await user(attest)
    assert person.current().spiffe_id == attest.user_id
    assert person.current().not_after - datetime.now(UTC) <= timedelta(hours=12)
    found = await call(attest, person, "VerdictService", "ListVerdicts", attest_pb2.ListVerdictsRequest(limit=1000))
    own = [verdict for verdict in found.verdicts if verdict.spiffe_id.endswith("/service/attest")]
    assert own
    assert own[0].accepted
    assert own[0].simulated
    assert {"nonce.outstanding", "quote.E3", "report-data", "csr.key", "service.script"} <= {
        c.name for c in own[0].checks
    }


async def test_an_unregistered_user_gets_nothing(attest: AttestProcess) -> None:
    with pytest.raises(CloisterError) as caught:
        await user(attest, ec.generate_private_key(ec.SECP256R1()))
    assert caught.value.code is Code.USER_NOT_REGISTERED


async def test_the_enrolment_port_serves_nothing_but_enrolment(attest: AttestProcess) -> None:
    async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
        stub = attest_pb2_grpc.RegistryServiceStub(channel)
        with pytest.raises(CloisterError):
            await invoke(stub.CloseJob, attest_pb2.CloseJobRequest(job_id="j-1"), timeout_s=10, what="close a job")
        bundle = await invoke(
            attest_pb2_grpc.EnrolmentServiceStub(channel).GetTrustBundle,
            attest_pb2.GetTrustBundleRequest(),
            timeout_s=10,
            what="get the bundle",
        )
    assert bundle.trust_bundle == attest.bundle_file.read_bytes()


async def test_an_owner_verifies_attest_itself(attest: AttestProcess) -> None:
    verified = await verify_service_evidence(
        attest.endpoints["grpc"],
        role=Role.ATTEST,
        credentials=await user(attest),
        verifier=attest.verifier,
        expected_scripts=[digest_of_package("cloister_attest")],
        now=datetime.now(UTC),
    )
    assert all(check.ok for check in verified.checks)
    assert {"service.script", "service.tls-key", "service.trust-bundle"} <= {check.name for check in verified.checks}


async def test_an_owner_refuses_other_code_another_root_or_another_role(attest: AttestProcess) -> None:
    person = await user(attest)

    async def verify(**changes: Any) -> None:
        arguments = {
            "role": Role.ATTEST,
            "credentials": person,
            "verifier": attest.verifier,
            "expected_scripts": [digest_of_package("cloister_attest")],
            "now": datetime.now(UTC),
        }
        await verify_service_evidence(attest.endpoints["grpc"], **{**arguments, **changes})

    await verify()
    stranger = SimulatedPlatform.create(attest.directory / "stranger")
    root = TrustRoot.from_pem(stranger.root_pem, simulated=True)
    collateral = OfflineCollateral(stranger.publish(attest.directory / "strange", datetime.now(UTC)), root=root)
    other = EvidenceVerifier(root, collateral)
    for changes in ({"expected_scripts": [b"\x00" * 48]}, {"expected_scripts": []}, {"verifier": other}):
        with pytest.raises(CloisterError) as caught:
            await verify(**changes)
        assert caught.value.code is Code.EVIDENCE_UNEXPECTED
    with pytest.raises(CloisterError) as caught:
        await verify(role=Role.KEYBROKER)
    assert caught.value.code is Code.UNREACHABLE
