# SPDX-License-Identifier: Apache-2.0
"""Tensors in sealed files: byte for byte what safetensors writes, without a second copy, and checked on loading."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.data.tensors import _TYPES, load_tensors, save_tensors
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter
from fakes.sealed_material import data_key

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")

NAME = "model.safetensors"


def tensors() -> dict[str, object]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": torch.randn(300, 7, generator=generator),
        "transposed": torch.randn(5, 9, generator=generator).t(),
        "half": torch.randn(3, generator=generator).half(),
        "bf16": torch.randn(5, generator=generator).bfloat16(),
        "scalar": torch.tensor(4),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "名字": torch.arange(3, dtype=torch.int16),
        **{name: torch.zeros(2, dtype=getattr(torch, name)) for name in _TYPES.values()},
    }


def saved(path: Path, values: dict[str, object], **arguments: object) -> SealedDirectory:
    with SealedDirectoryWriter(path, data_key=data_key(), dataset="model") as writer:
        save_tensors(writer, NAME, values, **arguments)  # type: ignore[arg-type]
        writer.finish()
    return SealedDirectory.open(path, data_key=data_key())


def written(path: Path, data: bytes) -> SealedDirectory:
    with SealedDirectoryWriter(path, data_key=data_key(), dataset="model") as writer:
        writer.add(NAME, data)
        writer.finish()
    return SealedDirectory.open(path, data_key=data_key())


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    values = tensors()
    loaded = load_tensors(saved(tmp_path / "m", values), NAME)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        assert loaded[name].dtype == value.dtype  # type: ignore[attr-defined]
        assert torch.equal(loaded[name], value)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_content_is_byte_for_byte_what_safetensors_writes(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    values = tensors()
    contiguous = {name: value.contiguous() for name, value in values.items()}  # type: ignore[attr-defined]
    assert saved(tmp_path / "m", values, metadata=metadata).read(NAME) == safetensors.save(
        contiguous, metadata=metadata
    )


def test_a_file_of_safetensors_loads(tmp_path: Path) -> None:
    values = {"a": torch.arange(10), "b": torch.ones(3, 3)}
    loaded = load_tensors(written(tmp_path / "m", safetensors.save(values, metadata={"format": "pt"})), NAME)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def test_no_tensors_at_all_are_a_file_too(tmp_path: Path) -> None:
    assert load_tensors(saved(tmp_path / "m", {}), NAME) == {}


def test_loading_checks_against_the_model(tmp_path: Path) -> None:
    directory = saved(tmp_path / "m", {"a": torch.ones(2, 3), "b": torch.ones(1)})
    like = {"a": torch.empty(2, 3), "b": torch.empty(1)}
    load_tensors(directory, NAME, like=like)
    for change, words in [
        ({"a": torch.empty(3, 2)}, ["'a'", "[2, 3]", "[3, 2]"]),
        ({"a": torch.empty(2, 3, dtype=torch.float64)}, ["'a'", "float32", "float64"]),
        ({"c": torch.empty(1)}, ["'c'", "missing"]),
    ]:
        with pytest.raises(CloisterError) as caught:
            load_tensors(directory, NAME, like=like | change)
        assert caught.value.code is Code.DATA_INVALID
        assert all(word in caught.value.why for word in words)
    with pytest.raises(CloisterError, match="'b' is unexpected"):
        load_tensors(directory, NAME, like={"a": like["a"]})


def spelled(header: object, body: bytes = b"", *, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95pickle",
        spelled({}, length=10**12),
        spelled([]),
        spelled({"a": 1}),
        spelled({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        spelled({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        spelled({"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}, bytes(4)),
        spelled({"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        spelled({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
        spelled({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
        spelled({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        spelled({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}, bytes(4)),
        spelled({k: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for k in "ab"}, bytes(4)),
        spelled({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, bytes(5)),
        spelled({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0]}}, bytes(4)),
    ],
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        load_tensors(written(tmp_path / "m", data), NAME)
    assert caught.value.code is Code.DATA_INVALID
    assert NAME in caught.value.what


def test_a_tensor_that_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    for value in (torch.ones(2, dtype=torch.complex128), torch.eye(2).to_sparse()):
        with pytest.raises(CloisterError, match="'odd'"):
            saved(tmp_path / "m", {"odd": value})


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from fakes.sealed_material import data_key
from cloister.data.tensors import _TYPES, load_tensors, save_tensors
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
out = Path(sys.argv[1])
values = {str(i): torch.full((4_000_000,), float(i)) for i in range(8)}  # 128 MB
before = peak()
with SealedDirectoryWriter(out, data_key=data_key(), dataset="m") as writer:
    save_tensors(writer, "m.safetensors", values)
    writer.finish()
saved = peak()
del values
loaded = load_tensors(SealedDirectory.open(out, data_key=data_key()), "m.safetensors")
assert all(bool((tensor == float(name)).all()) for name, tensor in loaded.items())
print(saved - before, peak() - saved)
"""


def test_saving_and_loading_make_no_second_copy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m")],
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    saving, loading = map(int, done.stdout.split())
    # MiB beyond the 122 that the tensors themselves take.
    assert saving < 32
    assert loading < 48
