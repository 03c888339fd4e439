# SPDX-License-Identifier: Apache-2.0
"""The job as its script sees it: who am I, what may I read, where do I write, how do I report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.sealed.directory import SealedDirectory
    from cloister.train.output import Output


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one rank is."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    samples_per_s: float  # of this rank
    eta_s: float  # -1 when unknown


class Reporter(Protocol):
    """Carries what a rank says to its coordinator; never blocks training, never raises for a lost message."""

    @property
    def cancelled(self) -> bool: ...
    def message(self, phase: str, text: str, elapsed_s: float) -> None: ...
    def progress(self, progress: Progress) -> None: ...
    def metrics(self, values: Mapping[str, float], *, step: int, final: bool) -> None: ...
    def artifact(self, name: str, uri: str, manifest_digest: bytes) -> None: ...


@dataclass(slots=True, kw_only=True)
class Job:
    """One rank's view of its job."""

    rank: int
    world_size: int
    seed: int
    args: tuple[str, ...]
    inputs: Mapping[str, SealedDirectory]
    reporter: Reporter
    join: Callable[[], None]  # makes the process group
    sealed_output: Output | None = None  # rank 0 only: the others get no key to write with
    clock: Callable[[], float] = time.monotonic
    _started: tuple[int, float] | None = field(default=None, init=False)  # first step seen, and when

    def input(self, name: str) -> SealedDirectory:
        """Return the input of this name, opened and verified."""
        if name not in self.inputs:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"the job has no input {name!r}",
                why=f"it was submitted with {', '.join(sorted(self.inputs)) or 'none'}",
                todo="use one of these names, or submit with that input",
            )
        return self.inputs[name]

    def sole_input(self, *, besides: str = "") -> str:
        """Return the name of the only input, leaving out one that has another use."""
        names = sorted(self.inputs.keys() - {besides})
        if len(names) != 1:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="it is not clear which input holds the data",
                why=f"the job has {len(names)} to choose from: {', '.join(names) or 'none'}",
                todo="name it in the script's arguments",
            )
        return names[0]

    @property
    def output(self) -> Output:
        """Return the sealed output; only rank 0 has one."""
        if self.sealed_output is None:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"rank {self.rank} cannot write the job's output",
                why="only rank 0 of a job with an output gets the output's key",
                todo="submit with an output and save under `if job.rank == 0`",
            )
        return self.sealed_output

    @property
    def cancelled(self) -> bool:
        """True when the owner cancelled the job; let all ranks agree, then return."""
        return self.reporter.cancelled

    def report(self, phase: str, text: str = "", *, elapsed_s: float = 0.0) -> None:
        """Tell the job's watchers of a milestone; `elapsed_s` is how long it took."""
        self.reporter.message(phase, text, elapsed_s)

    def progress(self, epoch: int, epochs: int, step: int, steps: int, *, loss: float, samples_per_s: float) -> None:
        """Publish where this rank is; call as often as you like, the latest call is what is sent."""
        now = self.clock()
        if self._started is None or step < self._started[0]:
            self._started = (step, now)
        first, since = self._started
        eta_s = (now - since) / (step - first) * (steps - step) if step > first else -1.0
        self.reporter.progress(Progress(epoch, epochs, step, steps, loss, samples_per_s, eta_s))

    def log_metrics(self, values: Mapping[str, float], *, step: int, final: bool = False) -> None:
        """Record figures of a step, from rank 0 only; with `final` they stay as the job's results (latest wins)."""
        if self.rank == 0:
            self.reporter.metrics(values, step=step, final=final)

    def init_process_group(self) -> None:
        """Join the job's ranks: torch.distributed with gloo on loopback and the coordinator's rendezvous."""
        self.join()
