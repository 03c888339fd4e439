# SPDX-License-Identifier: Apache-2.0
"""The coordinator with ranks that do as the test says: starts that fail halfway, races, restarts, and the queue."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.api.trainer.v1 import trainer_pb2 as pb
from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister_trainer.coordinator import Coordinator
from cloister_trainer.job import Failure, JobRecord
from cloister_trainer.journal import Journal
from cloister_trainer.spec import JobSpec

USER = SpiffeId.of_user("cloister.test", tenant="lab", user="owner")


class Process:
    """A rank that ends when it is told to, or when the test says."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.exit)

    def end(self, code: int) -> None:
        if not self.exit.done():
            self.exit.set_result(code)


class Ranks:
    """A launcher of such ranks."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.processes: list[Process] = []
        self.fail_at = -1
        self.hold: asyncio.Event | None = None
        self.left: dict[int, Failure] = {}

    def prepare(self, record: JobRecord) -> None:
        pass

    async def start(self, record: JobRecord, rank: int) -> Process:
        if self.hold is not None:
            await self.hold.wait()
        if rank == self.fail_at:
            raise CloisterError(Code.IO_FAILED, what="no more processes")
        self.started.append((record.job_id, rank))
        self.processes.append(Process(1000 + len(self.processes)))
        return self.processes[-1]

    async def stop(self, process: Process, grace_s: float) -> None:
        process.end(-15)

    def failure(self, job_id: str, rank: int) -> Failure | None:
        return self.left.get(rank)

    def log_tail(self, job_id: str, rank: int, lines: int) -> list[str]:
        return [f"line of rank {rank}"]


class Attest:
    """A registry of jobs that can be away."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.away = False

    async def register(self, record: JobRecord) -> None:
        if self.away:
            raise CloisterError(Code.UNREACHABLE, what="attest cannot be reached")
        self.open.append(record.job_id)

    async def close(self, job_id: str) -> None:
        if self.away:
            raise CloisterError(Code.UNREACHABLE, what="attest cannot be reached")
        if job_id in self.open:
            self.open.remove(job_id)


class Room:
    """A coordinator and what is around it."""

    def __init__(self, directory: Path, cores: tuple[int, ...] = (0, 1)) -> None:
        self.directory, self.cores = directory, cores
        self.ranks, self.attest = Ranks(), Attest()
        self.clock = itertools.count(1)
        self.open()

    def open(self) -> None:
        self.journal = Journal.open(self.directory)
        self.coordinator = Coordinator(
            journal=self.journal,
            launcher=self.ranks,
            registry=self.attest,
            cores=self.cores,
            cancel_wait_s=0.0,
            term_grace_s=0.0,
            now_ms=lambda: next(self.clock),
        )

    async def submit(self, nodes: int = 1, cores: tuple[int, ...] = ()) -> str:
        spec = JobSpec("job", b"x", (), nodes, (), None, 1, cores)
        return await self.coordinator.submit(spec, caller=USER, request_id="")

    async def running(self, ranks: int) -> list[Process]:
        while len(self.ranks.processes) < ranks:
            await asyncio.sleep(0)
        return self.ranks.processes

    async def ended(self, job_id: str) -> pb.Job:
        async for _ in self.coordinator.watch(job_id, "lab", 0):
            pass
        return await self.journal.job(job_id, "lab")

    async def close(self) -> None:
        await self.coordinator.close()
        self.journal.close()


@pytest.fixture
async def room(tmp_path: Path) -> AsyncIterator[Room]:
    made = Room(tmp_path)
    yield made
    await made.close()


async def test_a_job_is_registered_before_its_first_rank_and_closed_after_its_last(room: Room) -> None:
    job_id = await room.submit(nodes=2)
    processes = await room.running(2)
    assert room.attest.open == [job_id]
    for process in processes:
        process.end(0)
    assert (await room.ended(job_id)).state == pb.JOB_STATE_SUCCEEDED
    while room.attest.open:
        await asyncio.sleep(0)


async def test_without_attest_no_rank_is_started_and_the_job_says_why(room: Room) -> None:
    room.attest.away = True
    job = await room.ended(await room.submit())
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "CLO-1101: attest cannot be reached")
    assert room.ranks.started == []


