# SPDX-License-Identifier: Apache-2.0
"""`cloister train`: jobs on attested ranks."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import (
    JOB_ARGUMENTS,
    Json,
    State,
    WithJobArguments,
    existing_directory,
    existing_file,
    in_session,
    parse_assignment,
)
from cloister.cli.output import Output, clean, make_table
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.follow import JobView
    from cloister.cli.session import Session

app = typer.Typer(help="Training jobs.", no_args_is_help=True)

CHECKPOINT: Final = "base-model"  # the input that --model makes

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Job id, as `train list` shows it.")]


@dataclass(frozen=True, slots=True)
class JobRequest:
    """What a user wants trained. Paths are absolute."""

    script: bytes
    name: str
    nodes: int
    inputs: dict[str, Path]  # name -> sealed directory
    output: Path | None
    output_key: str
    seed: int = 1
    cores: tuple[int, ...] = ()
    args: Sequence[str] = field(default_factory=tuple)


@app.command(cls=WithJobArguments)
def submit(
    context: typer.Context,
    script: Annotated[Path | None, typer.Argument(help="Job script; default: the built-in text classifier.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="Ranks, one attested process each.")] = 2,
    input: Annotated[list[str] | None, typer.Option("--input", metavar="NAME=DIR", help="Sealed directory.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="DIR", help="Where sealed results go.")] = None,
    output_key: Annotated[str, typer.Option("--output-key", metavar="URI", help="Key to seal results with.")] = "",
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="BERT or PERT checkpoint to start from, plain or sealed."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="A name to recognise the job by.")] = "",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 1,
    core: Annotated[list[int] | None, typer.Option("--core", help="Core of each rank, in order of rank.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay and watch until the job ends.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Submit a job. Arguments behind `--` are the script's; `-- --help` does not reach it, its file tells."""
    from cloister.cli.measure import job_script_path

    path = existing_file(script, what="the job script") if script else job_script_path()
    named = dict(parse_assignment(text, option="--input") for text in input or [])
    request = JobRequest(
        script=path.read_bytes(),
        name=name or path.stem.replace("_", "-").lower(),
        nodes=nodes,
        inputs={key: existing_directory(Path(value), what=f"input {key}") for key, value in named.items()},
        output=output.absolute() if output else None,
        output_key=output_key,
        seed=seed,
        cores=tuple(core or ()),
        args=context.meta[JOB_ARGUMENTS],
    )
    checkpoint = existing_directory(model, what="the checkpoint") if model else None
    printer = Output(as_json=json)

    async def work(session: Session) -> None:
        wanted = await with_checkpoint(session, request, checkpoint, printer) if checkpoint else request
        job_id = await submit_job(session, wanted)
        if not follow:
            printer.result({"job_id": job_id}, lambda console: console.print(job_id, markup=False))
            return
        printer.note(f"job {job_id}")
        await _follow_to_the_end(session, job_id, printer)

    in_session(state, work)


async def with_checkpoint(session: Session, request: JobRequest, directory: Path, printer: Output) -> JobRequest:
    """Return the request with a checkpoint as an input of its own.

    A plain one is sealed beside the output, under its key: storage could change it on its way to the ranks, and a
    model that starts from a doctored checkpoint is not the owner's.
    """
    from cloister.cli.sealedfiles import seal_directory
    from cloister.sealed.manifest import MANIFEST_NAME

    if CHECKPOINT in request.inputs:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"--model and an input named {CHECKPOINT} do not go together",
            why="--model makes an input of this name",
            todo="give the input another name, or leave --model out",
        )
    if not (directory / MANIFEST_NAME).exists():
        if request.output is None:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="--model with a plain checkpoint needs --output and --output-key",
                why="the checkpoint is sealed beside the output, under its key, before the job reads it",
                todo="give both, or seal the checkpoint with `cloister seal` and name the sealed directory",
            )
        target = request.output.with_name(f"{request.output.name}-{CHECKPOINT}")
        sealed = await seal_directory(
            session,
            [directory],
            target,
            key_uri=request.output_key,
            dataset=CHECKPOINT,
            output=printer,
            published=False,
        )
        printer.note(f"sealed the checkpoint in {sealed['directory']}")
        directory = target
    inputs = {**request.inputs, CHECKPOINT: directory}
    return replace(request, inputs=inputs, args=("--model", CHECKPOINT, *request.args))


@app.command(name="list")
def list_(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    state: State = None,
    json: Json = False,
) -> None:
    """List your jobs, newest first."""

    async def work(session: Session) -> list[dict[str, Any]]:
        from cloister.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc

        stub = trainer_pb2_grpc.TrainerServiceStub(session.channel("trainer"))
        answer = await session.call(stub.ListJobs, trainer_pb2.ListJobsRequest(limit=limit), what="listing jobs")
        return [job_document(job) for job in answer.jobs]

    found = in_session(state, work)
    columns = ("job_id", "name", "state", "nodes", "created", "reason")
    Output(as_json=json).rows("jobs", found, columns, empty="no jobs yet: cloister train submit --help")


@app.command()
def show(job: JobArgument, state: State = None, json: Json = False) -> None:
    """Show one job: state, ranks, progress, results."""

    async def work(session: Session) -> dict[str, Any]:
        return await get_job(session, job)

    Output(as_json=json).item(in_session(state, work))


@app.command()
def watch(job: JobArgument, state: State = None, json: Json = False) -> None:
    """Watch a job until it ends. Ctrl-C stops watching; the job goes on."""
    printer = Output(as_json=json)

    async def work(session: Session) -> None:
        await _follow_to_the_end(session, job, printer)

    in_session(state, work)


