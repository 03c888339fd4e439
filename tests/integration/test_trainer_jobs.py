# SPDX-License-Identifier: Apache-2.0
"""Jobs on a stack of real processes: two attested ranks train, and what happens when a rank or the trainer fails."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.cli.measure import job_script_path
from cloister.data.sample import generate_sample
from cloister.errors import CloisterError, Code
from cloister.train.classifier import MODEL_FILES, load_classifier
from fakes.trainer_harness import Client, Stack, client_of, living, pb, phase, running_stack, spec, wait_until

TRAINING = job_script_path().read_bytes()
TINY = "--hidden 16 --heads 2 --layers 1 --max-length 40 --epochs 2 --batch 32 --log-steps 2".split()  # noqa: SIM905

# Trains nothing: waits to be cancelled, and says so.
PATIENT = """
import time, cloister.train
job = cloister.train.context()
print("waiting", flush=True)
while not job.cancelled:
    time.sleep(0.05)
job.report("stopped", "as asked")
"""
# Does not listen, and has a child in a session of its own that does not either.
STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sleeper = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", sleeper], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack"), cancel_wait_s=1.0, term_grace_s=1.0) as found:
        yield found


@pytest.fixture
def restarted(tmp_path: Path) -> Iterator[Stack]:
    """A stack of its own: one whose trainer is killed is no place for other tests."""
    with running_stack(tmp_path / "stack") as found:
        yield found


async def started(client: Client, script: str, *, nodes: int = 1) -> pb.Job:
    """Submit a job and wait until all of its ranks run."""
    job = await client.submit(spec(script, nodes=nodes))
    await client.until(job.job_id, lambda event: event.state_changed.state == pb.JOB_STATE_RUNNING)
    return await client.job(job.job_id)


async def test_two_attested_ranks_train_a_model_that_serving_can_load(stack: Stack, tmp_path: Path) -> None:
    generate_sample(tmp_path / "sample", rows=240)
    data = await asyncio.to_thread(stack.provision, tmp_path / "sample", scripts=[TRAINING])
    out = tmp_path / "out"
    async with client_of(stack) as client:
        request = spec(TRAINING, nodes=2, args=TINY, inputs=[data.input()], output=data.output(out))
        job, events = await client.to_the_end((await client.submit(request)).job_id)
    assert (job.state, job.reason) == (pb.JOB_STATE_SUCCEEDED, "")

    # What a watcher needs: milestones of each rank with times, progress of each, accuracy of each epoch, the end.
    for rank in (0, 1):
        phases = [event.message.phase for event in events if event.rank == rank and event.HasField("message")]
        assert phases == ["measured", "enrolled", "key-released", "running", "data", "trained"]
        assert any(event.rank == rank and event.progress.samples_per_s > 0 for event in events)
    assert sum("dev_accuracy" in event.metrics.values for event in events) == 2
    assert set(job.results) == {"loss", "dev_accuracy", "test_accuracy", "test_accuracy_unseen"}
    assert 0 <= job.results["test_accuracy"] <= 1
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert (job.progress.step, job.progress.epoch) == (job.progress.steps, 2)
    assert sorted(rank.core for rank in job.ranks) == [0, 1]
    assert [event.artifact.name for event in events if event.HasField("artifact")][-1] == "model"

    # What it leaves: sealed directories and nothing else.
    assert sorted(entry.name for entry in out.iterdir()) == ["checkpoints", "model"]
    assert len(list((out / "checkpoints").iterdir())) == 2
    left = [file.read_bytes() for file in out.rglob("*") if file.is_file()]
    assert not any(b"[MASK]" in data or b"encoder.embeddings" in data for data in left)
    model = await asyncio.to_thread(stack.open, out / "model")
    predictor = load_classifier({name: model.read(name) for name in MODEL_FILES})
    assert predictor.labels == ("negative", "positive")
    assert predictor.predict(["房间很干净"])[0][0] in predictor.labels


async def test_a_killed_rank_fails_the_job_within_seconds_and_leaves_nothing(stack: Stack) -> None:
    async with client_of(stack) as client:
        job = await started(client, PATIENT, nodes=2)
        assert len(living(job)) == 2
        began = time.monotonic()
        os.kill(job.ranks[1].process_id, signal.SIGKILL)
        job, events = await client.to_the_end(job.job_id)
    assert time.monotonic() - began < 8
    assert job.state == pb.JOB_STATE_FAILED
    assert job.reason.startswith("rank 1: CLO-1506: was killed by SIGKILL")
    assert [(rank.state, rank.exit_code) for rank in job.ranks] == [("stopped", -15), ("failed", -9)]
    [failed] = [event.message.text for event in events if event.message.phase == "failed"]
    assert failed.endswith("last lines of rank 1's log:\nwaiting")
    assert living(job) == []


async def test_an_exception_of_the_script_is_the_jobs_reason_and_its_traceback_is_in_the_log(stack: Stack) -> None:
    script = "import cloister.train\njob = cloister.train.context()\nif job.rank == 1:\n    raise ValueError('row 7')\n"
    script += "import time; time.sleep(60)"
    async with client_of(stack) as client:
        job, events = await client.to_the_end((await client.submit(spec(script, nodes=2))).job_id)
        logs = await client.logs(job.job_id, 1)
    assert job.reason == "rank 1: CLO-1506: the script failed at line 4: ValueError: row 7"
    assert (1, '  File "tests.py", line 4, in <module>') in logs
    assert all(rank == 1 for rank, _ in logs)
    assert any(phase("failed", 1)(event) and "ValueError: row 7" in event.message.text for event in events)


async def test_ranks_that_only_lost_a_peer_are_not_blamed(stack: Stack) -> None:
    script = """
