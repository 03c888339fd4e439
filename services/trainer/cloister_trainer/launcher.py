# SPDX-License-Identifier: Apache-2.0
"""Ranks as local processes: each in its own session, with a lifeline, a log file and an environment we spell out."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from cloister.atomicfile import write_atomically
from cloister.errors import Code
from cloister.runtime.supervisor import Child, Supervisor
from cloister_trainer.job import Failure, JobRecord
from cloister_trainer.rankspec import RankInput, RankSpec

_TAIL_BYTES: Final = 16 * 1024
_MAX_FAILURE_BYTES: Final = 64 * 1024

# Ranks inherit nothing from the coordinator's environment but these.
_INHERITED: Final = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR")
_RANK_ENVIRONMENT: Final[Mapping[str, str]] = {
    # A TD has no business with model hubs.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    # One core a rank: more threads would only take turns.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GRPC_VERBOSITY": "ERROR",
}


@dataclass(frozen=True, slots=True)
class Places:
    """What every rank is told of its surroundings."""

    attest_endpoint: str  # for enrolment
    keybroker_endpoint: str
    provider: str
    trust_bundle: Path
    collective_timeout_s: float


class RankProcess(Protocol):
    """A rank that was started."""

    @property
    def pid(self) -> int: ...
    async def wait(self) -> int: ...


class Launcher(Protocol):
    """Where ranks run."""

    def prepare(self, record: JobRecord) -> None:
        """Put the job's script where its ranks read it."""

    async def start(self, record: JobRecord, rank: int) -> RankProcess: ...
    async def stop(self, process: Any, grace_s: float) -> None:
        """End a rank and everything it started: told first, killed after `grace_s`."""

    def failure(self, job_id: str, rank: int) -> Failure | None:
        """Return what a rank without an identity left behind."""

    def log_tail(self, job_id: str, rank: int, lines: int) -> list[str]: ...


class LocalLauncher:
    """Ranks on this machine."""

    def __init__(self, supervisor: Supervisor, state_dir: Path, places: Places) -> None:
        self._supervisor = supervisor
        self._jobs = state_dir / "jobs"
        self._places = places
        self.trainer_endpoint = ""  # known once the server listens

    def prepare(self, record: JobRecord) -> None:
        directory = self._directory(record.job_id)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(directory / "script.py", record.spec.script)

    async def start(self, record: JobRecord, rank: int) -> Child:
        directory = self._directory(record.job_id)
        spec_file = directory / f"rank-{rank}.json"
        write_atomically(spec_file, self._spec(record, rank).to_json())
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        return await self._supervisor.start(
            f"{record.job_id}/{rank}",
            # -I: neither the directory nor PYTHON* variables decide what is imported. -u: a log one can follow.
            [sys.executable, "-I", "-u", "-m", "cloister_trainer.rank", "--spec", str(spec_file)],
            env={**environment, **_RANK_ENVIRONMENT, "HOME": str(directory)},
            log_path=self.log_path(record.job_id, rank),
            cores=[record.ranks[rank].core],
            cwd=directory,
        )

    async def stop(self, process: Child, grace_s: float) -> None:
        await self._supervisor.stop(process, grace_s)

    def failure(self, job_id: str, rank: int) -> Failure | None:
        path = self._failure_file(job_id, rank)
        try:
            with path.open("rb") as file:
                found = json.loads(file.read(_MAX_FAILURE_BYTES))
            texts = {name: str(found[name])[:2000] for name in ("code", "what", "why", "todo")}
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return Failure(rank, texts["code"] or Code.RANK_FAILED.text, texts["what"], texts["why"], texts["todo"])

    def log_path(self, job_id: str, rank: int) -> Path:
        return self._directory(job_id) / f"rank-{rank}.log"

    def log_tail(self, job_id: str, rank: int, lines: int) -> list[str]:
        try:
            with self.log_path(job_id, rank).open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - _TAIL_BYTES))
                return list(deque(file.read().decode("utf-8", "replace").splitlines(), lines))
        except FileNotFoundError:
            return []

    def _directory(self, job_id: str) -> Path:
        return self._jobs / job_id

    def _failure_file(self, job_id: str, rank: int) -> Path:
        return self._directory(job_id) / f"rank-{rank}.failure.json"

    def _spec(self, record: JobRecord, rank: int) -> RankSpec:
        spec, places = record.spec, self._places
        return RankSpec(
            job_id=record.job_id,
            tenant=record.tenant,
            rank=rank,
            world_size=spec.nodes,
            script_file=str(self._directory(record.job_id) / "script.py"),
            script_name=f"{spec.name}.py",
            args=spec.args,
            seed=spec.seed,
            inputs=tuple(RankInput(i.name, str(i.directory), i.key_uri, i.manifest_digest.hex()) for i in spec.inputs),
            output_directory=str(spec.output.directory) if spec.output else "",
            output_key_uri=spec.output.key_uri if spec.output else "",
            core=record.ranks[rank].core,
            collective_timeout_s=places.collective_timeout_s,
            trainer_endpoint=self.trainer_endpoint,
            attest_endpoint=places.attest_endpoint,
            keybroker_endpoint=places.keybroker_endpoint,
            provider=places.provider,
            trust_bundle_file=str(places.trust_bundle),
            failure_file=str(self._failure_file(record.job_id, rank)),
        )
