# SPDX-License-Identifier: Apache-2.0
"""An operator who swaps scripts and data, a rank of another job, a user of another tenant: none gets anywhere."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloister.api.trainer.v1 import trainer_pb2_grpc as pb_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister_trainer.rendezvous import RendezvousLimits
from fakes.trainer_harness import (
    OTHER_TENANT,
    Client,
    Stack,
    client_of,
    enrol_as_rank,
    pb,
    phase,
    running_stack,
    spec,
)

PATIENT = "import time, cloister.train\njob = cloister.train.context()\nwhile not job.cancelled: time.sleep(0.05)"
READER = "import cloister.train\nprint(cloister.train.context().input('data').read('secret.txt'))"
PLAINTEXT = b"the patient's name is Wang"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), cancel_wait_s=1.0) as found:
        yield found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "secret.txt").write_bytes(PLAINTEXT)
    return tmp_path / "source"


@asynccontextmanager
async def running_job(stack: Stack) -> AsyncIterator[tuple[Client, pb.Job]]:
    """A job that runs until the block ends."""
    async with client_of(stack) as client:
        job_id = (await client.submit(spec(PATIENT))).job_id
        await client.until(job_id, phase("running"))
        job = await client.job(job_id)
        try:
            yield client, job
        finally:
            if (await client.job(job_id)).state == pb.JOB_STATE_RUNNING:
                await client.cancel(job_id)
            await client.to_the_end(job_id)


async def call(stack: Stack, credentials: Any, stub: Any, method: str, request: Any) -> Any:
    async with open_channel(stack.endpoint("trainer"), role=Role.TRAINER, credentials=credentials) as channel:
        return await invoke(getattr(stub(channel), method), request, timeout_s=5, what=f"call {method}")


async def refused(code: Code, work: Any) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await work
    assert caught.value.code is code, caught.value
    return caught.value


# --- an operator who swaps what a job reads or runs


async def test_data_that_was_swapped_after_the_submission_is_refused(stack: Stack, source: Path) -> None:
    data = await asyncio.to_thread(stack.provision, source, scripts=[READER.encode()])
    async with client_of(stack) as client:
        request = spec(READER, inputs=[data.input()])
        job, _ = await client.to_the_end((await client.submit(request)).job_id)
        assert job.state == pb.JOB_STATE_SUCCEEDED, job.reason
        # An authentic directory under the same key, but another than the owner named.
        opened = await asyncio.to_thread(stack.open_key, data)
        other = source.parent / "other"
        seal_directory(source, other, data_key=opened, dataset="older version")
        request.inputs[0].uri = other.as_uri()
        job, events = await client.to_the_end((await client.submit(request)).job_id)
    assert job.state == pb.JOB_STATE_FAILED
    assert job.reason.startswith("rank 0: CLO-1403: input data is not what the job was submitted with")
    assert not any(phase("enrolled")(event) for event in events)


async def test_a_submission_that_names_the_swapped_data_does_not_get_the_owners_key(stack: Stack, source: Path) -> None:
    data = await asyncio.to_thread(stack.provision, source, scripts=[READER.encode()])
    (data.directory / "secret.txt.sealed").write_bytes(b"\0" * 200)
    async with client_of(stack) as client:
        job, _ = await client.to_the_end((await client.submit(spec(READER, inputs=[data.input()]))).job_id)
    assert job.state == pb.JOB_STATE_FAILED
    assert "CLO-14" in job.reason


async def test_a_script_that_the_keys_policy_does_not_name_gets_no_key(stack: Stack, source: Path) -> None:
    data = await asyncio.to_thread(stack.provision, source, scripts=[READER.encode()])
    thief = READER + "\nprint('and send it home')"
    async with client_of(stack) as client:
        job, events = await client.to_the_end((await client.submit(spec(thief, inputs=[data.input()]))).job_id)
        logs = await client.logs(job.job_id)
    assert job.reason.startswith("rank 0: CLO-1304:")
    assert "script" in job.reason
    assert any(phase("enrolled")(event) for event in events)
    assert not any(phase("running")(event) for event in events)
    assert PLAINTEXT.decode() not in str(logs)


async def test_a_rank_whose_script_was_swapped_on_disk_gets_no_identity(stack: Stack, tmp_path: Path) -> None:
    async with running_job(stack) as (_, job):
        told = json.loads((stack.directory / "trainer" / "jobs" / job.job_id / "rank-0.json").read_bytes())
        (tmp_path / "script.py").write_bytes(b"print('not what was submitted')")
        told |= {"script_file": str(tmp_path / "script.py"), "failure_file": str(tmp_path / "failure.json")}
        done = await asyncio.to_thread(run_rank, tmp_path, told)
        assert done.returncode == 70
        assert "not what was submitted" not in done.stdout
        failure = json.loads((tmp_path / "failure.json").read_bytes())
    assert failure["code"] == "CLO-1207"
    assert "script" in failure["why"]


@pytest.mark.parametrize("change", [{"args": ["--steal"]}, {"seed": 8}, {"world_size": 2}, {"rank": 1}])
async def test_a_rank_that_is_told_another_configuration_gets_no_identity(
    stack: Stack, tmp_path: Path, change: dict[str, Any]
) -> None:
    async with running_job(stack) as (_, job):
        told = json.loads((stack.directory / "trainer" / "jobs" / job.job_id / "rank-0.json").read_bytes())
        told |= {"failure_file": str(tmp_path / "failure.json"), **change}
        done = await asyncio.to_thread(run_rank, tmp_path, told)
        assert done.returncode == 70
        failure = json.loads((tmp_path / "failure.json").read_bytes())
    # A rank beyond the world is refused before it is measured, all others by attest.
    assert failure["code"] in ("CLO-1207", "CLO-1204", "CLO-1002")


def run_rank(directory: Path, told: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Start a rank as an operator would who does not use our coordinator."""
    (directory / "spec.json").write_text(json.dumps(told))
    read, write = os.pipe()
    try:
        return subprocess.run(
            [
                *(sys.executable, "-m", "cloister_trainer.rank"),
                *("--spec", str(directory / "spec.json"), "--lifeline-fd", str(read)),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
            pass_fds=[read],
        )
    finally:
        os.close(write)
        os.close(read)


# --- a rank of another job


async def test_a_rank_reaches_the_key_space_of_its_own_job_and_no_other(stack: Stack) -> None:
    async with running_job(stack) as (_, first):
        one = await enrol_as_rank(stack, first)
        async with client_of(stack) as client:
            second = (await client.submit(spec(PATIENT + "\n#", cores=[1]))).job_id
            await client.until(second, phase("running"))
            two = await enrol_as_rank(stack, await client.job(second))
            try:
                await rendezvous(stack, one, "Set", pb.SetRequest(key="addr/0", value=b"one"))
                assert (await rendezvous(stack, one, "Check", pb.CheckRequest(keys=["addr/0"]))).present
                assert not (await rendezvous(stack, two, "Check", pb.CheckRequest(keys=["addr/0"]))).present
                deleted = await rendezvous(stack, two, "DeleteKey", pb.DeleteKeyRequest(key="addr/0"))
                assert not deleted.deleted
                assert (await rendezvous(stack, one, "Get", pb.GetRequest(key="addr/0"))).value == b"one"
            finally:
                await client.cancel(second)
                await client.to_the_end(second)
        # Its job has ended: the certificate still lives, and opens nothing any more.
        await refused(Code.JOB_ENDED, rendezvous(stack, two, "Set", pb.SetRequest(key="k", value=b"v")))
        await refused(Code.JOB_ENDED, report(stack, two, pb.ReportEventRequest()))
        for identity in (one, two):
            await identity.aclose()


async def test_a_rank_of_another_tenant_or_number_gets_no_identity(stack: Stack) -> None:
    async with running_job(stack) as (_, job):
        await refused(Code.WORKLOAD_NOT_REGISTERED, enrol_as_rank(stack, job, tenant=OTHER_TENANT))
        await refused(Code.WORKLOAD_NOT_REGISTERED, enrol_as_rank(stack, job, rank=1, world_size=2))
        await refused(Code.WORKLOAD_NOT_REGISTERED, enrol_as_rank(stack, job, script=b"print('mine')"))
        ended = pb.Job(job_id="never-submitted", spec=job.spec)
        await refused(Code.WORKLOAD_NOT_REGISTERED, enrol_as_rank(stack, ended))


async def test_oversize_values_and_floods_are_refused_and_the_job_goes_on(stack: Stack) -> None:
    limits = RendezvousLimits()
    async with running_job(stack) as (client, job):
        rank = await enrol_as_rank(stack, job)
        large = pb.SetRequest(key="k", value=b"x" * (limits.max_value_bytes + 1))
        await refused(Code.ARGUMENT_INVALID, rendezvous(stack, rank, "Set", large))
        long = pb.SetRequest(key="k" * (limits.max_key_bytes + 1), value=b"")
        await refused(Code.ARGUMENT_INVALID, rendezvous(stack, rank, "Set", long))
        many = pb.WaitRequest(keys=[f"k{i}" for i in range(limits.max_keys_per_call + 1)])
        await refused(Code.ARGUMENT_INVALID, rendezvous(stack, rank, "Wait", many))
        huge = pb.SetRequest(key="k", value=b"x" * (5 * 1024 * 1024))
        await refused(Code.MESSAGE_TOO_LARGE, rendezvous(stack, rank, "Set", huge))
        figures = pb.MetricsLogged(values={f"figure-{i}": 1.0 for i in range(100)}, final=True)
        await refused(Code.ARGUMENT_INVALID, report(stack, rank, pb.ReportEventRequest(metrics=figures)))
        artifact = pb.ArtifactWritten(name="model", uri="file:///x", manifest_digest=b"short")
        await refused(Code.ARGUMENT_INVALID, report(stack, rank, pb.ReportEventRequest(artifact=artifact)))
        # Long text is cut, not refused: it may be the reason of a failure.
        await report(stack, rank, pb.ReportEventRequest(message=pb.RankMessage(phase="x" * 500, text="y" * 100_000)))
        [event] = [e async for e in first_of(client, job.job_id, "x" * 64)]
        assert len(event.message.text) == 8000
        assert (await client.job(job.job_id)).state == pb.JOB_STATE_RUNNING
        await rank.aclose()


async def first_of(client: Client, job_id: str, wanted: str) -> AsyncIterator[pb.Event]:
    yield await client.until(job_id, phase(wanted))


async def rendezvous(stack: Stack, rank: Identity, method: str, request: Any) -> Any:
    return await call(stack, rank, pb_grpc.RendezvousServiceStub, method, request)


async def report(stack: Stack, rank: Identity, request: pb.ReportEventRequest) -> Any:
    return await call(stack, rank, pb_grpc.RankServiceStub, "ReportEvent", request)


# --- roles and tenants


async def test_a_user_of_another_tenant_sees_and_stops_nothing(stack: Stack) -> None:
    async with running_job(stack) as (client, job), client_of(stack, OTHER_TENANT) as stranger:
        await refused(Code.JOB_NOT_FOUND, stranger.job(job.job_id))
        await refused(Code.JOB_NOT_FOUND, stranger.cancel(job.job_id))
        await refused(Code.JOB_NOT_FOUND, stranger.logs(job.job_id))
        await refused(Code.JOB_NOT_FOUND, anext(stranger.watch(job.job_id)))
        theirs = await invoke(stranger.stub.ListJobs, pb.ListJobsRequest(), timeout_s=5, what="list")
        assert list(theirs.jobs) == []
        assert (await client.job(job.job_id)).state == pb.JOB_STATE_RUNNING


async def test_users_are_no_ranks_and_ranks_are_no_users(stack: Stack) -> None:
    async with running_job(stack) as (_, job):
        user, rank = await asyncio.to_thread(stack.user), await enrol_as_rank(stack, job)
        await refused(
            Code.CALLER_NOT_ALLOWED,
            call(stack, user, pb_grpc.RankServiceStub, "ReportEvent", pb.ReportEventRequest()),
        )
        await refused(
            Code.CALLER_NOT_ALLOWED,
            call(stack, user, pb_grpc.RendezvousServiceStub, "Set", pb.SetRequest(key="k")),
        )
        for method, request in (
            ("GetJob", pb.GetJobRequest(job_id=job.job_id)),
            ("SubmitJob", pb.SubmitJobRequest(spec=spec("x"))),
            ("CancelJob", pb.CancelJobRequest(job_id=job.job_id)),
        ):
            await refused(Code.CALLER_NOT_ALLOWED, call(stack, rank, pb_grpc.TrainerServiceStub, method, request))
        await rank.aclose()


async def test_what_a_rank_is_told_and_writes_down_holds_no_secret(stack: Stack, source: Path) -> None:
    data = await asyncio.to_thread(stack.provision, source, scripts=[READER.encode()])
    async with client_of(stack) as client:
        job, _ = await client.to_the_end((await client.submit(spec(READER, inputs=[data.input()]))).job_id)
    key = await asyncio.to_thread(stack.open_key, data)
    written = {file: file.read_bytes() for file in (stack.directory / "trainer").rglob("*") if file.is_file()}
    assert {file.name for file in written if file.parent.name == job.job_id} >= {"script.py", "rank-0.json"}
    for name, content in written.items():
        assert key.secret.reveal() not in content, name
        assert key.secret.reveal().hex().encode() not in content, name
        assert b"PRIVATE KEY" not in content, name
    assert SealedDirectory.peek(data.directory).manifest_digest == data.digest
