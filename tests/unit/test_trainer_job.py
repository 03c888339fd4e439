# SPDX-License-Identifier: Apache-2.0
"""The life of a job: every transition, the cause of a failure among its consequences, and cores that nobody shares."""

import signal

import pytest

from cloister.errors import CloisterError, Code
from cloister_trainer import job as jobs
from cloister_trainer.job import Failure, JobRecord, JobState, Progress, RankState, Stop
from cloister_trainer.spec import JobSpec

PEER_LOST = Failure(0, Code.PEER_LOST.text, "lost another rank of the job")


def spec(nodes: int = 2, cores: tuple[int, ...] = ()) -> JobSpec:
    return JobSpec("job", b"x", (), nodes, (), None, 1, cores)


def queued(nodes: int = 2) -> JobRecord:
    return jobs.queued("j-1", tenant="lab", owner="o", spec=spec(nodes), now_ms=10)


def running(nodes: int = 2) -> JobRecord:
    record = jobs.starting(queued(nodes), range(nodes), now_ms=20)
    for rank in range(nodes):
        record = jobs.rank_spawned(record, rank, 100 + rank)
    for rank in range(nodes):
        record = jobs.rank_running(record, rank)
    return record


def exited(record: JobRecord, rank: int, code: int, *, stopping: bool = False) -> jobs.Step:
    return jobs.rank_exited(record, rank, code, stopping=stopping, now_ms=99)


def test_a_job_runs_when_every_rank_runs_its_script() -> None:
    record = jobs.starting(queued(), [0, 1], now_ms=20)
    assert record.state is JobState.STARTING
    record = jobs.rank_spawned(jobs.rank_spawned(record, 0, 100), 1, 101)
    record = jobs.rank_running(record, 1)
    assert record.state is JobState.STARTING
    assert jobs.rank_running(record, 0).state is JobState.RUNNING


def test_a_job_succeeds_with_its_last_rank() -> None:
    step = exited(running(), 0, 0)
    assert step.record.state is JobState.RUNNING
    assert step.stop is Stop.NO
    done = exited(step.record, 1, 0).record
    assert (done.state, done.reason, done.ended_ms) == (JobState.SUCCEEDED, "", 99)


def test_a_killed_rank_fails_the_job_and_stops_the_others_at_once() -> None:
    step = exited(running(), 1, -signal.SIGKILL)
    assert step.stop is Stop.NOW
    assert step.record.state is JobState.RUNNING
    done = exited(step.record, 0, -signal.SIGTERM, stopping=True).record
    assert done.state is JobState.FAILED
    assert done.reason.startswith("rank 1: CLO-1506: was killed by SIGKILL")
    assert [rank.state for rank in done.ranks] == [RankState.STOPPED, RankState.FAILED]


def test_a_rank_that_lost_a_peer_is_not_the_cause() -> None:
    step = jobs.rank_failed(running(), PEER_LOST)
    assert step.stop is Stop.SOON
    step = exited(step.record, 1, -signal.SIGKILL)
    assert step.stop is Stop.NOW
    done = exited(step.record, 0, 70, stopping=True).record
    assert done.reason.startswith("rank 1:")
    assert jobs.cause(done) == Failure(
        1,
        Code.RANK_FAILED.text,
        "was killed by SIGKILL",
        "SIGKILL comes from an administrator or from the kernel when memory runs out",
        "read the rank's log",
    )


def test_a_lost_peer_is_the_reason_when_there_is_no_other() -> None:
    record = jobs.rank_failed(running(), PEER_LOST).record
    record = exited(record, 0, 70).record
    assert exited(record, 1, 0).record.reason.startswith("rank 0: CLO-1508: lost another rank")


def test_a_ranks_own_words_are_kept_before_its_exit_code() -> None:
    step = jobs.rank_failed(running(), Failure(1, "CLO-1011", "train.tsv is not labelled text", "row 7", "fix it"))
    assert step.stop is Stop.NOW
    record = exited(step.record, 1, 70).record
    done = exited(record, 0, -15, stopping=True).record
    assert done.reason == "rank 1: CLO-1011: train.tsv is not labelled text (row 7)"
    assert len(done.failures) == 1


