# SPDX-License-Identifier: Apache-2.0
"""Servers and channels against each other: errors, limits, deadlines, health, reflection, metrics, drain."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cloister.api.common.v1 import evidence_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime import logging as cloister_logging
from cloister.runtime.channel import SwappingChannel, open_channel, stream
from cloister.runtime.config import ServiceSection
from cloister.runtime.endpoints import read_endpoints
from cloister.runtime.health import HealthState
from cloister.runtime.host import serving
from cloister.runtime.limits import Limits
from cloister.runtime.metrics import RpcMetrics
from cloister.runtime.quota import IdentityQuota
from cloister.runtime.reflection import ALPHA, V1
from cloister.runtime.server import GrpcServer
from fakes.certs import TestCa
from fakes.chaos_proxy import ChaosProxy
from fakes.evidence_server import METHOD, SERVICE, EvidenceFake, ask, evidence_server, evidence_stub, mounted


@pytest.fixture
def ca() -> TestCa:
    return TestCa()


@pytest.fixture
def servicer() -> EvidenceFake:
    return EvidenceFake()


@pytest.fixture
async def server(ca: TestCa, servicer: EvidenceFake) -> AsyncIterator[GrpcServer]:
    async with evidence_server(ca.credentials(Role.KEYBROKER), servicer) as running:
        yield running


@pytest.fixture
async def stub(ca: TestCa, server: GrpcServer) -> AsyncIterator[Any]:
    async with evidence_stub(server.endpoint, ca.credentials(Role.USER)) as found:
        yield found


@pytest.fixture
def log_lines() -> Any:
    """Give a function that returns what was logged, as JSON lines."""
    out = io.StringIO()
    cloister_logging.configure("test", "json", out)
    yield lambda: [json.loads(line) for line in out.getvalue().splitlines()]
    logging.getLogger().handlers[:] = []
    cloister_logging.configure("test", "json", io.StringIO())


async def test_a_rich_error_arrives_as_it_was_raised(stub: Any) -> None:
    with pytest.raises(CloisterError) as caught:
        await ask(stub, "rich")
    error = caught.value
    assert (error.code, error.what, error.why, error.todo) == (
        Code.KEY_DISABLED,
        "the key is disabled",
        "its owner said so",
        "ask",
    )


async def test_a_long_error_in_any_script_still_arrives(stub: Any) -> None:
    with pytest.raises(CloisterError) as caught:
        await ask(stub, "long")
    assert caught.value.code is Code.KEY_DISABLED
    for text in (caught.value.what, caught.value.why, caught.value.todo):
        assert 400 < len(text) <= 500
        assert set(text) == {"评"}


async def test_an_unexpected_error_tells_a_request_id_and_nothing_else(stub: Any, log_lines: Any) -> None:
    with pytest.raises(CloisterError) as caught:
        await ask(stub, "crash")
    assert caught.value.code is Code.INTERNAL
    assert "0123456789abcdef" not in str(caught.value)
    [failure] = [line for line in log_lines() if line["event"] == "handler failed"]
    assert failure["request_id"] in caught.value.why
    assert "ValueError" in failure["exception"], "the log has what the caller must not see"


async def test_a_status_that_the_handler_sends_itself_passes(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetEvidence(evidence_pb2.GetEvidenceRequest(audience="abort"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert caught.value.details() == "gone"


async def test_a_call_is_logged_with_caller_code_and_time_and_without_payload(stub: Any, log_lines: Any) -> None:
    await ask(stub, "some-audience")
    [line] = [line for line in log_lines() if line["event"] == "rpc"]
    assert line["method"] == METHOD
    assert line["caller"] == "spiffe://cloister.test/ns/hospital-a/user/alice"
    assert line["code"] == "OK"
    assert line["duration_ms"] >= 0
    assert "some-audience" not in json.dumps(line)


async def test_a_request_id_goes_along_over_two_hops(ca: TestCa, server: GrpcServer, servicer: EvidenceFake) -> None:
    second = EvidenceFake()
    everyone = {METHOD: frozenset({Role.USER, Role.KEYBROKER})}
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), second, callers=everyone) as far,
        evidence_stub(far.endpoint, ca.credentials(Role.KEYBROKER)) as next_hop,
    ):
        first = EvidenceFake(next_hop)
        async with (
            evidence_server(ca.credentials(Role.KEYBROKER), first) as near,
            evidence_stub(near.endpoint, ca.credentials(Role.USER)) as stub,
        ):
            evidence = await ask(stub, "forward")
            await ask(stub, "forward")
    assert evidence.role == "spiffe://cloister.test/service/keybroker"
    assert first.request_ids == second.request_ids
    assert len(set(first.request_ids)) == 2, "each request has its own"
    assert all(len(found) == 16 for found in first.request_ids)


async def test_a_request_id_that_could_break_a_log_is_replaced(stub: Any, servicer: EvidenceFake) -> None:
    request = evidence_pb2.GetEvidenceRequest()
    for offered in ("a b", "x" * 65, "short"):
        await stub.GetEvidence(request, metadata=(("x-request-id", offered),))
        assert servicer.request_ids[-1] != offered
    await stub.GetEvidence(request, metadata=(("x-request-id", "good-id-1"),))
    assert servicer.request_ids[-1] == "good-id-1"


async def test_a_message_over_the_limit_is_refused_on_either_side(ca: TestCa, stub: Any) -> None:
    assert len((await ask(stub, "echo-size", nonce=bytes(1024 * 1024))).quote) == 1024 * 1024
    with pytest.raises(CloisterError) as caught:
        await ask(stub, nonce=bytes(5 * 1024 * 1024))
    assert caught.value.code is Code.MESSAGE_TOO_LARGE
    small = Limits(max_message_bytes=1000)
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), limits=small) as server,
        evidence_stub(server.endpoint, ca.credentials(Role.USER)) as generous,
    ):
        with pytest.raises(CloisterError) as caught:
            await ask(generous, nonce=bytes(2000))
        assert caught.value.code is Code.MESSAGE_TOO_LARGE
        await ask(generous, nonce=bytes(500))


async def test_a_deadline_of_the_caller_ends_the_call(stub: Any, servicer: EvidenceFake) -> None:
    with pytest.raises(CloisterError) as caught:
        await ask(stub, "wait", timeout_s=0.2)
    assert caught.value.code is Code.DEADLINE_EXCEEDED


async def test_the_server_caps_a_call_whatever_the_caller_asked_for(ca: TestCa) -> None:
    limits = Limits(max_unary_s=0.2)
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), limits=limits) as server,
        evidence_stub(server.endpoint, ca.credentials(Role.USER)) as stub,
    ):
        with pytest.raises(CloisterError) as caught:
            await ask(stub, "wait", timeout_s=30)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert "longest time" in caught.value.why


async def test_more_calls_than_the_limit_are_turned_away_at_once(ca: TestCa, servicer: EvidenceFake) -> None:
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), servicer, limits=Limits(max_concurrent_rpcs=1)) as server,
        evidence_stub(server.endpoint, ca.credentials(Role.USER)) as stub,
    ):
        first = asyncio.create_task(ask(stub, "wait"))
        await servicer.entered.wait()
        with pytest.raises(CloisterError) as caught:
            await ask(stub)
        assert caught.value.code is Code.RATE_LIMITED
        servicer.leave.set()
        await first


async def answers(stub: Any) -> bool:
    try:
        await ask(stub)
    except CloisterError:
        return False
    return True


async def test_a_black_holed_peer_is_noticed_within_seconds(
    ca: TestCa, server: GrpcServer, servicer: EvidenceFake
) -> None:
    async with (
        ChaosProxy(server.endpoint) as proxy,
        evidence_stub(proxy.endpoint, ca.credentials(Role.USER)) as stub,
    ):
        call = asyncio.create_task(ask(stub, "wait", timeout_s=60))
        await servicer.entered.wait()
        proxy.black_hole()
        started = time.monotonic()
        with pytest.raises(CloisterError) as caught:
            await call
        noticed_after = time.monotonic() - started
        assert caught.value.code is Code.UNREACHABLE
        # 3 s is the aim; machines under test are slow.
        assert noticed_after < 6
        proxy.heal()
        async with asyncio.timeout(10):  # a call may still meet the connection that is being given up
            while not await answers(stub):
                pass


async def test_a_call_in_flight_when_the_connection_breaks_is_unreachable_and_the_next_one_works(
    ca: TestCa, server: GrpcServer, servicer: EvidenceFake
) -> None:
    async with (
        ChaosProxy(server.endpoint) as proxy,
        evidence_stub(proxy.endpoint, ca.credentials(Role.USER)) as stub,
    ):
        call = asyncio.create_task(ask(stub, "wait"))
        await servicer.entered.wait()
        proxy.cut()
        with pytest.raises(CloisterError) as caught:
            await call
        assert caught.value.code is Code.UNREACHABLE
        await ask(stub)


async def test_drain_lets_calls_in_flight_end_and_takes_no_new_ones(
    ca: TestCa, server: GrpcServer, servicer: EvidenceFake, stub: Any
) -> None:
    call = asyncio.create_task(ask(stub, "wait"))
    await servicer.entered.wait()
    drained = asyncio.create_task(server.drain(10))
    async with evidence_stub(server.endpoint, ca.credentials(Role.USER)) as late:
        refused: list[Code] = []
        while not refused:  # until the listening socket is closed
            try:
                await ask(late, timeout_s=1)
            except CloisterError as error:
                refused.append(error.code)
    assert refused[0] in (Code.UNREACHABLE, Code.DEADLINE_EXCEEDED)
    servicer.leave.set()
    assert (await call).role.endswith("/user/alice")
    await drained


async def test_a_drain_does_not_wait_for_those_who_watch_health(ca: TestCa, server: GrpcServer) -> None:
    async with open_channel(server.endpoint, role=Role.KEYBROKER, credentials=ca.credentials(Role.GATEWAY)) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        started = time.monotonic()
        await server.drain(20)
        assert time.monotonic() - started < 5


async def test_drain_ends_calls_that_do_not(server: GrpcServer, servicer: EvidenceFake, stub: Any) -> None:
    call = asyncio.create_task(ask(stub, "wait"))
    await servicer.entered.wait()
    await server.drain(0.1)
    with pytest.raises(CloisterError) as caught:
        await call
    assert caught.value.code is Code.UNREACHABLE


async def test_nothing_listens_is_said_as_such(ca: TestCa) -> None:
    async with evidence_server(ca.credentials(Role.KEYBROKER)) as server:
        endpoint = server.endpoint
    async with evidence_stub(endpoint, ca.credentials(Role.USER)) as stub:
        with pytest.raises(CloisterError) as caught:
            await ask(stub)
    assert caught.value.code is Code.UNREACHABLE
    assert caught.value.why == f"nothing listens on {endpoint}"


async def test_a_taken_port_is_an_error_that_names_it(ca: TestCa, server: GrpcServer) -> None:
    with pytest.raises(CloisterError) as caught:
        async with evidence_server(ca.credentials(Role.KEYBROKER), section=server.endpoint):
            pass
    assert caught.value.code is Code.PORT_TAKEN
    assert server.endpoint in caught.value.what


@pytest.mark.parametrize("listen", ["127.0.0.1", "127.0.0.1:99999", "127.0.0.1:http", ":1", "203.0.113.7:0"])
async def test_an_address_that_cannot_be_listened_on_is_an_error_that_names_it(ca: TestCa, listen: str) -> None:
    with pytest.raises(CloisterError) as caught:
        async with evidence_server(ca.credentials(Role.KEYBROKER), section=listen):
            pass
    assert caught.value.code is Code.CONFIG_INVALID
    assert listen in caught.value.what


@pytest.mark.parametrize("service", [V1, ALPHA])
async def test_reflection_lists_services_and_their_messages(ca: TestCa, server: GrpcServer, service: str) -> None:
    request = reflection_pb2.ServerReflectionRequest
    async with open_channel(server.endpoint, role=Role.KEYBROKER, credentials=ca.credentials(Role.RANK)) as channel:
        call = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            request_serializer=request.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )(iter([request(list_services=""), request(file_containing_symbol=SERVICE)]))
        listed, described = [answer async for answer in call]
    assert {found.name for found in listed.list_services_response.service} >= {SERVICE, "grpc.health.v1.Health"}
    file = descriptor_pb2.FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert file.package == "cloister.api.common.v1"


async def test_reflection_can_be_switched_off(ca: TestCa) -> None:
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), reflection=False) as server,
        open_channel(server.endpoint, role=Role.KEYBROKER, credentials=ca.credentials(Role.USER)) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in channel.stream_stream(f"/{V1}/ServerReflectionInfo")(iter([b""])):
                pass
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def health_of(channel: Any, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)).status)


SERVING = int(health_pb2.HealthCheckResponse.SERVING)
NOT_SERVING = int(health_pb2.HealthCheckResponse.NOT_SERVING)


async def test_health_follows_the_server_and_watchers_hear_of_it(ca: TestCa, server: GrpcServer) -> None:
    async with open_channel(server.endpoint, role=Role.KEYBROKER, credentials=ca.credentials(Role.GATEWAY)) as channel:
        assert await health_of(channel, SERVICE) == SERVING
        watch = stream(health_pb2_grpc.HealthStub(channel).Watch, health_pb2.HealthCheckRequest(), what="watch health")
        assert (await anext(watch)).status == SERVING
        await server.set_serving(False)
        assert (await anext(watch)).status == NOT_SERVING
        assert await health_of(channel, SERVICE) == NOT_SERVING
        await watch.aclose()


@pytest.fixture
def section(tmp_path: Path) -> ServiceSection:
    return ServiceSection(
        trust_domain="cloister.test", state_dir=tmp_path, endpoints_file=tmp_path / "run" / "endpoints.json"
    )


async def test_a_service_runs_with_probes_metrics_and_an_endpoints_file_until_it_ends(
    ca: TestCa, section: ServiceSection
) -> None:
    health, metrics = HealthState(), RpcMetrics()
    server = GrpcServer(
        section=section,
        credentials=ca.credentials(Role.KEYBROKER),
        services=[mounted(EvidenceFake())],
        callers={METHOD: frozenset({Role.USER})},
        health=health,
        metrics=metrics,
    )
    async with serving(section, {"grpc": server}, health=health, metrics=metrics, drain_s=1) as endpoints:
        assert read_endpoints(section.endpoints_file) == endpoints
        async with grpc.aio.insecure_channel(endpoints["health"]) as plain:
            assert await health_of(plain) == SERVING
            assert await health_of(plain, SERVICE) == SERVING
            for method in (METHOD, f"/{V1}/ServerReflectionInfo", "/grpc.health.v1.Health/List"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await plain.unary_unary(method)(b"", timeout=5)
                assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED, "the plain port serves health only"
        async with evidence_stub(endpoints["grpc"], ca.credentials(Role.USER)) as stub:
            await ask(stub)
            with pytest.raises(CloisterError):
                await ask(stub, "rich")
        text = await asyncio.to_thread(fetch, f"http://{endpoints['metrics']}/metrics")
    labels = f'grpc_method="GetEvidence",grpc_service="{SERVICE}",grpc_type="unary"'
    assert f"grpc_server_started_total{{{labels}}} 2.0" in text
    assert f'grpc_server_handled_total{{grpc_code="OK",{labels}}} 1.0' in text
    assert f'grpc_server_handled_total{{grpc_code="PermissionDenied",{labels}}} 1.0' in text
    assert f"grpc_server_handling_seconds_count{{{labels}}} 2.0" in text
    assert not section.endpoints_file.exists(), "a service that has ended is not ready"


async def test_a_taken_metrics_or_probe_port_stops_the_start(ca: TestCa, section: ServiceSection) -> None:
    async with evidence_server(ca.credentials(Role.KEYBROKER)) as other:
        for field in ("metrics_listen", "health_listen", "listen"):
            taken = section.model_copy(update={field: other.endpoint})
            health, metrics = HealthState(), RpcMetrics()
            server = GrpcServer(
                section=taken,
                credentials=ca.credentials(Role.KEYBROKER),
                services=[mounted(EvidenceFake())],
                callers={},
                health=health,
                metrics=metrics,
            )
            with pytest.raises(CloisterError) as caught:
                async with serving(taken, {"grpc": server}, health=health, metrics=metrics):
                    pass
            assert caught.value.code is Code.PORT_TAKEN, field
            assert not taken.endpoints_file.exists()


async def test_a_closed_channel_takes_no_call(ca: TestCa, server: GrpcServer) -> None:
    channel = open_channel(server.endpoint, role=Role.KEYBROKER, credentials=ca.credentials(Role.USER))
    assert isinstance(channel, SwappingChannel)
    await channel.channel_ready()
    await channel.close()
    with pytest.raises(grpc.aio.UsageError):
        channel.get_state()


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        return str(answer.read().decode())


async def test_a_caller_over_its_quota_is_told_so_and_others_are_served(ca: TestCa) -> None:
    quota, everybody = IdentityQuota(per_s=0.001, burst=3, at_once=8), frozenset({Role.USER, Role.RANK})
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), quota=quota, callers={METHOD: everybody}) as server,
        evidence_stub(server.endpoint, ca.credentials(Role.USER)) as greedy,
        evidence_stub(server.endpoint, ca.credentials(Role.RANK)) as other,
    ):
        for _ in range(3):
            await ask(greedy)
        with pytest.raises(CloisterError) as caught:
            await ask(greedy)
        assert caught.value.code is Code.RATE_LIMITED
        await ask(other)


async def test_calls_in_flight_count_against_the_quota_until_they_end(ca: TestCa, servicer: EvidenceFake) -> None:
    quota = IdentityQuota(per_s=1000, burst=1000, at_once=1)
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), servicer, quota=quota) as server,
        evidence_stub(server.endpoint, ca.credentials(Role.USER)) as stub,
    ):
        waiting = asyncio.ensure_future(ask(stub, "wait", timeout_s=0.5))
        while not servicer.request_ids:
            await asyncio.sleep(0.01)
        with pytest.raises(CloisterError) as caught:
            await ask(stub)
        assert caught.value.code is Code.RATE_LIMITED
        with pytest.raises(CloisterError):
            await waiting
        await ask(stub)


async def test_a_server_may_take_in_less_than_it_answers_with(ca: TestCa) -> None:
    limits = Limits(max_request_bytes=1000)
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), limits=limits) as server,
        evidence_stub(server.endpoint, ca.credentials(Role.USER)) as stub,
    ):
        with pytest.raises(CloisterError) as caught:
            await ask(stub, nonce=bytes(2000))
        assert caught.value.code is Code.MESSAGE_TOO_LARGE
        assert len((await ask(stub, "echo-size", nonce=bytes(900))).quote) == 900


async def test_whoever_shows_no_certificate_gets_a_handshake_and_nothing_more(server: GrpcServer) -> None:
    """No request of an unknown caller is read, and what it gets for its trouble is a few kilobytes at most."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="anybody")
    host, _, port = server.endpoint.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    received, sent_preface = 0, False
    try:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                if not sent_preface:
                    tls.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
                    sent_preface = True
                tls.read(1)
            writer.write(outgoing.read())
            data = await asyncio.wait_for(reader.read(65536), 5)
            received += len(data)
            if not data:
                break
            incoming.write(data)
    except (ssl.SSLError, ConnectionError):
        pass
    finally:
        writer.close()
    assert sent_preface  # TLS 1.3: a client is done before the server has looked at its certificate
    assert received < 8192
