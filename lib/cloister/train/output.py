# SPDX-License-Identifier: Apache-2.0
"""What a job leaves behind, sealed: checkpoints while it trains, the model at its end. Rank 0 writes.

    <output>/checkpoints/<step, 12 digits>/   tensors.safetensors, about.json; written once, never overwritten
    <output>/model/                           the files of `save_model`

Each is a sealed directory, and one without a manifest does not count: a full disk or a killed rank leaves earlier
checkpoints whole. Each has the job and its place as dataset name, so one cannot stand in for another.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from cloister.data.tensors import load_tensors, save_tensors
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import Peek, SealedDirectory, SealedDirectoryWriter
from cloister.sealed.manifest import MANIFEST_NAME, Manifest

if TYPE_CHECKING:
    import torch

TENSORS: Final = "tensors.safetensors"
ABOUT: Final = "about.json"
_STEP: Final = re.compile(r"[0-9]{12}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory."""

    step: int
    tensors: Mapping[str, torch.Tensor]
    about: Mapping[str, str]


class Announcer(Protocol):
    """Hears of what was written, and of what could not be."""

    def message(self, phase: str, text: str, elapsed_s: float) -> None: ...
    def artifact(self, name: str, uri: str, manifest_digest: bytes) -> None: ...


class Output:
    """The sealed output of one job."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        model_key: DataKey,
        checkpoint_key: DataKey,
        open_key: Callable[[Peek], DataKey],
        announcer: Announcer,
    ) -> None:
        """`name` is what these outputs are called in manifests: the same for every job that may resume another's."""
        self.directory = directory
        self._name = name
        self._model_key = model_key
        self._checkpoint_key = checkpoint_key
        self._open_key = open_key
        self._announcer = announcer

    def require_room_for_a_model(self) -> None:
        """Raise CloisterError(FILE_EXISTS) when there is a model already: better before training than after."""
        if (self.directory / "model" / MANIFEST_NAME).exists():
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"{self.directory} already holds a model",
                why="a sealed model is never overwritten",
                todo="submit with another output directory",
            )

    def save_model(self, files: Mapping[str, bytes | Mapping[str, torch.Tensor]]) -> None:
        """Seal the final model; tensors become a safetensors file, from their own memory.

        Raises CloisterError when there is a model already or the disk is full.
        """
        where = self.directory / "model"
        manifest = self._seal(where, f"{self._name}/model", self._model_key, files)
        self._announcer.artifact("model", where.as_uri(), manifest.digest)

    def save_checkpoint(
        self, step: int, tensors: Mapping[str, torch.Tensor], *, about: Mapping[str, str] | None = None
    ) -> bool:
        """Seal a checkpoint; return False, after an event, when it cannot be written: training goes on."""
        where = self._checkpoints / f"{step:012d}"
        facts = json.dumps(dict(about or {}), sort_keys=True).encode()
        try:
            manifest = self._seal(where, self._dataset(step), self._checkpoint_key, {ABOUT: facts, TENSORS: tensors})
        except CloisterError as error:
            text = f"{Code.CHECKPOINT_FAILED.text}: the checkpoint of step {step} was not written"
            self._announcer.message("checkpoint-failed", f"{text}; earlier ones are whole ({error.why})", 0.0)
            return False
        self._announcer.artifact(f"checkpoint-{step}", where.as_uri(), manifest.digest)
        return True

    def load_latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint that is whole and authentic; each one passed over is an event."""
        found = sorted((p for p in self._listed() if (p / MANIFEST_NAME).exists()), reverse=True)
        for where in found:
            try:
                return self._load(where)
            except CloisterError as error:
                text = f"{Code.CHECKPOINT_FAILED.text}: checkpoint {where.name} is refused ({error.what}; {error.why})"
                self._announcer.message("checkpoint-refused", text, 0.0)
        return None

    @property
    def _checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def _dataset(self, step: int) -> str:
        return f"{self._name}/checkpoint/{step}"

    def _listed(self) -> list[Path]:
        if not self._checkpoints.is_dir():
            return []
        return [path for path in self._checkpoints.iterdir() if _STEP.fullmatch(path.name)]

    def _load(self, where: Path) -> Checkpoint:
        step = int(where.name)
        sealed = SealedDirectory.open(where, data_key=self._open_key(SealedDirectory.peek(where)))
        if sealed.manifest.dataset != self._dataset(step):
            raise CloisterError(
                Code.SEALED_DIRECTORY_MISMATCH,
                what=f"{where} is not the checkpoint its name says",
                why=f"it was sealed as {sealed.manifest.dataset}",
                todo="put the checkpoints back where the job wrote them",
            )
        about = json.loads(sealed.read(ABOUT))
        return Checkpoint(step, load_tensors(sealed, TENSORS), about)

    @staticmethod
    def _seal(
        where: Path,
        dataset: str,
        key: DataKey,
        files: Mapping[str, bytes | Mapping[str, torch.Tensor]],
    ) -> Manifest:
        writer = SealedDirectoryWriter(where, data_key=key, dataset=dataset)
        try:
            for name, content in files.items():
                if isinstance(content, bytes):
                    writer.add(name, content)
                else:
                    save_tensors(writer, name, content, metadata={"format": "pt"})
            return writer.finish()
        except CloisterError:
            # The directory was ours alone (the writer refuses one with content), and it has no manifest.
            shutil.rmtree(where, ignore_errors=True)
            raise
