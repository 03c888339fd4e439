# SPDX-License-Identifier: Apache-2.0
"""What a job leaves behind: whole, sealed, never overwritten; a full disk or a damaged file costs only the newest."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import Peek, SealedDirectory
from cloister.secret import SecretBytes
from cloister.train.output import Output

KEY = DataKey(SecretBytes(b"\x05" * 32), b"wrapped-1", "cloister-key://lab/model", 1)
CHECKPOINT_KEY = DataKey(SecretBytes(b"\x06" * 32), b"wrapped-2", "cloister-key://lab/model", 1)


class Heard:
    """Keeps what is announced."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str]] = []
        self.artifacts: list[tuple[str, str, bytes]] = []

    def message(self, phase: str, text: str, elapsed_s: float) -> None:
        self.messages.append((phase, text))

    def artifact(self, name: str, uri: str, manifest_digest: bytes) -> None:
        self.artifacts.append((name, uri, manifest_digest))


def output(directory: Path, heard: Heard | None = None) -> Output:
    keys = {key.wrapped: key for key in (KEY, CHECKPOINT_KEY)}

    def open_key(peek: Peek) -> DataKey:
        return keys[peek.wrapped]

    return Output(
        directory,
        name="cloister-key://lab/model",
        model_key=KEY,
        checkpoint_key=CHECKPOINT_KEY,
        open_key=open_key,
        announcer=heard or Heard(),
    )


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((64, 64), value), "step": torch.tensor(value)}


@contextmanager
def full_disk(left_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size: what a full disk looks like to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_model_is_sealed_announced_and_never_overwritten(tmp_path: Path) -> None:
    heard = Heard()
    out = output(tmp_path, heard)
    out.save_model({"config.json": b"plain words", "model.safetensors": b"weights"})
    [(name, uri, digest)] = heard.artifacts
    assert (name, uri, digest) == ("model", (tmp_path / "model").as_uri(), SealedDirectory.peek(tmp_path / "model")[0])
    assert SealedDirectory.open(tmp_path / "model", data_key=KEY).read("config.json") == b"plain words"
    assert not any(b"plain words" in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    with pytest.raises(CloisterError):
        out.save_model({"config.json": b"other"})
    assert SealedDirectory.open(tmp_path / "model", data_key=KEY).read("config.json") == b"plain words"


def test_the_latest_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    out = output(tmp_path)
    assert out.load_latest_checkpoint() is None
    for step in (5, 10, 100):
        assert out.save_checkpoint(step, tensors(step / 3), about={"epoch": str(step)})
    found = output(tmp_path).load_latest_checkpoint()
    assert found is not None
    assert (found.step, found.about) == (100, {"epoch": "100"})
    assert torch.equal(found.tensors["weight"], tensors(100 / 3)["weight"])


def test_a_full_disk_costs_only_the_new_checkpoint(tmp_path: Path) -> None:
    heard = Heard()
    out = output(tmp_path, heard)
    assert out.save_checkpoint(1, tensors(1.0))
    with full_disk(4096):
        assert not out.save_checkpoint(2, tensors(2.0))
    [(phase, text)] = heard.messages
    assert phase == "checkpoint-failed"
    assert text.startswith("CLO-1507: the checkpoint of step 2 was not written")
    assert not (tmp_path / "checkpoints" / f"{2:012d}").exists()
    found = out.load_latest_checkpoint()
    assert found is not None
    assert found.step == 1
    # With room again, training has gone on and the same step can be written.
    assert out.save_checkpoint(2, tensors(2.0))


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    out = output(tmp_path)
    assert out.save_checkpoint(1, tensors(1.0))
    assert not out.save_checkpoint(1, tensors(9.0))
    found = out.load_latest_checkpoint()
    assert found is not None
    assert found.tensors["step"] == 1.0


def test_a_damaged_checkpoint_is_refused_with_an_event_and_the_one_before_is_used(tmp_path: Path) -> None:
    heard = Heard()
    out = output(tmp_path, heard)
    for step in (1, 2):
        out.save_checkpoint(step, tensors(float(step)))
    sealed = tmp_path / "checkpoints" / f"{2:012d}" / "tensors.safetensors.sealed"
    data = bytearray(sealed.read_bytes())
    data[-1] ^= 1
    sealed.write_bytes(data)
    found = out.load_latest_checkpoint()
    assert found is not None
    assert found.step == 1
    [(phase, text)] = heard.messages
    assert phase == "checkpoint-refused"
    assert "CLO-1507" in text


def test_an_older_checkpoint_under_a_newer_name_is_refused(tmp_path: Path) -> None:
    heard = Heard()
    out = output(tmp_path, heard)
    out.save_checkpoint(1, tensors(1.0))
    places = tmp_path / "checkpoints"
    shutil.copytree(places / f"{1:012d}", places / f"{7:012d}")
    found = out.load_latest_checkpoint()
    assert found is not None
    assert found.step == 1
    assert [phase for phase, _ in heard.messages] == ["checkpoint-refused"]


def test_a_checkpoint_without_a_manifest_does_not_count(tmp_path: Path) -> None:
    heard = Heard()
    out = output(tmp_path, heard)
    out.save_checkpoint(1, tensors(1.0))
    (tmp_path / "checkpoints" / f"{2:012d}").mkdir()
    found = out.load_latest_checkpoint()
    assert found is not None
    assert found.step == 1
    assert heard.messages == []


def test_a_full_disk_fails_the_model_with_its_reason(tmp_path: Path) -> None:
    with full_disk(1024), pytest.raises(CloisterError) as caught:
        output(tmp_path).save_model({"model.safetensors": b"x" * 100_000})
    assert caught.value.code is Code.DISK_FULL
