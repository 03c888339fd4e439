# SPDX-License-Identifier: Apache-2.0
"""What a training script imports: its job, its sealed inputs and outputs, and a process group.

    job = cloister.train.context()
    job.init_process_group()                   # gloo over the coordinator's attested rendezvous
    rows = read_labelled_text(job.input("reviews"), "train.tsv")
    ...
    job.progress(epoch, epochs, step, steps, loss=loss, samples_per_s=rate)
    if job.rank == 0:
        job.output.save_model({"model.safetensors": ..., "config.json": ...})

Importing this package imports neither torch nor grpc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.train.job import Job

__all__ = ["activate", "context", "init_process_group"]

_active: list[Job] = []


def activate(job: Job) -> None:
    """Make this the process's job: once, by the rank, before the script runs."""
    if _active:
        raise RuntimeError("a job is already active in this process")
    _active.append(job)


def context() -> Job:
    """Return the job this process is a rank of."""
    if not _active:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="this process is not a rank of a Cloister job",
            why="the script was started on its own; its inputs can only be opened inside an attested rank",
            todo="submit it with `cloister train submit`",
        )
    return _active[0]


def init_process_group() -> None:
    """Join the job's ranks: torch.distributed with gloo on loopback and the coordinator's rendezvous."""
    context().init_process_group()
