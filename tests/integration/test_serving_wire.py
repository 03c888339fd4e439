# SPDX-License-Identifier: Apache-2.0
"""gRPC and HTTPS of the gateway over mutual TLS: who gets in, what they see, and how errors read."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import StaticCredentials, TlsMaterial, load_own_chain
from cloister.runtime.server import GrpcServer
from cloister_serving.https import MAX_BODY, HttpsServer
from cloister_serving.service import CALLERS, mounted
from fakes.certs import TRUST_DOMAIN, TestCa
from fakes.serving_gateway import StartedGateway, archive_bytes, running_gateway

ALICE = SpiffeId.of_user(TRUST_DOMAIN, tenant="hospital-a", user="alice")
MALLORY = SpiffeId.of_user(TRUST_DOMAIN, tenant="hospital-b", user="mallory")


@dataclass
class Served:
    started: StartedGateway
    ca: TestCa
    grpc: str
    https: str

    def material(self, who: SpiffeId | Role, **changes: Any) -> TlsMaterial:
        return self.ca.material(who, **changes)

    async def http(
        self, method: str, path: str, *, who: TlsMaterial | None, body: Any = None, **headers: str
    ) -> tuple[int, Any, Any]:
        """Status, JSON and headers of one request."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.load_verify_locations(cadata=self.ca.bundle.intermediate(Role.GATEWAY).decode())
        if who is not None:
            load_own_chain(context, who)
        url = f"https://{self.https}{path}"
        name = SpiffeId.service(TRUST_DOMAIN, Role.GATEWAY).dns_name
        async with aiohttp.ClientSession() as session:
            request = session.request(method, url, data=body, headers=headers, ssl=context, server_hostname=name)
            async with request as answer:
                return answer.status, await answer.json(), answer.headers

    async def post(self, texts: list[str], *, who: TlsMaterial | None, model: str = "reviews") -> tuple[int, Any, Any]:
        headers = {"Content-Type": "application/json"}
        return await self.http("POST", f"/predictions/{model}", who=who, body=json.dumps({"texts": texts}), **headers)

    async def call(self, who: TlsMaterial, service: str, method: str, request: Any, timeout_s: float = 30) -> Any:
        stub = getattr(serving_pb2_grpc, f"{service}Stub")
        async with open_channel(self.grpc, role=Role.GATEWAY, credentials=StaticCredentials(who)) as channel:
            return await invoke(getattr(stub(channel), method), request, timeout_s=timeout_s, what="ask the gateway")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    ca = TestCa()
    async with running_gateway(tmp_path) as started:
        credentials = ca.credentials(Role.GATEWAY)
        grpc = GrpcServer(
            section="127.0.0.1:0", credentials=credentials, services=mounted(started.gateway), callers=CALLERS
        )
        https = HttpsServer(started.gateway, listen="127.0.0.1:0", credentials=credentials)
        await grpc.start()
        await https.start()
        yield Served(started, ca, grpc.endpoint, https.endpoint)
        await https.stop()
        await grpc.drain(0)


async def test_upload_deploy_predict_list_and_remove_over_grpc(served: Served) -> None:
    alice, data = served.material(ALICE), archive_bytes()

    async def upload() -> AsyncIterator[serving_pb2.UploadArchiveRequest]:
        for start in range(0, len(data), 1000):
            yield serving_pb2.UploadArchiveRequest(chunk=data[start : start + 1000])

    uploaded = await served.call(alice, "ModelService", "UploadArchive", upload())
    request = serving_pb2.DeployModelRequest(name="reviews", archive_digest=uploaded.archive_digest)
    deployed = (await served.call(alice, "ModelService", "DeployModel", request, 60)).model
    assert (deployed.state, deployed.owner, list(deployed.cores)) == (serving_pb2.MODEL_STATE_READY, str(ALICE), [1])
    assert deployed.backend_process_id == served.started.backends[0].process_id
    answer = await served.call(
        alice, "InferenceService", "Predict", serving_pb2.PredictRequest(model="reviews", texts=["很好"])
    )
    assert (answer.model, answer.archive_digest) == ("reviews", uploaded.archive_digest)
    assert [(one.label, one.probability) for one in answer.predictions] == [("short", 0.75)]
    listed = await served.call(alice, "ModelService", "ListModels", serving_pb2.ListModelsRequest())
    assert [model.name for model in listed.models] == ["reviews"]
    await served.call(alice, "ModelService", "RemoveModel", serving_pb2.RemoveModelRequest(name="reviews"))
    assert served.started.gateway.list("hospital-a") == []


