# SPDX-License-Identifier: Apache-2.0
"""A job's events as a person follows them: a live table on a terminal, plain lines anywhere else.

`JobView` is the state and has no I/O: events go in, lines and a table come out.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from cloister.cli.output import Output, clean, make_table
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cloister.cli.session import Session

ENDED: Final = frozenset({"succeeded", "failed", "cancelled"})
_PLAIN_INTERVAL_S: Final = 2.0  # between progress lines where there is no terminal


@dataclass(slots=True)
class RankView:
    """What is known of one rank."""

    phase: str = "starting"
    phases: list[tuple[str, str, float]] = field(default_factory=list)  # (phase, text, seconds it took)
    samples_per_s: float = 0.0


@dataclass(slots=True)
class JobView:
    """What is known of one job, from its events."""

    state: str = "queued"
    reason: str = ""
    ranks: dict[int, RankView] = field(default_factory=dict)
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    eta_s: float = -1.0
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, loss) of rank 0
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    artifacts: list[tuple[str, str]] = field(default_factory=list)
    states: list[tuple[str, int]] = field(default_factory=list)  # (state, Unix milliseconds)
    last_sequence: int = 0

    def apply(self, event: Any) -> str:
        """Take one event in; return a line worth a reader's time, or "" when it only moves the figures."""
        self.last_sequence = event.sequence
        match event.WhichOneof("kind"):
            case "state_changed":
                self.state, self.reason = state_name(event.state_changed.state), event.state_changed.reason
                self.states.append((self.state, event.time_unix_ms))
                return f"job {self.state}" + (f": {self.reason}" if self.reason else "")
            case "message":
                return self._message(event.rank, event.message)
            case "progress":
                self._progress(event.rank, event.progress)
            case "metrics":
                values = dict(event.metrics.values)
                self.metrics.append((event.metrics.step, values))
                return f"step {event.metrics.step:,}  " + "  ".join(
                    f"{name.replace('_', ' ')} {value:.4f}" for name, value in sorted(values.items())
                )
            case "artifact":
                self.artifacts.append((event.artifact.name, event.artifact.uri))
                return f"wrote {event.artifact.name}, sealed"
        return ""

    def _message(self, number: int, message: Any) -> str:
        who = "coordinator" if number < 0 else f"rank {number}"
        if number >= 0:
            rank = self._rank(number)
            rank.phase = message.phase
            rank.phases.append((message.phase, message.text, message.elapsed_s))
        took = f"  ({message.elapsed_s:.2f} s)" if message.elapsed_s else ""
        return f"{who}: {message.phase}" + (f"  {message.text}" if message.text else "") + took

    def _progress(self, number: int, progress: Any) -> None:
        rank = self._rank(max(number, 0))
        rank.samples_per_s = progress.samples_per_s
        rank.phase = "training"
        if number > 0:
            return
        self.epoch, self.epochs, self.step, self.steps = (
            progress.epoch,
            progress.epochs,
            progress.step,
            progress.steps,
        )
        self.loss, self.eta_s = progress.loss, progress.eta_s
        if not self.curve or progress.step > self.curve[-1][0]:
            self.curve.append((progress.step, progress.loss))

    def _rank(self, number: int) -> RankView:
        return self.ranks.setdefault(number, RankView())

    def progress_line(self) -> str:
        """Return the figures on one line; empty before the first step."""
        if not self.steps:
            return ""
        speed = "  ".join(f"rank {n} {rank.samples_per_s:,.0f}/s" for n, rank in sorted(self.ranks.items()))
        eta = f"  ETA {self.eta_s:,.0f} s" if self.eta_s >= 0 else ""
        return (
            f"epoch {self.epoch}/{self.epochs}  step {self.step:,}/{self.steps:,}  loss {self.loss:.4f}  {speed}{eta}"
        )

    def phase_seconds(self, phase: str) -> list[float]:
        """Return how long a phase took, rank by rank."""
        return [took for _, rank in sorted(self.ranks.items()) for name, _, took in rank.phases if name == phase]

    def render(self) -> RenderableType:
        """Return the live view: one bar, one line a rank, the accuracies so far."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        table = make_table("rank", "phase", "samples/s", "times")
        for number, rank in sorted(self.ranks.items()):
            times = "  ".join(f"{name} {took:.2f} s" for name, _, took in rank.phases if took)
            speed = f"{rank.samples_per_s:,.0f}" if rank.samples_per_s else ""
            table.add_row(str(number), clean(rank.phase), speed, clean(times))
        parts: list[RenderableType] = [Text(f"job {self.state}   {self.progress_line()}")]
        if self.steps:
            parts.append(ProgressBar(total=self.steps, completed=self.step, width=60))
        return Group(*parts, table)


def state_name(state: Any) -> str:
    """Return "running" for JOB_STATE_RUNNING."""
    from cloister.api.trainer.v1 import trainer_pb2

    return trainer_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()


async def follow_job(session: Session, job_id: str, *, output: Output, as_json: bool = False) -> JobView:
    """Show a job's events until it ends, or with `as_json` put them on stdout; return what it came to."""
    view = JobView()
    events = _events(session, job_id)
    if as_json:
        async for event in events:
            view.apply(event)
            output.stream(_event_document(event), "")
    elif output.err.is_terminal:
        await _follow_live(view, events, output)
    else:
        await _follow_plain(view, events, output)
    return view


async def _follow_live(view: JobView, events: AsyncIterator[Any], output: Output) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(view.render(), console=output.err, refresh_per_second=8, transient=True) as live:
        async for event in events:
            line = view.apply(event)
            if line:
                live.console.print(Text(f"   {clean(line)}", style="dim"))
            live.update(view.render())


async def _follow_plain(view: JobView, events: AsyncIterator[Any], output: Output) -> None:
    said = -_PLAIN_INTERVAL_S
    async for event in events:
        line = view.apply(event)
        if not line and time.monotonic() - said >= _PLAIN_INTERVAL_S:
            line = view.progress_line()
            said = time.monotonic()
        if line:
            output.note(f"   {line}")


async def _events(session: Session, job_id: str) -> AsyncIterator[Any]:
    from cloister.api.trainer.v1 import trainer_pb2, trainer_pb2_grpc
    from cloister.runtime.channel import stream

    stub = trainer_pb2_grpc.TrainerServiceStub(session.channel("trainer"))
    request = trainer_pb2.WatchJobRequest(job_id=job_id)
    async for answer in stream(stub.WatchJob, request, what="watching the job"):
        yield answer.event


def _event_document(event: Any) -> dict[str, Any]:
    from google.protobuf.json_format import MessageToDict

    document: dict[str, Any] = MessageToDict(event, preserving_proto_field_name=True)
    return document


def raise_unless_succeeded(view: JobView, job_id: str) -> None:
    """Raise CloisterError(JOB_FAILED) with the first failing rank's own explanation."""
    if view.state == "succeeded":
        return
    if view.state == "cancelled":
        raise CloisterError(
            Code.JOB_ENDED, what=f"job {job_id} was cancelled", why=view.reason, todo="submit it again to run it"
        )
    raise CloisterError(
        Code.JOB_FAILED,
        what=f"job {job_id} {view.state}",
        why=view.reason or "it gave no reason",
        todo=f"cloister train logs {job_id}",
    )