def test_the_first_cause_stays_the_reason() -> None:
    record = jobs.rank_failed(running(), Failure(1, "CLO-1", "first")).record
    record = jobs.rank_failed(record, Failure(0, "CLO-2", "second")).record
    failure = jobs.cause(record)
    assert failure is not None
    assert failure.what == "first"


def test_a_reason_is_one_line() -> None:
    assert "\n" not in Failure(0, "CLO-1506", "a\nb", "c\n\nd").line


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_is_asked_first() -> None:
    assert jobs.cancel(queued(), now_ms=5).record.state is JobState.CANCELLED
    step = jobs.cancel(running(), now_ms=5)
    assert (step.record.state, step.stop) == (JobState.RUNNING, Stop.ASKED)
    record = exited(step.record, 0, 0).record
    assert exited(record, 1, -15, stopping=True).record.state is JobState.CANCELLED


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_has_ended_is_not_cancelled(code: int) -> None:
    done = exited(running(1), 0, code).record
    with pytest.raises(CloisterError) as caught:
        jobs.cancel(done, now_ms=5)
    assert caught.value.code is Code.JOB_ENDED


def test_a_rank_that_was_never_started_counts_only_once_the_job_is_being_stopped() -> None:
    record = jobs.rank_spawned(jobs.starting(queued(), [0, 1], now_ms=20), 0, 100)
    assert exited(record, 0, 0).record.state is JobState.STARTING
    done = exited(record, 0, 1, stopping=True).record
    assert (done.state, done.reason) == (JobState.FAILED, "CLO-1503: its ranks were stopped")


def test_a_job_that_cannot_be_started_fails_with_that_reason() -> None:
    error = CloisterError(Code.UNREACHABLE, what="attest cannot be reached", why="refused")
    record = jobs.ended(jobs.not_started(queued(), error), now_ms=9)
    assert (record.state, record.reason) == (JobState.FAILED, "CLO-1101: attest cannot be reached (refused)")


def test_the_progress_of_a_job_is_rank_0s_with_the_speed_of_all() -> None:
    record = jobs.rank_progress(running(), 1, Progress(1, 2, 5, 10, 0.5, 30.0, 9.0))
    assert record.progress is None
    record = jobs.rank_progress(record, 0, Progress(1, 2, 6, 10, 0.4, 20.0, 8.0))
    assert record.progress == Progress(1, 2, 6, 10, 0.4, 50.0, 8.0)


def test_ranks_never_share_a_core_and_wait_for_free_ones() -> None:
    assert jobs.choose_cores(spec(2), (0, 1, 2), busy=()) == (0, 1)
    assert jobs.choose_cores(spec(2), (0, 1, 2), busy={0}) == (1, 2)
    assert jobs.choose_cores(spec(2), (0, 1, 2), busy={0, 2}) is None
    assert jobs.choose_cores(spec(2, (2, 0)), (0, 1, 2), busy={1}) == (2, 0)
    assert jobs.choose_cores(spec(2, (2, 0)), (0, 1, 2), busy={2}) is None


@pytest.mark.parametrize("wanted", [spec(3), spec(2, (0, 7))])
def test_cores_that_are_not_there_are_refused_at_once(wanted: JobSpec) -> None:
    with pytest.raises(CloisterError) as caught:
        jobs.check_cores(wanted, (0, 1))
    assert caught.value.code is Code.CORES_INSUFFICIENT
    assert "0, 1" in caught.value.why
    jobs.check_cores(spec(2), (0, 1))


def test_a_jobs_cores_are_free_when_it_has_ended() -> None:
    assert running().cores == {0, 1}
    done = exited(exited(running(), 0, 0).record, 1, 0).record
    assert done.cores == frozenset()