async def refusal(served: Served, who: TlsMaterial, service: str, method: str, request: Any) -> Code:
    with pytest.raises(CloisterError) as caught:
        await served.call(who, service, method, request)
    return caught.value.code


async def test_another_tenants_user_sees_and_changes_nothing_over_grpc(served: Served) -> None:
    await served.started.deploy()
    mallory = served.material(MALLORY)
    predict = serving_pb2.PredictRequest(model="reviews", texts=["a"])
    remove = serving_pb2.RemoveModelRequest(name="reviews")
    assert await refusal(served, mallory, "InferenceService", "Predict", predict) is Code.MODEL_NOT_FOUND
    assert await refusal(served, mallory, "ModelService", "RemoveModel", remove) is Code.MODEL_NOT_FOUND
    listed = await served.call(mallory, "ModelService", "ListModels", serving_pb2.ListModelsRequest())
    assert list(listed.models) == []


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.USER])
async def test_only_users_may_call_over_grpc(served: Served, role: Role) -> None:
    request = serving_pb2.PredictRequest(model="reviews", texts=["a"])
    code = await refusal(served, served.material(role), "InferenceService", "Predict", request)
    assert code is Code.CALLER_NOT_ALLOWED


async def test_a_deadline_that_passes_is_an_error_and_the_model_answers_the_next(served: Served) -> None:
    await served.started.deploy()
    fifo = served.started.directory / "fifo"
    os.mkfifo(fifo)
    alice = served.material(ALICE)
    request = serving_pb2.PredictRequest(model="reviews", texts=[f"wait:{fifo}"])
    with pytest.raises(CloisterError) as caught:
        await served.call(alice, "InferenceService", "Predict", request, timeout_s=0.3)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    while not Path(f"{fifo}.started").exists():
        await asyncio.sleep(0.01)
    fifo.write_text("")
    assert (await served.post(["a"], who=alice))[0] == 200


async def test_a_queued_request_whose_client_leaves_is_not_run(served: Served) -> None:
    await served.started.deploy()
    alice = served.material(ALICE)
    first, second = served.started.directory / "first", served.started.directory / "second"
    os.mkfifo(first)
    os.mkfifo(second)
    running = asyncio.create_task(served.post([f"wait:{first}"], who=alice))
    while not Path(f"{first}.started").exists():
        await asyncio.sleep(0.01)
    leaving = asyncio.create_task(served.post([f"wait:{second}"], who=alice))
    worker = served.started.backends[0].worker
    assert worker is not None
    while worker.queued < 2:
        await asyncio.sleep(0.01)
    leaving.cancel()
    async with asyncio.timeout(5):
        while worker.queued > 1:
            await asyncio.sleep(0.01)
    first.write_text("")
    assert (await running)[0] == 200
    assert (await served.post(["a"], who=alice))[0] == 200
    assert not Path(f"{second}.started").exists()


async def test_https_answers_json_and_plain_text(served: Served) -> None:
    await served.started.deploy()
    alice = served.material(ALICE)
    status, document, headers = await served.post(["很好", "a long text indeed"], who=alice)
    assert status == 200
    assert document["predictions"] == [{"label": "short", "probability": 0.75}, {"label": "long", "probability": 0.75}]
    assert document["archive"].startswith("sha384:")
    assert len(headers["X-Request-Id"]) >= 8
    plain = {"Content-Type": "text/plain; charset=utf-8", "X-Request-Id": "chosen-by-client"}
    status, document, headers = await served.http(
        "POST", "/predictions/reviews", who=alice, body="很好".encode(), **plain
    )
    assert (status, len(document["predictions"]), headers["X-Request-Id"]) == (200, 1, "chosen-by-client")
    body, kind = json.dumps({"instances": ["a"]}), {"Content-Type": "application/json"}
    status, _, _ = await served.http("POST", "/v1/models/reviews:predict", who=alice, body=body, **kind)
    assert status == 200


async def test_https_without_a_certificate_gets_no_connection(served: Served) -> None:
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await served.post(["a"], who=None)


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.RANK, Role.BACKEND])
async def test_https_with_a_certificate_that_is_no_users_gets_no_connection(served: Served, role: Role) -> None:
    with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
        await served.post(["a"], who=served.material(role))


