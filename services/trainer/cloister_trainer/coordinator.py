# SPDX-License-Identifier: Apache-2.0
"""Run jobs: take them, wait for cores, register them with attest, start ranks, see them end, stop what is left.

What follows from what is decided in `job` (pure); here is who does it. One event loop; nothing here blocks it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, Protocol

from cloister.api.trainer.v1 import trainer_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.runtime.logging import get_logger
from cloister_trainer import job as jobs
from cloister_trainer import wire
from cloister_trainer.job import JobRecord, JobState, Stop
from cloister_trainer.journal import Journal
from cloister_trainer.launcher import Launcher, RankProcess
from cloister_trainer.livejob import LiveJob
from cloister_trainer.spec import JobSpec, parse_spec

MAX_QUEUED: Final = 1000  # jobs of one tenant that wait or run
MAX_QUEUED_BYTES: Final = 64 * 1024 * 1024  # of their scripts, which are kept in memory
_FAILURE_LOG_LINES: Final = 20
_EVENTS_PER_READ: Final = 500
_ID_TAIL: Final = 9  # "-" and 8 hex digits


class Registry(Protocol):
    """Attest's registry of jobs: which measurements may become ranks of which job."""

    async def register(self, record: JobRecord) -> None: ...
    async def close(self, job_id: str) -> None: ...


