# SPDX-License-Identifier: Apache-2.0
"""`cloister demo`: the whole path as a short story with times, and a report of everything that was attested."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    run_async,
    state_directory,
)
from cloister.cli.output import Output, make_table
from cloister.cli.stackconfig import Kms

if TYPE_CHECKING:
    from cloister.cli.demodata import DemoData
    from cloister.cli.follow import JobView
    from cloister.cli.launch import StackProcess
    from cloister.cli.session import Session
    from cloister.cli.state import StateDirectory
    from cloister.guest.owner import VerifiedService

MODEL: Final = "reviews"
# In the words of the generated sample, which knows few others; also the kind of thing that ChnSentiCorp holds.
TEXTS: Final = (
    "房间很整洁，而且服务很周到。",
    "屏幕非常昏暗，并且做工很粗糙。",
    "虽然纸张很单薄，但是内容非常充实。",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(cls=WithJobArguments)(demo)


def demo(
    context: typer.Context,
    data: Annotated[
        Path | None, typer.Option("--data", help="Your own train.tsv, dev.tsv, test.tsv; default: a generated sample.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="DIR", help="BERT or PERT checkpoint to start from.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the stack up when the story is over.")] = False,
    report: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Where the report goes.")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=64, help="Training ranks.")] = 2,
    rows: Annotated[int, typer.Option("--rows", min=24, help="Rows of the generated sample.")] = 3600,
    kms: Annotated[Kms, typer.Option("--kms", help="Where the key broker keeps the keys.")] = Kms.EMBEDDED,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the training.")] = 1,
    state: State = None,
    json: Json = False,
) -> None:
    """Seal a dataset, train on attested ranks, serve the model, and show the evidence for all of it.

    Arguments behind `--` go to the training script.
    """
    from cloister.cli.dev import make_options

    directory = state_directory(state)
    run = Run(
        state=directory,
        output=Output(as_json=json),
        data=existing_directory(data, what="the data") if data else None,
        checkpoint=existing_directory(model, what="the checkpoint") if model else None,
        nodes=nodes,
        rows=rows,
        seed=seed,
        keep=keep,
        args=context.meta[JOB_ARGUMENTS],
        report=(report or directory.root / "reports" / f"{_stamp()}.html").absolute(),
    )
    run_async(_with_stack(run, make_options(kms=kms)))


@dataclass(slots=True)
class Run:
    """One run of the story: its choices, and what came of it."""

    state: StateDirectory
    output: Output
    data: Path | None
    checkpoint: Path | None
    nodes: int
    rows: int
    seed: int
    keep: bool
    args: Sequence[str]
    report: Path
    started: float = field(default_factory=time.monotonic)
    steps: list[tuple[str, float]] = field(default_factory=list)
    rows_by_file: dict[str, int] = field(default_factory=dict)
    policies: list[tuple[str, str]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    job: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started

    def chapter(self, number: int, title: str) -> None:
        self.output.tell(f"\n{number}  {title}", style="bold")

    def say(self, text: str) -> None:
        self.output.tell(f"   {text}")

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Measure a step for the last table."""
        began = time.monotonic()
        yield
        self.steps.append((what, time.monotonic() - began))


async def _with_stack(run: Run, options: Any) -> None:
    """Tell the story beside a stack; whatever ends it ends the stack, unless it succeeded and the user keeps it."""
    from cloister.cli.dev import StartPrinter
    from cloister.cli.launch import StackProcess

    run.chapter(1, "A local stack: attest, keybroker, trainer, gateway; each enrols with a quote")
    stack = await StackProcess.start(run.state, options)
    kept = False
    try:
        run.steps.append(("stack up, four services enrolled", await stack.ready(StartPrinter(run.output).show)))
        await _unless_stack_fails(stack, run)
        if run.keep:
            stack.release()
            kept = True
    finally:
        if not kept:
            await stack.stop()
            run.say("the stack is stopped; nothing of it runs")


async def _unless_stack_fails(stack: StackProcess, run: Run) -> None:
    """Tell the story; when a service dies meanwhile, raise its last words instead of what they led to."""
    story = asyncio.ensure_future(_story(run))
    failure = asyncio.ensure_future(stack.failed())
    try:
        await asyncio.wait({story, failure}, return_when=asyncio.FIRST_COMPLETED)
        if failure.done() and (error := failure.result()) is not None:
            raise error
        await story
    finally:
        for task in (story, failure):
            task.cancel()
        await asyncio.gather(story, failure, return_exceptions=True)


