# SPDX-License-Identifier: Apache-2.0
"""Between records and messages of the wire: what goes out is built here, what ranks report is checked here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, cast

from cloister.api.trainer.v1 import trainer_pb2
from cloister.errors import CloisterError, Code
from cloister_trainer.job import Failure, JobRecord, JobState, Progress, RankRecord
from cloister_trainer.spec import InputSpec, JobSpec, OutputSpec

COORDINATOR: Final = -1  # `rank` of the coordinator's own events
MAX_PHASE: Final = 64
MAX_TEXT: Final = 8000
MAX_METRICS: Final = 64
MAX_METRIC_NAME: Final = 64
_MAX_URI: Final = 4096
_DIGEST_SIZE: Final = 48


def state_value(state: JobState) -> trainer_pb2.JobState.ValueType:
    """Return the wire's number of a state; the two enums agree."""
    return cast("trainer_pb2.JobState.ValueType", state.value)


def spec_message(spec: JobSpec) -> trainer_pb2.JobSpec:
    """Return a job description as it came."""
    message = trainer_pb2.JobSpec(
        name=spec.name,
        script=spec.script,
        args=spec.args,
        nodes=spec.nodes,
        inputs=[_input(entry) for entry in spec.inputs],
        seed=spec.seed,
        cores=spec.cores,
    )
    if spec.output:
        message.output.CopyFrom(_output(spec.output))
    return message


def job_message(record: JobRecord) -> trainer_pb2.Job:
    """Return a job without its description, which does not change and is kept once."""
    return trainer_pb2.Job(
        job_id=record.job_id,
        tenant=record.tenant,
        owner=record.owner,
        state=state_value(record.state),
        reason=record.reason,
        created_unix_ms=record.created_ms,
        started_unix_ms=record.started_ms,
        ended_unix_ms=record.ended_ms,
        ranks=[_rank(rank) for rank in record.ranks],
        progress=progress_message(record.progress) if record.progress else None,
        results=dict(record.results),
    )


def progress_message(progress: Progress) -> trainer_pb2.Progress:
    return trainer_pb2.Progress(
        epoch=progress.epoch,
        epochs=progress.epochs,
        step=progress.step,
        steps=progress.steps,
        loss=progress.loss,
        samples_per_s=progress.samples_per_s,
        eta_s=progress.eta_s,
    )


def state_event(record: JobRecord) -> trainer_pb2.Event:
    changed = trainer_pb2.StateChanged(state=state_value(record.state), reason=record.reason)
    return trainer_pb2.Event(rank=COORDINATOR, state_changed=changed)


def message_event(rank: int, phase: str, text: str, elapsed_s: float = 0.0) -> trainer_pb2.Event:
    message = trainer_pb2.RankMessage(phase=phase[:MAX_PHASE], text=text[:MAX_TEXT], elapsed_s=elapsed_s)
    return trainer_pb2.Event(rank=rank, message=message)


def progress_event(rank: int, progress: Progress) -> trainer_pb2.Event:
    """Return a rank's progress with its own speed; the job's progress has the sum over ranks."""
    return trainer_pb2.Event(rank=rank, progress=progress_message(progress))


def failure_from(rank: int, report: trainer_pb2.RankFailure) -> Failure:
    """Return a rank's report of its failure, cut to what a reader can use."""
    return Failure(
        rank,
        code=report.code[:16] or Code.RANK_FAILED.text,
        what=report.what[:MAX_TEXT] or "failed",
        why=report.why[:MAX_TEXT],
        todo=report.todo[:MAX_TEXT],
    )


def progress_from(report: trainer_pb2.Progress) -> Progress:
    """Return a rank's progress; a loss that is not a number is news, a speed that is not one is noise."""
    speed, eta = report.samples_per_s, report.eta_s
    return Progress(
        epoch=report.epoch,
        epochs=report.epochs,
        step=report.step,
        steps=report.steps,
        loss=report.loss,
        samples_per_s=speed if math.isfinite(speed) and speed >= 0 else 0.0,
        eta_s=eta if math.isfinite(eta) and eta >= 0 else -1.0,
    )


def metrics_event(rank: int, report: trainer_pb2.MetricsLogged) -> trainer_pb2.Event:
    """Check names and number of a rank's figures."""
    if len(report.values) > MAX_METRICS or any(not 0 < len(name) <= MAX_METRIC_NAME for name in report.values):
        raise _refused(
            f"{len(report.values)} figures at once",
            f"at most {MAX_METRICS}, with names of 1 to {MAX_METRIC_NAME} characters",
        )
    return trainer_pb2.Event(rank=rank, metrics=report)


def artifact_event(rank: int, report: trainer_pb2.ArtifactWritten) -> trainer_pb2.Event:
    """Check the shape of what a rank says it wrote."""
    sizes = len(report.name) <= MAX_PHASE and len(report.uri) <= _MAX_URI
    if not sizes or len(report.manifest_digest) != _DIGEST_SIZE:
        raise _refused(f"an artifact {report.name[:MAX_PHASE]!r}", f"its manifest digest has {_DIGEST_SIZE} bytes")
    return trainer_pb2.Event(rank=rank, artifact=report)


def final_results(known: Mapping[str, float], report: trainer_pb2.MetricsLogged) -> dict[str, float]:
    """Return the job's results with these figures; the latest wins, and their number stays bounded."""
    merged = {**known, **dict(report.values)}
    if len(merged) > MAX_METRICS:
        raise _refused(f"{len(merged)} results", f"a job has at most {MAX_METRICS}")
    return merged


def _input(entry: InputSpec) -> trainer_pb2.SealedInput:
    return trainer_pb2.SealedInput(
        name=entry.name,
        uri=entry.directory.as_uri(),
        key_uri=entry.key_uri,
        manifest_digest=entry.manifest_digest,
    )


def _output(output: OutputSpec) -> trainer_pb2.SealedOutput:
    return trainer_pb2.SealedOutput(uri=output.directory.as_uri(), key_uri=output.key_uri)


def _rank(rank: RankRecord) -> trainer_pb2.RankStatus:
    return trainer_pb2.RankStatus(
        rank=rank.rank,
        state=rank.state.value,
        process_id=rank.process_id,
        core=rank.core,
        samples_per_s=rank.samples_per_s,
        exit_code=rank.exit_code,
    )


def orphaned(message: trainer_pb2.Job, *, now_ms: int) -> trainer_pb2.Job:
    """Return a job whose coordinator ended while it ran, as it is from now on."""
    ended = trainer_pb2.Job()
    ended.CopyFrom(message)
    ended.state = state_value(JobState.FAILED)
    ended.reason = (
        f"{Code.JOB_FAILED.text}: the trainer was restarted while the job ran; its ranks ended with it. "
        "Checkpoints it wrote are whole: submit it again, with --resume where its script has that"
    )
    ended.ended_unix_ms = now_ms
    for rank in ended.ranks:
        if rank.state in ("starting", "running"):
            rank.state = "stopped"
        rank.samples_per_s = 0.0
    return ended


def _refused(what: str, why: str) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID, what=f"the trainer does not take {what}", why=why, todo="report less at once"
    )