import os, signal, torch, torch.distributed as dist, cloister.train
job = cloister.train.context()
job.init_process_group()
dist.all_reduce(torch.ones(1))
if job.rank == 0:
    os.kill(os.getpid(), signal.SIGKILL)
dist.all_reduce(torch.ones(1))
"""
    async with client_of(stack) as client:
        job, _ = await client.to_the_end((await client.submit(spec(script, nodes=2))).job_id)
    assert job.reason.startswith("rank 0: CLO-1506: was killed by SIGKILL")


async def test_a_cancelled_job_stops_by_itself_when_its_script_listens(stack: Stack) -> None:
    async with client_of(stack) as client:
        job = await started(client, PATIENT)
        await client.cancel(job.job_id)
        job, events = await client.to_the_end(job.job_id)
        assert (job.state, job.reason) == (pb.JOB_STATE_CANCELLED, "cancelled by its owner")
        assert any(phase("stopped")(event) for event in events)
        assert job.ranks[0].exit_code == 0
        with pytest.raises(CloisterError) as caught:
            await client.cancel(job.job_id)
    assert caught.value.code is Code.JOB_ENDED


async def test_a_cancelled_job_that_does_not_listen_is_killed_with_everything_it_started(stack: Stack) -> None:
    async with client_of(stack) as client:
        job = await started(client, STUBBORN)
        wait_until(lambda: "child" in log_of(stack, job.job_id))
        child = int(log_of(stack, job.job_id).split()[1])
        await client.cancel(job.job_id)
        job, _ = await client.to_the_end(job.job_id)
    assert job.state == pb.JOB_STATE_CANCELLED
    assert job.ranks[0].exit_code == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{child}").exists(), timeout_s=5)


async def test_jobs_wait_for_free_cores_and_a_queued_one_is_cancelled_at_once(stack: Stack) -> None:
    async with client_of(stack) as client:
        first = await started(client, PATIENT, nodes=2)
        waiting = await client.submit(spec("print('ran')"))
        other = await client.submit(spec("print('ran')"))
        assert (await client.cancel(other.job_id)).state == pb.JOB_STATE_CANCELLED
        assert (await client.job(waiting.job_id)).state == pb.JOB_STATE_QUEUED
        await client.cancel(first.job_id)
        done, _ = await client.to_the_end(waiting.job_id)
    assert done.state == pb.JOB_STATE_SUCCEEDED
    assert done.started_unix_ms >= (await client_end(stack, first.job_id))


async def test_more_ranks_than_cores_are_refused_when_submitted(stack: Stack) -> None:
    async with client_of(stack) as client:
        for request in (spec("x", nodes=3), spec("x", nodes=1, cores=[9])):
            with pytest.raises(CloisterError) as caught:
                await client.submit(request)
            assert caught.value.code is Code.CORES_INSUFFICIENT


async def test_a_repeated_submit_gives_the_first_ones_job(stack: Stack) -> None:
    async with client_of(stack) as client:
        first = await client.submit(spec("print(1)"), "request-1")
        again = await client.submit(spec("print(2)"), "request-1")
        assert again.job_id == first.job_id
        assert (await client.submit(spec("print(1)"), "request-2")).job_id != first.job_id


async def test_watching_resumes_behind_a_sequence_without_gap_or_repeat(stack: Stack) -> None:
    async with client_of(stack) as client:
        job_id = (await client.submit(spec("print(1)"))).job_id
        _, events = await client.to_the_end(job_id)
        half = len(events) // 2
        assert [event async for event in client.watch(job_id, half)] == events[half:]
        assert [event async for event in client.watch(job_id, len(events))] == []


async def test_logs_are_followed_to_the_end_of_the_job(stack: Stack) -> None:
    script = "import time\nfor i in range(8):\n    print('line', i, flush=True)\n    time.sleep(0.05)"
    async with client_of(stack) as client:
        job = await client.submit(spec(script, nodes=2))
        logs = await client.logs(job.job_id, follow=True)
        for rank in (0, 1):
            assert [line for number, line in logs if number == rank] == [f"line {i}" for i in range(8)]
        with pytest.raises(CloisterError, match="no rank 2"):
            await client.logs(job.job_id, 2)


async def test_ranks_get_none_of_the_trainers_environment_and_their_own_core(stack: Stack) -> None:
    script = "import os\nprint(sorted(os.environ), os.sched_getaffinity(0), os.getcwd(), os.environ['HF_HUB_OFFLINE'])"
    async with client_of(stack) as client:
        job, _ = await client.to_the_end((await client.submit(spec(script, cores=[1]))).job_id)
        [(_, line)] = await client.logs(job.job_id)
    assert "PYTEST" not in line
    assert "{1}" in line
    assert line.endswith(f"{job.job_id} 1")


async def test_a_killed_trainer_takes_its_ranks_along_and_its_successor_says_what_happened(
    restarted: Stack,
) -> None:
    async with client_of(restarted) as client:
        job = await started(client, PATIENT, nodes=2)
        waiting = await client.submit(spec("print('ran')"))
    assert len(living(job)) == 2
    await asyncio.to_thread(restarted.stop_service, "trainer", signal.SIGKILL)
    wait_until(lambda: living(job) == [], timeout_s=5)
    await asyncio.to_thread(restarted.start_service, "trainer")
    async with client_of(restarted) as client:
        failed, events = await client.to_the_end(job.job_id)
        done, _ = await client.to_the_end(waiting.job_id)
    assert failed.state == pb.JOB_STATE_FAILED
    assert "the trainer was restarted while the job ran" in failed.reason
    assert events[-1].state_changed.reason == failed.reason
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert done.state == pb.JOB_STATE_SUCCEEDED


async def client_end(stack: Stack, job_id: str) -> int:
    async with client_of(stack) as client:
        return (await client.job(job_id)).ended_unix_ms


def log_of(stack: Stack, job_id: str, rank: int = 0) -> str:
    return (stack.directory / "trainer" / "jobs" / job_id / f"rank-{rank}.log").read_text()