async def _story(run: Run) -> None:
    from cloister.cli.model import remove_model
    from cloister.cli.session import open_session

    name = _stamp()
    scratch = run.state.root / "demo" / name
    scratch.mkdir(mode=0o700, parents=True)
    data_uri, model_uri = (f"cloister-key://demo/{kind}/reviews-{name}" for kind in ("datasets", "models"))
    try:
        async with open_session(run.state) as session:
            await _keys_and_sealing(run, session, scratch, data_uri=data_uri, model_uri=model_uri)
            view = await _training(run, session, scratch, model_uri=model_uri)
            await _serving(run, session, scratch / "out" / "model")
            await _predicting(run, session)
            await _ending(run, session, view)
            if run.keep:
                _what_now(run, session)
            else:
                # The next stack of this state directory would load it again.
                await remove_model(session, MODEL)
    finally:
        # Also after Ctrl-C: no plaintext stays behind.
        shutil.rmtree(scratch / "plaintext", ignore_errors=True)


async def _keys_and_sealing(run: Run, session: Session, scratch: Path, *, data_uri: str, model_uri: str) -> None:
    from cloister.cli.demodata import prepare, require_only_ciphertext
    from cloister.cli.keys import create_key
    from cloister.cli.sealedfiles import seal_directory
    from cloister.cli.state import SERVICES
    from cloister.cli.trust import verify_services
    from cloister.guest.operator import OperatorClient

    run.chapter(2, "Keys with release policies; the data is sealed")
    data: DemoData = await asyncio.to_thread(prepare, run.data, scratch, rows=run.rows)
    run.rows_by_file = data.rows
    origin = "generated a sample" if data.own else f"checked {data.directory}"
    run.say(f"{origin}: " + ", ".join(f"{count:,} rows in {name}" for name, count in data.rows.items()))
    with run.timed("verifying the four services"):
        verified = await verify_services(session, SERVICES)
    run.say(f"verified here, before trusting them: {', '.join(verified)} ({_passed(verified)} checks)")
    for uri, draft in _policies(session, data_uri, model_uri, image=verified["attest"]).items():
        text = draft.to_yaml()
        run.policies.append((uri, text))
        await create_key(session, uri, purposes=list(draft.purposes), policy=text.encode())
        run.say(f"key {uri}")
        run.say(
            f"    for {' and '.join(draft.purposes)}: {len(draft.scripts)} script(s), the environment and image pinned"
        )
    home = await OperatorClient(session.credentials, verified["keybroker"]).backend_status()
    run.say(f"they live behind {home.name}" + (f" ({', '.join(home.capabilities)})" if home.capabilities else ""))
    with run.timed("sealing"):
        sealed = await seal_directory(
            session, [data.directory], scratch / "sealed", key_uri=data_uri, dataset=MODEL, output=run.output
        )
    run.say(f"sealed {sealed['files']} files, {sealed['bytes'] / 1e6:.2f} MB, in {run.steps[-1][1]:.2f} s")
    texts = data.texts()
    data.remove()
    run.say("removed the plaintext" if data.own else "your own files stay as they are; the job gets another directory")
    searched = await asyncio.to_thread(require_only_ciphertext, scratch / "sealed", texts)
    run.say(f"searched all {searched:,} bytes of the job's input: none of {len(texts):,} texts is in it")


def _policies(session: Session, data_uri: str, model_uri: str, *, image: VerifiedService) -> dict[str, Any]:
    """Return the two policies: who may have the data, and who may write and read the model.

    A script alone proves little, since what runs it could do anything: the policies pin this installation's
    environment, and the image that was just verified under attest.
    """
    from cloister.cli.measure import digest_of_file, environment_digest, handler_path, job_script_path
    from cloister.cli.policyfile import PolicyDraft

    prefix = f"spiffe://{session.stack.trust_domain}/ns/{session.tenant}"
    ranks, backends = f"{prefix}/job/*/rank/*", f"{prefix}/model/{MODEL}/backend/*"
    job, handler = digest_of_file(job_script_path()), digest_of_file(handler_path())
    body = image.evidence.body
    pinned: dict[str, Any] = {
        "environments": (environment_digest(),),
        "measurements": {
            name: (value.hex(),)
            for name, value in (("mr_td", body.mr_td), ("rtmr1", body.rtmrs[1]), ("rtmr2", body.rtmrs[2]))
        },
        "simulated": session.stack.simulated,
    }
    owner = session.stack.user
    return {
        data_uri: PolicyDraft("demo-data", owner, data_uri, ("train",), (job,), (ranks,), **pinned),
        model_uri: PolicyDraft(
            "demo-model", owner, model_uri, ("train", "serve"), (job, handler), (ranks, backends), **pinned
        ),
    }


