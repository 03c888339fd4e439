# SPDX-License-Identifier: Apache-2.0
"""The same script, seed and cores: a sealed, attested job against plain torchrun, interleaved.

    python benchmarks/bench_train.py --preset sample --pairs 3
    python benchmarks/bench_train.py --preset chnsenticorp --data DIRECTORY --pairs 3 -- --epochs 2

Prints one line a run (seconds of the whole job, seconds of training, accuracy, digest of the weights), then the
ratios of the pairs' medians. The digests must be equal: attestation and sealing change no bit of a model.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

SCRIPT = Path(__file__).resolve().parent.parent / "lib/cloister/train/scripts/text_classifier.py"
RANKS = 2
SEED = 1


@dataclass(frozen=True)
class Run:
    """One run of either kind."""

    wall_s: float
    training_s: float
    accuracy: float
    digest: str


class PlainDirectory:
    """A directory in the clear, where the script expects a sealed one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.files = tuple(sorted(entry.name for entry in path.iterdir()))

    def open_file(self, name: str) -> Any:
        return (self._path / name).open("rb", buffering=0)

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()


class PlainOutput:
    """Checkpoints and model in the clear."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def save_model(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            (self._path / name).write_bytes(data)

    def save_checkpoint(self, step: int, tensors: Mapping[str, Any], *, about: Mapping[str, str]) -> bool:
        import safetensors.torch

        safetensors.torch.save_file(dict(tensors), self._path / f"{step}.safetensors", metadata=dict(about))
        return True


class Printer:
    """A reporter that keeps the figures for the parent."""

    cancelled = False

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[str, float] = {}

    def message(self, phase: str, _text: str, elapsed_s: float) -> None:
        self._keep({phase: elapsed_s})

    def progress(self, _progress: Any) -> None:
        pass

    def metrics(self, values: Mapping[str, float], **_: Any) -> None:
        self._keep(values)

    def artifact(self, *_: Any) -> None:
        pass

    def _keep(self, values: Mapping[str, float]) -> None:
        self._figures |= values
        self._path.write_text(json.dumps(self._figures))


def plain_rank(data: Path, out: Path, args: Sequence[str]) -> None:
    """Be one rank under torchrun: the script's own context, without Cloister around it."""
    import torch
    import torch.distributed as dist

    import cloister.train
    from cloister.train.job import Job

    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank]})
    torch.set_num_threads(1)
    job: Any = Job(
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        seed=SEED,
        args=tuple(args),
        inputs={"data": PlainDirectory(data)},  # type: ignore[dict-item]  # what the script uses of it
        reporter=Printer(out / f"figures-{rank}.json"),
        join=lambda: dist.init_process_group("gloo"),
        sealed_output=PlainOutput(out) if rank == 0 else None,  # type: ignore[arg-type]
    )
    cloister.train.activate(job)
    exec(compile(SCRIPT.read_bytes(), str(SCRIPT), "exec"), {"__name__": "__main__", "__doc__": "-"})
    dist.destroy_process_group()


def run_plain(data: Path, args: Sequence[str]) -> Run:
    """Train under torchrun."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
        command += [__file__, "--plain-rank", str(out), "--data", str(data), "--", *args]
        began = time.monotonic()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        wall_s = time.monotonic() - began
        figures = json.loads((out / "figures-0.json").read_text())
        digest = hashlib.sha384((out / "model.safetensors").read_bytes()).hexdigest()
        return Run(wall_s, figures["trained"], figures["test_accuracy"], digest)


def run_sealed(stack: Any, data: Any, out: Path, args: Sequence[str]) -> Run:
    """Train as a job of a running stack."""
    from fakes.trainer_harness import client_of, pb

    async def work() -> tuple[Any, float]:
        async with client_of(stack) as client:
            request = pb.JobSpec(name="bench", script=SCRIPT.read_bytes(), nodes=RANKS, seed=SEED, args=args)
            request.inputs.append(data.input())
            request.output.CopyFrom(data.output(out))
            job = await client.submit(request)
            trained = 0.0
            async for event in client.watch(job.job_id):
                if event.message.phase == "trained":
                    trained = event.message.elapsed_s
            return await client.job(job.job_id), trained

    job, trained = asyncio.run(work())
    if job.state != pb.JOB_STATE_SUCCEEDED:
        raise SystemExit(f"the job did not succeed: {job.reason}")
    weights = stack.open(out / "model").read("model.safetensors")
    wall_s = (job.ended_unix_ms - job.created_unix_ms) / 1000
    return Run(wall_s, trained, job.results["test_accuracy"], hashlib.sha384(weights).hexdigest())


def compare(data: Path, args: Sequence[str], pairs: int) -> None:
    """Run the pairs and print what came out."""
    from fakes.trainer_harness import running_stack

    runs: dict[str, list[Run]] = {"torchrun": [], "cloister": []}
    cores = tuple(sorted(os.sched_getaffinity(0))[:RANKS])
    with tempfile.TemporaryDirectory() as directory, running_stack(Path(directory) / "stack", cores=cores) as stack:
        sealed = stack.provision(data, scripts=[SCRIPT.read_bytes()])
        for pair in range(pairs):
            runs["torchrun"].append(run_plain(data, args))
            runs["cloister"].append(run_sealed(stack, sealed, Path(directory) / f"out-{pair}", args))
            for name, found in runs.items():
                run = found[-1]
                print(
                    f"{name:9} job {run.wall_s:6.1f} s  training {run.training_s:6.1f} s  "
                    f"test accuracy {run.accuracy:.4f}  weights {run.digest[:16]}",
                    flush=True,
                )
    same = len({run.digest for found in runs.values() for run in found}) == 1
    for figure in ("wall_s", "training_s"):
        ratios = [
            getattr(ours, figure) / getattr(theirs, figure)
            for ours, theirs in zip(runs["cloister"], runs["torchrun"], strict=True)
        ]
        print(f"median ratio of {figure}: {statistics.median(ratios):.3f}  ({', '.join(f'{r:.3f}' for r in ratios)})")
    print(f"weights bit-identical in all {2 * pairs} runs: {'yes' if same else 'NO'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=("sample", "chnsenticorp"), default="sample")
    parser.add_argument("--data", type=Path, help="directory with train.tsv, dev.tsv, test.tsv; default: the sample")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--plain-rank", type=Path, metavar="OUT", help=argparse.SUPPRESS)
    parser.add_argument("args", nargs="*", help="more arguments of the script")
    options = parser.parse_args()
    if options.plain_rank:
        plain_rank(options.data, options.plain_rank, options.args)
        return
    args = ["--preset", options.preset, *options.args]
    if options.data:
        compare(options.data.resolve(), args, options.pairs)
        return
    from cloister.data.sample import generate_sample

    with tempfile.TemporaryDirectory() as directory:
        generate_sample(Path(directory) / "sample")
        compare(Path(directory) / "sample", args, options.pairs)


if __name__ == "__main__":
    main()