async def test_https_with_an_expired_or_foreign_certificate_gets_no_connection(served: Served) -> None:
    expired = served.material(ALICE, life=timedelta(minutes=-1))
    foreign = TestCa(epoch="foreign").material(ALICE)
    for who in (expired, foreign):
        with pytest.raises((aiohttp.ClientError, ssl.SSLError, ConnectionError)):
            await served.post(["a"], who=who)


async def test_https_with_two_identities_in_one_certificate_is_nobody(served: Served) -> None:
    status, document, _ = await served.post(["a"], who=served.material(ALICE, uris=[str(ALICE), str(MALLORY)]))
    assert (status, document["error"]["code"]) == (403, Code.CALLER_UNKNOWN.text)


async def test_another_tenants_user_finds_nothing_over_https(served: Served) -> None:
    await served.started.deploy()
    mallory = served.material(MALLORY)
    status, document, _ = await served.post(["a"], who=mallory)
    assert (status, document["error"]["code"]) == (404, Code.MODEL_NOT_FOUND.text)
    assert (await served.http("GET", "/models", who=mallory))[1] == {"models": []}


@pytest.mark.parametrize(
    ("path", "kind", "body", "status", "code"),
    [
        ("/predictions/reviews", "application/json", b"{", 400, Code.ARGUMENT_INVALID),
        ("/predictions/reviews", "application/x-www-form-urlencoded", b"a=b", 400, Code.ARGUMENT_INVALID),
        ("/predictions/reviews", "text/plain", b"\xff", 400, Code.ARGUMENT_INVALID),
        ("/predictions/reviews", "text/plain", b"x" * (MAX_BODY + 1), 413, Code.MESSAGE_TOO_LARGE),
        ("/predictions/absent", "text/plain", b"x", 404, Code.MODEL_NOT_FOUND),
        ("/predictions/..%2Fx", "text/plain", b"x", 404, Code.MODEL_NOT_FOUND),
        ("/elsewhere", "text/plain", b"x", 404, Code.MODEL_NOT_FOUND),
    ],
)
async def test_https_errors_are_json_with_what_why_and_todo(
    served: Served, path: str, kind: str, body: bytes, status: int, code: Code
) -> None:
    got, document, headers = await served.http(
        "POST", path, who=served.material(ALICE), body=body, **{"Content-Type": kind}
    )
    error = document["error"]
    assert (got, error["code"]) == (status, code.text)
    assert error["what"]
    assert error["todo"]
    assert error["request_id"] == headers["X-Request-Id"]


async def test_https_tells_a_bad_request_from_a_handler_that_failed(served: Served) -> None:
    await served.started.deploy()
    alice = served.material(ALICE)
    status, document, _ = await served.post([], who=alice)
    assert (status, document["error"]["code"]) == (400, Code.ARGUMENT_INVALID.text)
    status, document, _ = await served.post(["raise"], who=alice)
    assert (status, document["error"]["code"]) == (500, Code.PREDICTION_FAILED.text)
    assert "secret" not in json.dumps(document)
    assert (await served.post(["a"], who=alice))[0] == 200


async def test_ping_is_truthful(served: Served) -> None:
    alice = served.material(ALICE)
    assert (await served.http("GET", "/ping", who=alice))[:2] == (
        200,
        {"status": "Healthy", "models": {"loading": 0, "ready": 0, "failed": 0}},
    )
    await served.started.deploy()
    assert (await served.http("GET", "/ping", who=alice))[0] == 200
    os.kill(served.started.backends[0].process_id, signal.SIGKILL)
    async with asyncio.timeout(5):
        while (await served.http("GET", "/ping", who=alice))[0] == 200:
            pass
    status, document, headers = await served.post(["a"], who=alice)
    assert (status, document["error"]["code"]) == (503, Code.BACKEND_DOWN.text)
    assert headers["Retry-After"] == "1"
    assert (await served.http("GET", "/ping", who=served.material(MALLORY)))[0] == 200


async def test_a_port_in_use_is_named(served: Served) -> None:
    second = HttpsServer(served.started.gateway, listen=served.https, credentials=served.ca.credentials(Role.GATEWAY))
    with pytest.raises(CloisterError) as caught:
        await second.start()
    assert caught.value.code is Code.PORT_TAKEN
    assert served.https in caught.value.what
