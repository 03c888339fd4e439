# SPDX-License-Identifier: Apache-2.0
"""`cloister measure` says before a workload runs what its registers will be: compared with quotes of those that ran."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.guest.verdictbundle import VerdictBundle
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from cloister.tdx.quote import Quote
from fakes.trainer_harness import TENANT, Stack, client_of, pb, running_stack, spec

SCRIPT = b"import cloister.train\nprint(cloister.train.context().rank, flush=True)\n"
SEED = 7


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as found:
        yield found


async def quoted(stack: Stack, suffix: str) -> VerdictBundle:
    """Return the newest verdict on an identity that ends so, with the evidence that it was made from."""
    credentials = await asyncio.to_thread(stack.user)
    async with open_channel(stack.endpoint("attest"), role=Role.ATTEST, credentials=credentials) as channel:
        stub = attest_pb2_grpc.VerdictServiceStub(channel)
        request = attest_pb2.ListVerdictsRequest(limit=100)
        found = (await invoke(stub.ListVerdicts, request, timeout_s=10, what="list")).verdicts
        number = next(verdict.id for verdict in found if verdict.spiffe_id.endswith(suffix))
        answer = await invoke(
            stub.GetVerdictBundle, attest_pb2.GetVerdictBundleRequest(id=number), timeout_s=10, what="get"
        )
    return VerdictBundle.parse(answer.bundle)


def rtmrs(bundle: VerdictBundle) -> list[str]:
    quote = Quote.parse(bundle.evidence.quote)
    return [register.hex() for register in quote.body.rtmrs]


async def measure(*arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "cloister.cli.main", "measure", "--json", *map(str, arguments)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    document: dict[str, Any] = json.loads(output)
    return document


async def test_the_registers_of_each_rank_are_known_before_it_runs(stack: Stack, tmp_path: Path) -> None:
    script, source = tmp_path / "script.py", tmp_path / "plain"
    script.write_bytes(SCRIPT)
    source.mkdir()
    (source / "rows.txt").write_text("rows")
    data = await asyncio.to_thread(stack.provision, source, scripts=[SCRIPT])
    boot_log = tmp_path / "boot.json"
    boot_log.write_bytes((await quoted(stack, "/service/trainer")).evidence.event_log)

    async with client_of(stack) as client:
        request = spec(SCRIPT, nodes=2, args=("--epochs", "3"), inputs=[data.input()])
        request.seed = SEED
        job = await client.submit(request)
        where = ["--role", "rank", "--tenant", TENANT, "--job", job.job_id, "--nodes", 2, "--seed", SEED]
        where += ["--trust-bundle", stack.directory / "bundle.json", "--input", f"data={data.directory}"]
        expected = [
            await measure(script, *where, "--rank", rank, "--boot-log", boot_log, "--", "--epochs", "3")
            for rank in (0, 1)
        ]
        ended, _ = await client.to_the_end(job.job_id)
    assert ended.state == pb.JOB_STATE_SUCCEEDED, ended.reason

    for rank in (0, 1):
        ran = await quoted(stack, f"/job/{job.job_id}/rank/{rank}")
        assert [expected[rank][f"rtmr{number}"] for number in range(4)] == rtmrs(ran)
        logged = [event for event in json.loads(ran.evidence.event_log) if event["imr"] == 3]
        assert [event["digest"] for event in expected[rank]["events"]] == [event["digest"] for event in logged]

    # Every part counts: none can be another and give the same register.
    for change in (
        ["--rank", 1],
        ["--job", "another"],
        ["--tenant", "another"],
        ["--nodes", 3],
        ["--seed", 8],
        ["--output-key", "cloister-key://lab/x"],
        ["--environment", f"sha384:{'00' * 48}"],
    ):
        other = await measure(script, *where, "--rank", 0, *change, "--", "--epochs", "3")
        assert other["rtmr3"] != expected[0]["rtmr3"], change
    for arguments in (
        [script, *where, "--rank", 0, "--", "--epochs", "4"],
        [*where, "--rank", 0, "--", "--epochs", "3"],
    ):
        assert (await measure(*arguments))["rtmr3"] != expected[0]["rtmr3"]


@pytest.mark.parametrize("role", ["attest", "keybroker", "trainer"])
async def test_the_registers_of_a_service_follow_from_its_configuration(stack: Stack, role: str) -> None:
    ran = await quoted(stack, f"/service/{role}")
    arguments = ["--role", role, "--trust-bundle", stack.directory / "bundle.json"]
    expected = await measure(*arguments, "--config", stack.directory / f"{role}.toml")
    assert expected["rtmr3"] == rtmrs(ran)[3]
    assert "rtmr0" not in expected
    other = stack.directory / f"{role}-other.toml"
    other.write_text((stack.directory / f"{role}.toml").read_text() + "# a remark\n")
    assert (await measure(*arguments, "--config", other))["rtmr3"] != expected["rtmr3"]
