# SPDX-License-Identifier: Apache-2.0
"""Who is let in, and what everyone else gets to hear."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import grpc
import pytest

from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role, dns_name
from cloister.runtime.channel import open_enrolment_channel
from cloister.runtime.diagnose import explain_tls
from cloister.runtime.server import GrpcServer
from fakes.certs import TestCa, some_id
from fakes.evidence_server import METHOD, EvidenceFake, ask, evidence_server, evidence_stub, mounted


@pytest.fixture
def ca() -> TestCa:
    return TestCa()


@pytest.fixture
async def server(ca: TestCa) -> AsyncIterator[GrpcServer]:
    async with evidence_server(ca.credentials(Role.KEYBROKER)) as running:
        yield running


async def refusal(server: GrpcServer, credentials: object, role: Role = Role.KEYBROKER) -> CloisterError:
    async with evidence_stub(server.endpoint, credentials, role) as stub:  # type: ignore[arg-type]
        with pytest.raises(CloisterError) as caught:
            await ask(stub)
    return caught.value


async def test_a_user_is_admitted_and_known_by_its_spiffe_id(ca: TestCa, server: GrpcServer) -> None:
    async with evidence_stub(server.endpoint, ca.credentials(Role.USER)) as stub:
        evidence = await ask(stub)
    assert evidence.role == str(some_id(Role.USER))
    assert evidence.trust_domain == "TLSv1.3"
    assert evidence.audience == "X25519MLKEM768", "two peers of ours agree on a post-quantum key exchange"


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.USER])
async def test_every_other_role_is_refused_with_words(ca: TestCa, server: GrpcServer, role: Role) -> None:
    error = await refusal(server, ca.credentials(role))
    assert error.code is Code.CALLER_NOT_ALLOWED
    assert f"the role {role}" in error.why


async def test_two_uri_names_are_nobody(ca: TestCa, server: GrpcServer) -> None:
    user = str(some_id(Role.USER))
    for uris in ([user, user.replace("alice", "bob")], [user, "https://example.com"], []):
        error = await refusal(server, ca.credentials(Role.USER, uris=uris))
        assert error.code is Code.CALLER_UNKNOWN, uris


async def test_an_id_that_is_not_of_this_system_is_nobody(ca: TestCa, server: GrpcServer) -> None:
    for uri in (
        "spiffe://cloister.test/admin",
        "spiffe://other.test/ns/hospital-a/user/alice",
        "https://cloister.test",
    ):
        assert (await refusal(server, ca.credentials(Role.USER, uris=[uri]))).code is Code.CALLER_UNKNOWN, uri


async def test_the_ca_of_one_role_cannot_make_an_identity_of_another(ca: TestCa, server: GrpcServer) -> None:
    error = await refusal(server, ca.credentials(Role.USER, issued_by=Role.BACKEND))
    assert error.code is Code.CALLER_UNKNOWN
    assert "CA for the role user" in error.why


async def test_an_expired_certificate_is_refused_and_the_reason_is_found(ca: TestCa, server: GrpcServer) -> None:
    error = await refusal(server, ca.credentials(Role.USER, life=-timedelta(minutes=1)))
    assert error.code is Code.UNREACHABLE
    assert "expired" in error.why


async def test_a_certificate_of_another_ca_is_refused_and_the_reason_is_found(ca: TestCa, server: GrpcServer) -> None:
    error = await refusal(server, TestCa().credentials(Role.USER, bundle=ca.bundle))
    assert error.code is Code.UNREACHABLE
    assert "does not trust the CA" in error.why


async def test_a_server_of_another_ca_is_not_talked_to(server: GrpcServer) -> None:
    error = await refusal(server, TestCa().credentials(Role.USER))
    assert error.code is Code.UNREACHABLE
    assert "unable to get local issuer certificate" in error.why
    assert "spiffe://cloister.test/service/keybroker" in error.why, "it names who answered instead"


async def test_one_service_cannot_stand_in_for_another(ca: TestCa) -> None:
    impostors = [
        ca.credentials(Role.TRAINER, dns=dns_name(Role.KEYBROKER, ca.trust_domain)),  # right name, wrong CA
        ca.credentials(Role.KEYBROKER, dns=dns_name(Role.TRAINER, ca.trust_domain)),  # right CA, wrong name
    ]
    for impostor in impostors:
        async with evidence_server(impostor) as server:
            error = await refusal(server, ca.credentials(Role.USER))
            assert error.code is Code.UNREACHABLE
            assert "certificate" in error.why


async def test_without_a_certificate_nothing_is_reached(ca: TestCa, server: GrpcServer) -> None:
    tls = grpc.ssl_channel_credentials(root_certificates=ca.bundle.intermediate(Role.KEYBROKER))
    name = dns_name(Role.KEYBROKER, ca.trust_domain)
    async with grpc.aio.secure_channel(
        server.endpoint, tls, options=[("grpc.ssl_target_name_override", name)]
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    why = explain_tls(server.endpoint, None, Role.KEYBROKER, bundle=ca.bundle)
    assert "wants a client certificate" in why


async def test_plaintext_is_not_spoken(server: GrpcServer) -> None:
    async with grpc.aio.insecure_channel(server.endpoint) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_method_without_a_row_is_for_nobody(ca: TestCa) -> None:
    for callers in ({}, {METHOD: frozenset[Role]()}):
        async with evidence_server(ca.credentials(Role.KEYBROKER), callers=callers) as server:
            assert (await refusal(server, ca.credentials(Role.USER))).code is Code.CALLER_NOT_ALLOWED


async def test_an_unknown_method_is_unimplemented(ca: TestCa, server: GrpcServer) -> None:
    async with evidence_stub(server.endpoint, ca.credentials(Role.USER)) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetEvidence.channel.unary_unary("/cloister.api.common.v1.EvidenceService/Steal")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_typo_in_the_caller_table_stops_the_start(ca: TestCa) -> None:
    with pytest.raises(CloisterError) as caught:
        GrpcServer(
            section="127.0.0.1:0",
            credentials=ca.credentials(Role.KEYBROKER),
            services=[mounted(EvidenceFake())],
            callers={METHOD + "s": frozenset({Role.USER})},
        )
    assert caught.value.code is Code.CONFIG_INVALID
    assert METHOD + "s" in caught.value.what
    assert METHOD in caught.value.why


async def test_an_anonymous_server_opens_what_its_table_lists_and_nothing_else(ca: TestCa) -> None:
    class Open(EvidenceFake):
        async def GetEvidence(self, request, context):  # type: ignore[no-untyped-def]
            if request.audience == "who":
                return await super().GetEvidence(request, context)
            return evidence_pb2.GetEvidenceResponse()

    async with (
        evidence_server(
            ca.credentials(Role.ATTEST), Open(), callers={METHOD: frozenset[Role]()}, anonymous=True
        ) as server,
        open_enrolment_channel(server.endpoint, bundle=ca.bundle) as channel,
    ):
        stub = evidence_pb2_grpc.EvidenceServiceStub(channel)
        await ask(stub)
        with pytest.raises(CloisterError) as caught:
            await ask(stub, "who")
        assert caught.value.code is Code.CALLER_UNKNOWN, "a handler that asks for a caller finds none"
    async with (
        evidence_server(ca.credentials(Role.ATTEST), Open(), callers={}, anonymous=True) as server,
        open_enrolment_channel(server.endpoint, bundle=ca.bundle) as channel,
    ):
        with pytest.raises(CloisterError) as caught:
            await ask(evidence_pb2_grpc.EvidenceServiceStub(channel))
        assert caught.value.code is Code.CALLER_NOT_ALLOWED


def test_an_anonymous_server_cannot_pretend_to_check_roles(ca: TestCa) -> None:
    with pytest.raises(CloisterError) as caught:
        GrpcServer(
            section="127.0.0.1:0",
            credentials=ca.credentials(Role.ATTEST),
            services=[mounted(EvidenceFake())],
            callers={METHOD: frozenset({Role.USER})},
            anonymous=True,
        )
    assert caught.value.code is Code.CONFIG_INVALID


async def test_an_enrolment_channel_trusts_attest_alone(ca: TestCa, server: GrpcServer) -> None:
    async with open_enrolment_channel(server.endpoint, bundle=ca.bundle) as channel:
        with pytest.raises(CloisterError) as caught:
            await ask(evidence_pb2_grpc.EvidenceServiceStub(channel))
    assert caught.value.code is Code.UNREACHABLE
