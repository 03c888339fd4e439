# SPDX-License-Identifier: Apache-2.0
"""The life of a job, as values: what happened goes in, the next record and what to do about it come out. Pure.

    QUEUED -> STARTING -> RUNNING -> SUCCEEDED | FAILED | CANCELLED

A job starts when cores are free for all of its ranks, and runs when every rank runs its script. The first failure
decides: the other ranks are stopped, and the job ends when the last of them is gone. A rank that lost a peer is not
the cause, so its report waits a moment for the one that is.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from cloister.errors import CloisterError, Code
from cloister_trainer.spec import JobSpec

PEER_LOST: Final = Code.PEER_LOST.text
# Ranks that trained together notice a lost peer within this time of its end.
CAUSE_WAIT_S: Final = 2.0


class JobState(enum.IntEnum):
    """Numbers as on the wire."""

    QUEUED = 1
    STARTING = 2
    RUNNING = 3
    SUCCEEDED = 4
    FAILED = 5
    CANCELLED = 6

    @property
    def ended(self) -> bool:
        return self >= JobState.SUCCEEDED


class RankState(enum.StrEnum):
    """What a rank does."""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    @property
    def ended(self) -> bool:
        return self in (RankState.SUCCEEDED, RankState.FAILED, RankState.STOPPED)


class Stop(enum.Enum):
    """What to do with the ranks that still run."""

    NO = "no"
    NOW = "now"
    SOON = "soon"  # after CAUSE_WAIT_S: the cause may still be on its way
    ASKED = "asked"  # they were asked, and get the time that a cancelled job gets


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job failed: by a rank's own report, by how its process ended, or because it could not be started."""

    rank: int  # -1: no rank's fault
    code: str
    what: str
    why: str = ""
    todo: str = ""

    @property
    def is_cause(self) -> bool:
        return self.code != PEER_LOST

    @property
    def line(self) -> str:
        """One line for people."""
        who = f"rank {self.rank}: " if self.rank >= 0 else ""
        why = f" ({self.why})" if self.why else ""
        return " ".join(f"{who}{self.code}: {self.what}{why}".split())


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the job is; of a rank, or of all of them together."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    samples_per_s: float
    eta_s: float  # -1 when unknown


@dataclass(frozen=True, slots=True)
class RankRecord:
    """One rank of a job."""

    rank: int
    state: RankState = RankState.WAITING
    process_id: int = 0
    core: int = -1
    samples_per_s: float = 0.0
    exit_code: int = 0  # negative: ended by that signal


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Everything the coordinator knows about a job."""

    job_id: str
    tenant: str
    owner: str  # SPIFFE id
    spec: JobSpec
    created_ms: int
    state: JobState = JobState.QUEUED
    reason: str = ""
    started_ms: int = 0
    ended_ms: int = 0
    ranks: tuple[RankRecord, ...] = ()
    failures: tuple[Failure, ...] = ()
    cancel_requested: bool = False
    progress: Progress | None = None
    results: Mapping[str, float] = field(default_factory=dict)  # final figures by name

    @property
    def cores(self) -> frozenset[int]:
        """Cores that its ranks hold until the job ends."""
        return frozenset() if self.state.ended else frozenset(rank.core for rank in self.ranks if rank.core >= 0)


@dataclass(frozen=True, slots=True)
class Step:
    """A transition."""

    record: JobRecord
    stop: Stop = Stop.NO


def queued(job_id: str, *, tenant: str, owner: str, spec: JobSpec, now_ms: int) -> JobRecord:
    """Return a new job."""
    return JobRecord(job_id, tenant, owner, spec, now_ms, ranks=tuple(RankRecord(rank) for rank in range(spec.nodes)))


def check_cores(spec: JobSpec, available: Collection[int]) -> None:
    """Raise CloisterError(CORES_INSUFFICIENT) unless the job could run here when nothing else does."""
    missing = sorted(set(spec.cores) - set(available))
    if spec.nodes <= len(available) and not missing:
        return
    why = f"core {missing[0]} is not one of them" if missing else f"{spec.nodes} ranks need a core each"
    raise CloisterError(
        Code.CORES_INSUFFICIENT,
        what=f"the job asks for cores that are not there: {spec.nodes} ranks",
        why=f"the trainer has {len(available)} cores ({', '.join(map(str, sorted(available)))}); {why}",
        todo=f"submit with at most {len(available)} ranks, on cores of this list",
    )


def choose_cores(spec: JobSpec, available: Sequence[int], busy: Collection[int]) -> tuple[int, ...] | None:
    """Return a core for each rank, shared with nobody, or None while too few are free."""
    if spec.cores:
        return None if set(spec.cores) & set(busy) else spec.cores
    free = [core for core in available if core not in busy]
    return tuple(free[: spec.nodes]) if len(free) >= spec.nodes else None


def starting(record: JobRecord, cores: Sequence[int], *, now_ms: int) -> JobRecord:
    """Give a queued job its cores."""
    ranks = tuple(replace(rank, core=core) for rank, core in zip(record.ranks, cores, strict=True))
    return replace(record, state=JobState.STARTING, started_ms=now_ms, ranks=ranks)


def rank_spawned(record: JobRecord, rank: int, process_id: int) -> JobRecord:
    """Note a rank's process."""
    return _with_rank(record, replace(record.ranks[rank], state=RankState.STARTING, process_id=process_id))