class Coordinator:
    """All jobs of this trainer."""

    def __init__(
        self,
        *,
        journal: Journal,
        launcher: Launcher,
        registry: Registry,
        cores: tuple[int, ...],
        cancel_wait_s: float,
        term_grace_s: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._journal = journal
        self._launcher = launcher
        self._registry = registry
        self._cores = cores
        self._cancel_wait_s = cancel_wait_s
        self._term_grace_s = term_grace_s
        self._now_ms = now_ms
        self._live: dict[str, LiveJob] = {}  # in the order of submission
        self._ranks: dict[str, dict[int, RankProcess]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    async def recover(self) -> None:
        """Take up what an earlier process left: queued jobs stay queued, running ones have failed."""
        for message in await self._journal.unfinished():
            sequence = await self._journal.last_sequence(message.job_id)
            record = jobs.queued(
                message.job_id,
                tenant=message.tenant,
                owner=message.owner,
                spec=parse_spec(message.spec),
                now_ms=message.created_unix_ms,
            )
            if message.state == wire.state_value(JobState.QUEUED):
                live = LiveJob(record, self._journal, self._now_ms, sequence=sequence)
                try:
                    jobs.check_cores(record.spec, self._cores)
                except CloisterError as error:  # there are fewer cores than when it was submitted
                    failed = jobs.ended(jobs.not_started(record, error), now_ms=self._now_ms())
                    await live.apply(failed)
                else:
                    self._live[record.job_id] = live
                continue
            ended = wire.orphaned(message, now_ms=self._now_ms())
            ended.ClearField("spec")
            event = trainer_pb2.Event(
                rank=wire.COORDINATOR,
                sequence=sequence + 1,
                time_unix_ms=self._now_ms(),
                state_changed=trainer_pb2.StateChanged(state=ended.state, reason=ended.reason),
            )
            await self._journal.store(ended, [event])
            self._spawn(self._close_registration(message.job_id))
        self._start_what_fits()

    async def submit(self, spec: JobSpec, *, caller: SpiffeId, request_id: str) -> str:
        """Queue a job and return its id; raise CloisterError when it could never run here."""
        jobs.check_cores(spec, self._cores)
        mine = [live.record.spec for live in self._live.values() if live.record.tenant == caller.tenant]
        if len(mine) >= MAX_QUEUED or sum(len(waiting.script) for waiting in mine) > MAX_QUEUED_BYTES:
            raise CloisterError(
                Code.RATE_LIMITED,
                what="the job is not taken: too many of yours wait",
                why=f"at most {MAX_QUEUED:,} jobs of a tenant wait, with {MAX_QUEUED_BYTES:,} bytes of scripts",
                todo="submit it when some have ended, or cancel some",
            )
        job_id = f"{spec.name[: 63 - _ID_TAIL].rstrip('-')}-{secrets.token_hex(4)}"
        record = jobs.queued(job_id, tenant=caller.tenant, owner=str(caller), spec=spec, now_ms=self._now_ms())
        live = LiveJob(record, self._journal, self._now_ms)
        stored = await self._journal.insert(record, request_id, live.first_events())
        if stored == job_id:
            get_logger().info("job queued", job_id=job_id, tenant=caller.tenant, nodes=spec.nodes)
            self._live[job_id] = live
            self._start_what_fits()
        return stored

    async def cancel(self, job_id: str, tenant: str) -> None:
        """Stop a job: at once in the queue, otherwise in steps. Ranks learn of it with their next report."""
        live = self._live.get(job_id)
        if live is None or live.record.tenant != tenant:
            message = await self._journal.job(job_id, tenant)
            raise CloisterError(
                Code.JOB_ENDED,
                what=f"job {job_id} cannot be cancelled",
                why=f"it has already ended: {JobState(message.state).name.lower()}",
                todo="nothing runs any more",
            )
        step = jobs.cancel(live.record, now_ms=self._now_ms())
        if step.record.state.ended:
            del self._live[job_id]
        events = [wire.message_event(wire.COORDINATOR, "cancelling", "its owner cancelled the job")]
        await live.apply(step.record, events)
        self._act(live, step.stop)
        self._start_what_fits()

    def of_rank(self, caller: SpiffeId) -> LiveJob:
        """Return the job that a rank's certificate names, while it runs; raise CloisterError otherwise."""
        live = self._live.get(caller.job)
        if live is None or live.record.tenant != caller.tenant or live.record.state is JobState.QUEUED:
            raise CloisterError(
                Code.JOB_ENDED,
                what="this rank's job does not run",
                why="it has ended, or was never started here",
                todo="submit the job again",
            )
        if not 0 <= caller.rank < live.record.spec.nodes:
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED, what="the job has no such rank", why=f"it has {live.record.spec.nodes}"
            )
        return live

    async def rank_failed(self, live: LiveJob, failure: jobs.Failure) -> None:
        """Take a rank's report that it fails."""
        step = jobs.rank_failed(live.record, failure)
        await live.apply(step.record)
        self._act(live, step.stop)

    async def watch(self, job_id: str, tenant: str, after: int) -> AsyncIterator[trainer_pb2.Event]:
        """Yield a job's events behind `after`: those of the past, then live, until it has ended."""
        await self._journal.job(job_id, tenant)
        while True:
            live = self._live.get(job_id)
            batch = await self._journal.events(job_id, after, _EVENTS_PER_READ)
            for event in batch:
                yield event
                after = event.sequence
            if len(batch) == _EVENTS_PER_READ:
                continue
            if live is None:
                # It had ended before the events were read: there are no more.
                return
            await live.wait_beyond(after)

    def runs(self, job_id: str) -> bool:
        """Say whether a job has not ended."""
        return job_id in self._live

    async def close(self) -> None:
        """Take no more jobs and stop all ranks; jobs that ran are failed by the next `recover`."""
        self._closed = True
        for live in self._live.values():
            live.stopping.set()
        processes = [process for ranks in self._ranks.values() for process in ranks.values()]
        await asyncio.gather(*(self._launcher.stop(process, self._term_grace_s) for process in processes))
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start_what_fits(self) -> None:
        """Start queued jobs in order; one that waits for cores holds back those behind it."""
        for live in self._live.values():
            if self._closed or live.record.state is not JobState.QUEUED:
                continue
            busy = frozenset[int]().union(*(other.record.cores for other in self._live.values()))
            cores = jobs.choose_cores(live.record.spec, self._cores, busy)
            if cores is None:
                return
            # Before any await, so that nobody else takes the cores.
            record = live.record
            live.record = jobs.starting(record, cores, now_ms=self._now_ms())
            self._spawn(self._run(live, record))

    async def _run(self, live: LiveJob, queued: JobRecord) -> None:
        """Take a job from its start to its end."""
        started, live.record = live.record, queued
        await live.apply(started)
        job_id = started.job_id
        try:
            await self._registry.register(started)
            await asyncio.to_thread(self._launcher.prepare, started)
            for rank in range(started.spec.nodes):
                if live.record.cancel_requested or live.stopping.is_set():
                    break
                process = await self._launcher.start(started, rank)
                self._ranks.setdefault(job_id, {})[rank] = process
                await live.apply(jobs.rank_spawned(live.record, rank, process.pid))
                self._spawn(self._await_exit(live, rank, process))
                if live.stopping.is_set():  # decided while this rank was being started, and did not reach it
                    await self._launcher.stop(process, 0.0)
        except CloisterError as error:
            live.record = jobs.not_started(live.record, error)
            live.stopping.set()
            await self._stop_ranks(live, grace_s=0.0)
        stopping = live.stopping.is_set() or live.record.cancel_requested
        if not live.ended.is_set() and jobs.all_gone(live.record, stopping=stopping):
            await self._end(live, jobs.ended(live.record, now_ms=self._now_ms()))
        await live.ended.wait()
        await self._stop_ranks(live, grace_s=self._term_grace_s)
        self._ranks.pop(job_id, None)
        await self._close_registration(job_id)

    async def _await_exit(self, live: LiveJob, rank: int, process: RankProcess) -> None:
        code = await process.wait()
        if self._closed:
            return  # the whole trainer ends; what the ranks did then says nothing about the job
        if code != 0 and all(failure.rank != rank for failure in live.record.failures):
            left = await asyncio.to_thread(self._launcher.failure, live.record.job_id, rank)
            if left is not None and not live.stopping.is_set():
                await self.rank_failed(live, left)
        step = jobs.rank_exited(live.record, rank, code, stopping=live.stopping.is_set(), now_ms=self._now_ms())
        if step.record.state.ended:
            await self._end(live, step.record)
            return
        await live.apply(step.record)
        self._act(live, step.stop)

    async def _end(self, live: LiveJob, record: JobRecord) -> None:
        """Store a job's end, once; free its cores and see who is next."""
        if live.ending:
            return
        live.ending = True
        events = []
        failure = jobs.cause(record)
        if record.state is JobState.FAILED and failure is not None:
            told = [text for text in (f"{failure.code}: {failure.what}", failure.why, failure.todo) if text]
            if failure.rank >= 0:
                tail = await asyncio.to_thread(self._launcher.log_tail, record.job_id, failure.rank, _FAILURE_LOG_LINES)
                told += ["", f"last lines of rank {failure.rank}'s log:", *tail]
            events.append(wire.message_event(failure.rank, "failed", "\n".join(told)))
        get_logger().info("job ended", job_id=record.job_id, state=record.state.name, reason=record.reason)
        await live.apply(record, events)
        self._live.pop(record.job_id, None)
        self._start_what_fits()

    def _act(self, live: LiveJob, stop: Stop) -> None:
        wait_s = {Stop.NOW: 0.0, Stop.SOON: jobs.CAUSE_WAIT_S, Stop.ASKED: self._cancel_wait_s}.get(stop)
        if wait_s is not None:
            self._spawn(self._stop_after(live, wait_s))

    async def _stop_after(self, live: LiveJob, wait_s: float) -> None:
        try:
            await asyncio.wait_for(live.ended.wait(), wait_s)
        except TimeoutError:
            await self._stop_ranks(live, grace_s=self._term_grace_s)

    async def _stop_ranks(self, live: LiveJob, *, grace_s: float) -> None:
        """End all ranks and whatever they started; those that have ended may have left something, too."""
        live.stopping.set()
        processes = tuple(self._ranks.get(live.record.job_id, {}).values())
        await asyncio.gather(*(self._launcher.stop(process, grace_s) for process in processes))

    async def _close_registration(self, job_id: str) -> None:
        try:
            await self._registry.close(job_id)
        except CloisterError as error:
            # Attest was restarted, or is away: then it knows no such job, or forgets it with its next restart.
            get_logger().warning("job not closed at attest", job_id=job_id, error=error.code.text)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            get_logger().error("background work failed", exc_info=error)
