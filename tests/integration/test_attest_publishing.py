# SPDX-License-Identifier: Apache-2.0
"""What attest publishes: token keys over HTTPS, verdicts that can be made again, and only to whom they concern."""

from __future__ import annotations

import asyncio
import json
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.verdictbundle import VerdictBundle, replay
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.credentials import CredentialSource, StaticCredentials
from fakes.attest_harness import SCRIPT, TRUST_DOMAIN, AttestProcess, attest_process, csr, user_material


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attest() -> AsyncIterator[AttestProcess]:
    async with attest_process() as process:
        yield process


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def bundle_of(attest: AttestProcess, caller: CredentialSource, number: int) -> bytes:
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=caller) as channel:
        method = attest_pb2_grpc.VerdictServiceStub(channel).GetVerdictBundle
        request = attest_pb2.GetVerdictBundleRequest(id=number)
        response: attest_pb2.GetVerdictBundleResponse = await invoke(method, request, timeout_s=10, what="get a bundle")
        return response.bundle


async def verdicts(attest: AttestProcess, caller: CredentialSource) -> list[attest_pb2.Verdict]:
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=caller) as channel:
        method = attest_pb2_grpc.VerdictServiceStub(channel).ListVerdicts
        response = await invoke(method, attest_pb2.ListVerdictsRequest(), timeout_s=10, what="list verdicts")
        return list(response.verdicts)


async def test_the_token_keys_are_served_over_https(attest: AttestProcess) -> None:
    context = ssl.create_default_context(cadata=attest.bundle.root_pem.decode())
    url = f"https://{attest.endpoints['jwks']}/.well-known/jwks.json"
    async with aiohttp.ClientSession() as client:
        async with client.get(url, ssl=context, server_hostname=f"attest.{TRUST_DOMAIN}") as answer:
            assert answer.status == 200
            assert answer.content_type == "application/jwk-set+json"
            assert json.loads(await answer.read()) == {"keys": [dict(key) for key in attest.bundle.token_keys]}
        other = url.replace("/.well-known/jwks.json", "/verdicts")
        async with client.get(other, ssl=context, server_hostname=f"attest.{TRUST_DOMAIN}") as answer:
            assert answer.status == 404
        async with client.post(url, ssl=context, server_hostname=f"attest.{TRUST_DOMAIN}") as answer:
            assert answer.status == 405
        with pytest.raises(aiohttp.ClientError):
            await client.get(url, server_hostname=f"attest.{TRUST_DOMAIN}")  # the system knows no such CA


async def test_everything_about_simulated_platforms_says_so(attest: AttestProcess) -> None:
    trainer = await attest.service(Role.TRAINER)
    assert (await trainer.attested()).ear.tee.simulated
    async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
        stub = attest_pb2_grpc.EnrolmentServiceStub(channel)
        with pytest.raises(CloisterError):  # before anything of a platform is looked at
            await invoke(stub.Attest, attest_pb2.AttestRequest(), timeout_s=10, what="enrol with nothing")
    found = await verdicts(attest, trainer)
    assert {verdict.accepted for verdict in found} == {True, False}
    assert all(verdict.simulated for verdict in found)
    await trainer.aclose()

    logged = [json.loads(line) for line in attest.log().splitlines() if line.startswith("{")]
    assert {"quotes of simulated TDs are accepted", "enrolment accepted", "enrolment refused", "rpc"} <= {
        line["event"] for line in logged
    }
    assert [line for line in logged if line["service"] == "attest" and line.get("simulated") is not True] == []
    async with aiohttp.ClientSession() as client, client.get(f"http://{attest.endpoints['metrics']}/metrics") as answer:
        assert "cloister_attest_simulated_root 1.0" in await answer.text()


async def test_a_verdict_of_a_running_attest_is_made_again_offline(attest: AttestProcess, tmp_path: Path) -> None:
    trainer = await attest.service(Role.TRAINER)
    found = next(v for v in await verdicts(attest, trainer) if v.spiffe_id.endswith("/trainer"))
    assert found.has_bundle
    data = await bundle_of(attest, trainer, found.id)
    made = await replay(VerdictBundle.parse(data))
    assert made.same, made.differences
    assert made.accepted
    await trainer.aclose()

    file = tmp_path / "verdict.json"
    file.write_bytes(data)
    root = str(attest.directory / "platform/root.pem")

    async def run(*arguments: str) -> tuple[int, dict[str, object]]:
        command = (sys.executable, "-m", "cloister.cli.main", "attest", "replay", str(file), "--json", *arguments)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        output, _ = await process.communicate()
        return process.returncode or 0, json.loads(output)

    code, document = await run("--root", root)
    assert code == 0
    assert (document["same"], document["accepted"], document["tcb_status"]) == (True, True, "UpToDate")
    assert str(document["signature"]).startswith("not verified: name the keys of attest")

    bundle_file, jwks = attest.bundle_file, tmp_path / "jwks.json"
    jwks.write_text(json.dumps({"keys": [dict(key) for key in attest.bundle.token_keys]}))
    for keys in (bundle_file, jwks):
        code, document = await run("--keys", str(keys))
        assert (code, document["signature"]) == (0, f"verified: by the key {attest.bundle.token_keys[0]['kid']}")
    jwks.write_text('{"keys": []}')
    code, document = await run("--keys", str(jwks))
    assert (code, document["exit_code"]) == (3, 3)

    file.write_bytes(json.dumps(json.loads(data) | {"signature": ""}).encode())
    code, document = await run()
    assert (code, document["signature"]) == (0, "UNSIGNED: anybody can have made this file")
    code, document = await run("--keys", str(bundle_file))
    assert code == 3

    file.write_bytes(data.replace(b'"accepted": true', b'"accepted": false', 1))
    assert file.read_bytes() != data
    code, document = await run()
    assert code != 0
    assert document["same"] is False


async def test_an_operator_revokes_and_readmits(attest: AttestProcess) -> None:
    async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
        method = attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate
        request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key))
        issued = await invoke(method, request, timeout_s=10, what="get a certificate")
    operator = StaticCredentials(user_material(attest.user_key, issued.certificate_chain_pem, attest.bundle))
    denied = {"kind": attest_pb2.DENIAL_KIND_MEASUREMENT, "value": SCRIPT.hex()}
    trainer = await attest.service(Role.TRAINER)
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=trainer) as channel:
        stub = attest_pb2_grpc.IdentityServiceStub(channel)
        with pytest.raises(CloisterError) as caught:
            await invoke(stub.Deny, attest_pb2.DenyRequest(**denied), timeout_s=10, what="revoke")
        assert caught.value.code is Code.CALLER_NOT_ALLOWED
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=operator) as channel:
        stub = attest_pb2_grpc.IdentityServiceStub(channel)
        await invoke(stub.Deny, attest_pb2.DenyRequest(**denied), timeout_s=10, what="revoke")
        with pytest.raises(CloisterError) as caught:
            await trainer.refresh()
        assert caught.value.code is Code.DENY_LISTED
        answer = await invoke(stub.Readmit, attest_pb2.ReadmitRequest(**denied), timeout_s=10, what="readmit")
        assert answer.was_denied
    await trainer.refresh()
    await trainer.aclose()


async def test_a_bundle_that_is_not_there_is_not_found(attest: AttestProcess) -> None:
    trainer = await attest.service(Role.TRAINER)
    for number, code in ((10**9, Code.VERDICT_NOT_FOUND), (0, Code.ARGUMENT_INVALID)):
        with pytest.raises(CloisterError) as caught:
            await bundle_of(attest, trainer, number)
        assert caught.value.code is code
    await trainer.aclose()