@app.command()
def logs(
    job: JobArgument,
    rank: Annotated[int, typer.Option("--rank", min=-1, help="Only this rank; -1 means all.")] = -1,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job ends.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Print what a job's ranks wrote."""
    printer = Output(as_json=json)

    async def work(session: Session) -> None:
        from cloister.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
        from cloister.runtime.channel import stream

        stub = trainer_pb2_grpc.TrainerServiceStub(session.channel("trainer"))
        request = trainer_pb2.StreamLogsRequest(job_id=job, rank=rank, follow=follow)
        async for answer in stream(stub.StreamLogs, request, what="reading the job's logs"):
            printer.stream({"rank": answer.rank, "line": answer.line}, f"[{answer.rank}] {answer.line}")

    in_session(state, work)


@app.command()
def cancel(job: JobArgument, state: State = None, json: Json = False) -> None:
    """Cancel a job; its ranks stop at their next step."""

    async def work(session: Session) -> dict[str, Any]:
        from cloister.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc

        stub = trainer_pb2_grpc.TrainerServiceStub(session.channel("trainer"))
        answer = await session.call(stub.CancelJob, trainer_pb2.CancelJobRequest(job_id=job), what="cancelling the job")
        return job_document(answer.job)

    Output(as_json=json).item(in_session(state, work))


async def submit_job(session: Session, request: JobRequest) -> str:
    """Submit a job and return its id. Each input's manifest digest is computed here, from the files of the owner."""
    from cloister.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
    from cloister.sealed.directory import SealedDirectory

    if bool(request.output) != bool(request.output_key):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="--output and --output-key belong together",
            why="results are written sealed or not at all",
            todo="give both, or neither",
        )
    inputs = []
    for name, directory in request.inputs.items():
        sealed = SealedDirectory.peek(directory)
        inputs.append(
            trainer_pb2.SealedInput(
                name=name,
                uri=directory.as_uri(),
                key_uri=sealed.key_uri,
                manifest_digest=sealed.manifest_digest,
            )
        )
    output = None
    if request.output:
        output = trainer_pb2.SealedOutput(uri=request.output.as_uri(), key_uri=request.output_key)
    spec = trainer_pb2.JobSpec(
        name=request.name,
        script=request.script,
        args=request.args,
        nodes=request.nodes,
        inputs=inputs,
        output=output,
        seed=request.seed,
        cores=request.cores,
    )
    # The id lets a repeated call after a lost answer find the same job.
    call = trainer_pb2.SubmitJobRequest(spec=spec, client_request_id=secrets.token_hex(16))
    stub = trainer_pb2_grpc.TrainerServiceStub(session.channel("trainer"))
    answer = await session.call(stub.SubmitJob, call, what="submitting the job")
    return str(answer.job.job_id)


async def get_job(session: Session, job_id: str) -> dict[str, Any]:
    """Return one job as a document."""
    from cloister.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc

    stub = trainer_pb2_grpc.TrainerServiceStub(session.channel("trainer"))
    answer = await session.call(stub.GetJob, trainer_pb2.GetJobRequest(job_id=job_id), what="showing the job")
    return job_document(answer.job)


async def _follow_to_the_end(session: Session, job_id: str, printer: Output) -> None:
    from cloister.cli.follow import follow_job, raise_unless_succeeded

    try:
        view = await follow_job(session, job_id, output=printer, as_json=printer.as_json)
    except asyncio.CancelledError:
        printer.note(f"\nThe job goes on: cloister train watch {job_id}, or cloister train cancel {job_id}")
        raise
    raise_unless_succeeded(view, job_id)
    job = await get_job(session, job_id)
    if printer.as_json:
        printer.stream({"job": job}, "")
    else:
        printer.out.print(results_table(view, job))


def results_table(view: JobView, job: dict[str, Any]) -> Any:
    """Return the final figures as a table."""
    table = make_table("figure", "value", title=clean(f"job {job['job_id']} {job['state']}"))
    for name, value in sorted(job["results"].items()):
        table.add_row(clean(name.replace("_", " ")), f"{value:.2%}" if "accuracy" in name else f"{value:.4f}")
    table.add_row("seconds", f"{job['seconds']:.1f}")
    for name, uri in view.artifacts[-1:]:
        table.add_row(clean(name), clean(uri))
    return table


def job_document(job: Any) -> dict[str, Any]:
    """Return a job as JSON output shows it."""
    from cloister.cli.follow import state_name

    return {
        "job_id": job.job_id,
        "name": job.spec.name,
        "state": state_name(job.state),
        "reason": job.reason,
        "owner": job.owner,
        "nodes": job.spec.nodes,
        "args": list(job.spec.args),
        "created": _time(job.created_unix_ms),
        "started": _time(job.started_unix_ms),
        "ended": _time(job.ended_unix_ms),
        "seconds": max(0, job.ended_unix_ms - job.started_unix_ms) / 1000 if job.started_unix_ms else 0.0,
        "ranks": [
            {
                "rank": rank.rank,
                "state": rank.state,
                "process_id": rank.process_id,
                "core": rank.core,
                "samples_per_s": rank.samples_per_s,
                "exit_code": rank.exit_code,
            }
            for rank in job.ranks
        ],
        "results": dict(job.results),
        "output": job.spec.output.uri,
    }


def _time(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds") if unix_ms else ""