async def test_a_start_that_fails_halfway_ends_the_ranks_that_are_there(room: Room) -> None:
    room.ranks.fail_at = 1
    job = await room.ended(await room.submit(nodes=2))
    assert (job.state, job.reason) == (pb.JOB_STATE_FAILED, "CLO-1006: no more processes")
    assert await room.ranks.processes[0].wait() == -15


async def test_a_rank_that_fails_before_the_last_is_started_still_ends_the_job(room: Room) -> None:
    job_id = await room.submit(nodes=2)
    [first, *_] = await room.running(1)
    first.end(3)
    job = await room.ended(job_id)
    assert job.reason == "rank 0: CLO-1506: ended with exit code 3"
    assert all(process.exit.done() for process in room.ranks.processes)


async def test_a_cancel_while_ranks_are_being_started_leaves_none(room: Room) -> None:
    room.ranks.hold = asyncio.Event()
    job_id = await room.submit(nodes=2)
    await room.coordinator.cancel(job_id, "lab")
    room.ranks.hold.set()
    assert (await room.ended(job_id)).state == pb.JOB_STATE_CANCELLED
    assert all(process.exit.done() for process in room.ranks.processes)


async def test_what_a_rank_without_an_identity_left_behind_is_the_reason(room: Room) -> None:
    room.ranks.left[0] = Failure(0, "CLO-1207", "this TD does not get an identity", "script: wanted a, got b")
    job_id = await room.submit()
    [process] = await room.running(1)
    process.end(70)
    job = await room.ended(job_id)
    assert job.reason == "rank 0: CLO-1207: this TD does not get an identity (script: wanted a, got b)"
    failed = [e async for e in room.coordinator.watch(job_id, "lab", 0) if e.message.phase == "failed"]
    assert failed[0].message.text.endswith("last lines of rank 0's log:\nline of rank 0")


async def test_jobs_start_in_order_and_as_cores_allow(room: Room) -> None:
    one, two, three = await room.submit(), await room.submit(nodes=2), await room.submit()
    [first] = await room.running(1)
    assert room.ranks.started == [(one, 0)]
    first.end(0)
    await room.ended(one)
    await room.running(3)
    assert room.ranks.started[1:] == [(two, 0), (two, 1)]
    for process in room.ranks.processes:
        process.end(0)
    await room.running(4)
    assert room.ranks.started[3:] == [(three, 0)]


async def test_a_restart_fails_what_ran_and_keeps_what_waited(room: Room) -> None:
    runs, waits = await room.submit(nodes=2), await room.submit()
    await room.running(2)
    # As if the process had ended: nothing is told to anybody.
    room.journal.close()
    room.open()
    await room.coordinator.recover()
    assert "the trainer was restarted" in (await room.ended(runs)).reason
    processes = await room.running(3)
    assert room.ranks.started[-1] == (waits, 0)
    processes[-1].end(0)
    assert (await room.ended(waits)).state == pb.JOB_STATE_SUCCEEDED


async def test_a_waiting_job_whose_cores_are_gone_after_a_restart_fails_and_does_not_block_the_queue(
    tmp_path: Path,
) -> None:
    room = Room(tmp_path)
    await room.submit(nodes=2)
    wide, narrow = await room.submit(nodes=2), await room.submit()
    room.journal.close()
    room.cores = (0,)
    room.open()
    await room.coordinator.recover()
    assert (await room.ended(wide)).reason.startswith("CLO-1505:")
    while (narrow, 0) not in room.ranks.started:
        await asyncio.sleep(0)
    await room.close()


async def test_a_watcher_sees_every_event_once_and_in_order_while_they_happen(room: Room) -> None:
    job_id = await room.submit()

    async def sequences() -> list[int]:
        return [event.sequence async for event in room.coordinator.watch(job_id, "lab", 0)]

    watchers = [asyncio.create_task(sequences()) for _ in range(3)]
    [process] = await room.running(1)
    process.end(0)
    seen = await asyncio.gather(*watchers)
    assert seen == [list(range(1, len(seen[0]) + 1))] * 3


async def test_a_tenant_cannot_fill_the_queue_without_end(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cloister_trainer.coordinator.MAX_QUEUED", 2)
    for _ in range(2):
        await room.submit(nodes=2)
    with pytest.raises(CloisterError) as caught:
        await room.submit()
    assert caught.value.code is Code.RATE_LIMITED