async def _training(run: Run, session: Session, scratch: Path, *, model_uri: str) -> JobView:
    from cloister.cli.demodata import SPLITS
    from cloister.cli.follow import follow_job, raise_unless_succeeded
    from cloister.cli.measure import job_script_path
    from cloister.cli.train import JobRequest, get_job, submit_job, with_checkpoint

    run.chapter(3, f"Training on {run.nodes} attested ranks")
    preset = "sample" if run.data is None else "chnsenticorp"
    request = JobRequest(
        script=job_script_path().read_bytes(),
        name="demo",
        nodes=run.nodes,
        inputs={MODEL: scratch / "sealed"},
        output=scratch / "out",
        output_key=model_uri,
        seed=run.seed,
        args=("--preset", preset, *run.args),
    )
    if run.checkpoint:
        request = await with_checkpoint(session, request, run.checkpoint, run.output)
    with run.timed(f"the job, start to end ({run.rows_by_file.get(SPLITS[0], 0):,} rows)"):
        job_id = await submit_job(session, request)
        run.say(f"job {job_id}")
        view = await follow_job(session, job_id, output=run.output)
    raise_unless_succeeded(view, job_id)
    run.job = await get_job(session, job_id)
    for what, phase in (("   enrolment of a rank", "enrolled"), ("   key release to a rank", "key-released")):
        if seconds := view.phase_seconds(phase):
            run.steps.append((what, max(seconds)))
    if seconds := view.phase_seconds("trained"):
        run.steps.append(("   training", max(seconds)))
    run.say("  ".join(f"{name.replace('_', ' ')} {value:.2%}" for name, value in _accuracies(run.job)))
    return view


async def _serving(run: Run, session: Session, sealed: Path) -> None:
    from cloister.cli.measure import handler_path
    from cloister.cli.model import deploy_model, list_models, remove_model

    run.chapter(4, "The sealed model behind TorchServe; its backend enrols like a rank")
    if any(model["name"] == MODEL for model in await list_models(session)):
        await remove_model(session, MODEL)
        run.say("removed the model of an earlier run")
    with run.timed("deploying the model"):
        run.model = await deploy_model(
            session, sealed, name=MODEL, handler_source=handler_path().read_bytes(), cores=[], output=run.output
        )
    cores = ", ".join(map(str, run.model["cores"]))
    run.say(f"{MODEL} is {run.model['state']} on core {cores}, process {run.model['backend_process_id']}")
    for name, seconds in run.model["timings_s"].items():
        run.say(f"    {name:<20} {seconds:6.2f} s")


async def _predicting(run: Run, session: Session) -> None:
    from cloister.cli.predict import curl_command, predict_grpc, predict_https

    run.chapter(5, "Predictions, over gRPC and over HTTPS, with your certificate")
    texts = list(TEXTS)
    for over, predict in (("gRPC", predict_grpc), ("HTTPS", predict_https)):
        with run.timed(f"first prediction over {over}"):
            answer = await predict(session, MODEL, texts)
        for text, prediction in zip(texts, answer["predictions"], strict=True):
            run.predictions.append({"text": text, "over": over, **prediction})
            run.say(f"{over:<6} {prediction['label']:<9} {prediction['probability']:.3f}  {text}")
    run.say("the same with curl:")
    run.say(curl_command(session, MODEL, texts[:1]))


async def _ending(run: Run, session: Session, view: JobView) -> None:
    from cloister.cli.demoreport import make_report
    from cloister.cli.report import write_report

    run.chapter(6, "What came of it")
    write_report(await make_report(run, session, view), run.report)

    def render(console: Any) -> None:
        table = make_table("", "value")
        for name, value in _accuracies(run.job):
            table.add_row(name.replace("_", " "), f"{value:.2%}")
        for what, seconds in run.steps:
            table.add_row(what, f"{seconds:.2f} s")
        table.add_row("everything", f"{run.elapsed_s:.1f} s")
        console.print(table)
        run.say(f"report: {run.report}")

    run.output.result(
        {
            "results": run.job["results"],
            "steps": [{"what": what.strip(), "seconds": round(seconds, 3)} for what, seconds in run.steps],
            "seconds": round(run.elapsed_s, 1),
            "predictions": run.predictions,
            "job": run.job,
            "model": run.model,
            "report": str(run.report),
        },
        render,
    )


def _what_now(run: Run, session: Session) -> None:
    """Print commands for a stack that stays up."""
    from cloister.cli.predict import grpcurl_command

    run.say("")
    run.say("The stack stays up. With grpcurl:")
    for method, request in (
        ("cloister.api.serving.v1.InferenceService/Predict", {"model": MODEL, "texts": list(TEXTS[:1])}),
        ("cloister.api.serving.v1.ModelService/ListModels", {}),
        ("list", None),
    ):
        run.say("   " + grpcurl_command(session, method, request))
    run.say("Or with this command:")
    for command in (f"predict --model {MODEL} {TEXTS[1]}", "attest verdicts --checks", "key decisions", "dev down"):
        run.say(f"   cloister --state {run.state.root} {command}")


def _accuracies(job: dict[str, Any]) -> list[tuple[str, float]]:
    return [(name, value) for name, value in sorted(job["results"].items()) if "accuracy" in name]


def _passed(verified: dict[str, Any]) -> int:
    return sum(len(service.checks) for service in verified.values())


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
