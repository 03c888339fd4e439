# SPDX-License-Identifier: Apache-2.0
"""The built-in script on what goes wrong with its data and output, and a resumed job's weights, bit for bit."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.cli.measure import job_script_path
from cloister.data.sample import generate_sample
from fakes.trainer_harness import Provisioned, Stack, client_of, pb, phase, running_stack, spec

TRAINING = job_script_path().read_bytes()
TINY = "--hidden 16 --heads 2 --layers 1 --max-length 40 --epochs 2 --batch 32".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as found:
        yield found


@pytest.fixture(scope="module")
def sample(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Provisioned:
    source = tmp_path_factory.mktemp("source") / "sample"
    generate_sample(source, rows=240)
    return stack.provision(source, scripts=[TRAINING])


async def train(
    stack: Stack, data: Provisioned, out: Path, *more: str, nodes: int = 2
) -> tuple[pb.Job, list[pb.Event]]:
    async with client_of(stack) as client:
        request = spec(TRAINING, nodes=nodes, args=[*TINY, *more], inputs=[data.input()], output=data.output(out))
        return await client.to_the_end((await client.submit(request)).job_id)


async def test_a_resumed_job_ends_with_the_weights_of_one_that_never_stopped(
    stack: Stack, sample: Provisioned, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    job, _ = await train(stack, sample, whole)
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.reason
    first, _last = sorted((whole / "checkpoints").iterdir())
    shutil.copytree(first, resumed / "checkpoints" / first.name)
    job, events = await train(stack, sample, resumed, "--resume")
    assert job.state == pb.JOB_STATE_SUCCEEDED, job.reason
    # Only the second epoch was trained anew.
    assert [event.metrics.step for event in events if "dev_accuracy" in event.metrics.values] == [14]
    weights = [
        (await asyncio.to_thread(stack.open, out / "model")).read("model.safetensors") for out in (whole, resumed)
    ]
    assert weights[0] == weights[1]

    # A checkpoint of another recipe is no beginning of this one, and a model is never overwritten.
    other = tmp_path / "other"
    shutil.copytree(first, other / "checkpoints" / first.name)
    job, _ = await train(stack, sample, other, "--resume", "--lr", "0.5", nodes=1)
    assert "the latest checkpoint is of another recipe" in job.reason
    job, events = await train(stack, sample, whole, nodes=1)
    assert "already holds a model" in job.reason
    assert not any(phase("running")(event) for event in events)


async def test_a_cancelled_training_stops_on_all_ranks_at_the_same_step(
    stack: Stack, sample: Provisioned, tmp_path: Path
) -> None:
    endless = [*TINY, "--epochs", "10000", "--log-steps", "1"]
    async with client_of(stack) as client:
        request = spec(TRAINING, nodes=2, args=endless, inputs=[sample.input()], output=sample.output(tmp_path / "out"))
        job_id = (await client.submit(request)).job_id
        await client.until(job_id, lambda event: event.progress.step > 0)
        await client.cancel(job_id)
        job, events = await client.to_the_end(job_id)
    assert job.state == pb.JOB_STATE_CANCELLED
    assert [rank.exit_code for rank in job.ranks] == [0, 0]
    stopped = {event.rank: event.message.text for event in events if event.message.phase == "cancelled"}
    assert stopped.keys() == {0, 1}
    assert len(set(stopped.values())) == 1


async def test_broken_rows_end_the_job_with_their_numbers(stack: Stack, tmp_path: Path) -> None:
    source = tmp_path / "source"
    generate_sample(source, rows=240)
    with (source / "dev.tsv").open("a") as file:
        file.write("1 no tab in this row\n")
    rows = (source / "dev.tsv").read_text().count("\n")
    data = await asyncio.to_thread(stack.provision, source, scripts=[TRAINING])
    job, _ = await train(stack, data, tmp_path / "out", nodes=1)
    assert job.state == pb.JOB_STATE_FAILED
    assert job.reason == (
        f"rank 0: CLO-1011: dev.tsv is not labelled text (row {rows}: there is no tab between label and text)"
    )
    assert not (tmp_path / "out" / "model").exists()