def rank_running(record: JobRecord, rank: int) -> JobRecord:
    """Note that a rank runs its script; with the last one the job is running."""
    if record.ranks[rank].state is not RankState.STARTING:
        return record
    record = _with_rank(record, replace(record.ranks[rank], state=RankState.RUNNING))
    if record.state is JobState.STARTING and not any(r.state is RankState.STARTING for r in record.ranks):
        return replace(record, state=JobState.RUNNING)
    return record


def rank_progress(record: JobRecord, rank: int, progress: Progress) -> JobRecord:
    """Note a rank's speed; the job's progress is the lowest rank's, with the speed of all."""
    record = _with_rank(record, replace(record.ranks[rank], samples_per_s=progress.samples_per_s))
    if rank != 0:
        return record
    total = sum(r.samples_per_s for r in record.ranks)
    return replace(record, progress=replace(progress, samples_per_s=total))


def with_results(record: JobRecord, results: Mapping[str, float]) -> JobRecord:
    """Set the final figures."""
    return replace(record, results=results)


def rank_failed(record: JobRecord, failure: Failure) -> Step:
    """Take a rank's own report of its failure."""
    if any(known.rank == failure.rank for known in record.failures):
        return Step(record)
    record = replace(record, failures=(*record.failures, failure))
    return Step(record, Stop.NOW if failure.is_cause else Stop.SOON)


def rank_exited(record: JobRecord, rank: int, exit_code: int, *, stopping: bool, now_ms: int) -> Step:
    """Note a rank's end; `stopping` says that it had been told to. With the last one the job has ended."""
    reported = any(failure.rank == rank for failure in record.failures)
    stop = Stop.NO
    if exit_code == 0 and not reported:
        state = RankState.SUCCEEDED
    elif stopping and not reported:
        state = RankState.STOPPED
    else:
        state = RankState.FAILED
        if not reported:
            step = rank_failed(record, _death(rank, exit_code))
            record, stop = step.record, step.stop
    record = _with_rank(record, replace(record.ranks[rank], state=state, exit_code=exit_code, samples_per_s=0.0))
    return Step(ended(record, now_ms=now_ms) if all_gone(record, stopping=stopping) else record, stop)


def all_gone(record: JobRecord, *, stopping: bool) -> bool:
    """Say whether no rank is left; one that was never started counts once the ranks are being stopped."""
    return all(r.state.ended or (stopping and r.state is RankState.WAITING) for r in record.ranks)


def cancel(record: JobRecord, *, now_ms: int) -> Step:
    """Take the owner's wish: at once in the queue; otherwise ranks are asked, then told, then killed."""
    if record.state.ended:
        raise CloisterError(
            Code.JOB_ENDED,
            what=f"job {record.job_id} cannot be cancelled",
            why=f"it has already ended: {record.state.name.lower()}",
            todo="nothing runs any more",
        )
    record = replace(record, cancel_requested=True)
    if record.state is JobState.QUEUED:
        return Step(ended(record, now_ms=now_ms))
    return Step(record, Stop.ASKED)


def not_started(record: JobRecord, error: CloisterError) -> JobRecord:
    """Note that a job cannot be started, or not all of its ranks; it ends when those that were are gone."""
    failure = Failure(-1, error.code.text, error.what, error.why, error.todo)
    return replace(record, failures=(*record.failures, failure))


def cause(record: JobRecord) -> Failure | None:
    """Return the failure that decided, if there is one: the first that is not about a lost peer."""
    return next((f for f in record.failures if f.is_cause), record.failures[0] if record.failures else None)


def ended(record: JobRecord, *, now_ms: int) -> JobRecord:
    failure = cause(record)
    if record.cancel_requested:
        state, reason = JobState.CANCELLED, "cancelled by its owner"
    elif failure:
        state, reason = JobState.FAILED, failure.line
    elif all(rank.state is RankState.SUCCEEDED for rank in record.ranks):
        state, reason = JobState.SUCCEEDED, ""
    else:
        state, reason = JobState.FAILED, f"{Code.JOB_FAILED.text}: its ranks were stopped"
    return replace(record, state=state, reason=reason, ended_ms=now_ms)


def _death(rank: int, exit_code: int) -> Failure:
    if exit_code < 0:
        try:
            name = signal.Signals(-exit_code).name
        except ValueError:
            name = str(-exit_code)
        what = f"was killed by {name}"
        why = "SIGKILL comes from an administrator or from the kernel when memory runs out" if name == "SIGKILL" else ""
    else:
        what, why = f"ended with exit code {exit_code}", ""
    return Failure(rank, Code.RANK_FAILED.text, what, why, "read the rank's log")


def _with_rank(record: JobRecord, rank: RankRecord) -> JobRecord:
    return replace(record, ranks=(*record.ranks[: rank.rank], rank, *record.ranks[rank.rank + 1 :]))
