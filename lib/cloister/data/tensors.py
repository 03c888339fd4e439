# SPDX-License-Identifier: Apache-2.0
"""Tensors in sealed files, in the safetensors format: no pickle, no plaintext on disk, no second copy in memory.

https://github.com/huggingface/safetensors#format
    header length u64 little-endian | header JSON, padded with spaces to 8 bytes | the tensors' bytes, without gaps
Tensors are written from, and decrypted into, their own memory.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter
from cloister.sealed.format import MODEL_SEGMENT_SIZE
from cloister.sealed.stream import SealedReader, SealedWriter

if TYPE_CHECKING:
    import torch

# safetensors' name of each torch type, in the order in which safetensors writes them: large elements first, so that
# every tensor is aligned.
_TYPES: Final = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_NAMES: Final = {name: tag for tag, name in _TYPES.items()}
_METADATA: Final = "__metadata__"
MAX_HEADER_SIZE: Final = 100_000_000  # bytes; safetensors' own limit


def save_tensors(
    writer: SealedDirectoryWriter,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Seal tensors as one safetensors file of a directory that is being written.

    Tensors that share memory are written each in full. Raises CloisterError: ARGUMENT_INVALID for a tensor that the
    format cannot hold, otherwise as the writer does.
    """
    with writer.open(name, segment_size=MODEL_SEGMENT_SIZE) as file:
        write_tensors(file, tensors, metadata=metadata)


def write_tensors(
    file: SealedWriter, tensors: Mapping[str, torch.Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in the safetensors format, each from its own memory; raise as `save_tensors` does."""
    for key, tensor in tensors.items():
        if key == _METADATA or _type_name(tensor) not in _NAMES or str(tensor.layout) != "torch.strided":
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"tensor {key!r} cannot be saved",
                why=f"its type is {tensor.dtype}, layout {tensor.layout}; dense tensors of common types can be",
                todo="convert it before saving",
            )
    order = sorted(tensors, key=lambda key: (list(_NAMES).index(_type_name(tensors[key])), key))
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for key in order:
        end = offset + tensors[key].numel() * tensors[key].element_size()
        header[key] = {
            "dtype": _NAMES[_type_name(tensors[key])],
            "shape": list(tensors[key].shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        file.write(tensor_memory(tensors[key].detach().cpu().contiguous()))


def load_tensors(
    directory: SealedDirectory, name: str, *, like: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a sealed safetensors file, each in memory of its own.

    With `like`, such as a model's state dict, names, types and shapes must be the same. Raises
    CloisterError(DATA_INVALID) for a file that is authentic but not what it should be.
    """
    with directory.open_file(name) as file:
        return read_tensors(file, name, like=like)[0]


def read_tensors(
    file: SealedReader, name: str, *, like: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors of an open safetensors file and its metadata; raise as `load_tensors` does."""
    import torch

    entries, metadata = _read_header(file, name)
    if like is not None:
        _compare(name, entries, like)
    loaded = {}
    for key, (type_name, shape) in entries.items():
        tensor = torch.empty(shape, dtype=getattr(torch, type_name))
        if file.readinto(tensor_memory(tensor)) != tensor.numel() * tensor.element_size():
            raise _broken(name, f"it ends inside of tensor {key!r}")
        loaded[key] = tensor
    return loaded, metadata


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies in a file."""

    type_name: str  # torch's, such as "float32"
    shape: tuple[int, ...]
    offset: int  # in the file, bytes


def read_layout(file: SealedReader, name: str) -> dict[str, Place]:
    """Return where the tensors of an open safetensors file lie; raise CloisterError(DATA_INVALID)."""
    entries, _ = _read_header(file, name)
    offset, places = file.tell(), {}
    for key, (type_name, shape) in entries.items():
        places[key] = Place(type_name, shape, offset)
        offset += math.prod(shape) * _element_size(type_name)
    return places


def _read_header(file: SealedReader, name: str) -> tuple[dict[str, tuple[str, tuple[int, ...]]], dict[str, str]]:
    """Parse the header; return type and shape by name, in the order in which the bytes stand, and the metadata."""
    length = int.from_bytes(file.read(8) or b"", "little")
    if length > min(MAX_HEADER_SIZE, file.size - 8):
        raise _broken(name, f"its header claims {length} bytes")
    try:
        document = json.loads(file.read(length) or b"")
        if not isinstance(document, dict):
            raise TypeError("the header is not an object")
        metadata = document.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise TypeError("the metadata is not an object of texts")
        found = [(*_entry(value), key) for key, value in document.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _broken(name, f"its header does not parse ({type(error).__name__}: {error})") from None
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    offset = 0
    for start, end, type_name, shape, key in sorted(found):
        if start != offset or end - start != math.prod(shape) * _element_size(type_name):
            raise _broken(name, f"the bytes of tensor {key!r} are not where its type and shape put them")
        entries[key] = (type_name, shape)
        offset = end
    if offset != file.size - 8 - length:
        raise _broken(name, "there are bytes that belong to no tensor")
    return entries, metadata


def _entry(value: Any) -> tuple[int, int, str, tuple[int, ...]]:
    if value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("a tensor's entry has other fields than expected")
    start, end = value["data_offsets"]
    numbers = (start, end, *value["shape"])
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a size is not a number of bytes")
    return start, end, _TYPES[value["dtype"]], tuple(value["shape"])


def _compare(name: str, entries: Mapping[str, tuple[str, tuple[int, ...]]], like: Mapping[str, torch.Tensor]) -> None:
    for key in sorted(entries.keys() ^ like.keys()):
        raise _broken(name, f"tensor {key!r} is {'unexpected' if key in entries else 'missing'}")
    for key, (type_name, shape) in entries.items():
        if (type_name, shape) != (_type_name(like[key]), tuple(like[key].shape)):
            wanted = f"{_type_name(like[key])} {list(like[key].shape)}"
            raise _broken(name, f"tensor {key!r} is {type_name} {list(shape)}, not {wanted}")


def tensor_memory(tensor: torch.Tensor) -> memoryview:
    """Return a contiguous tensor's own bytes."""
    import torch

    if sys.byteorder != "little":
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="tensors cannot be sealed on this machine",
            why="the format is little-endian and this processor is not",
            todo="use an x86-64 or ARM machine",
        )
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")


def _type_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _element_size(type_name: str) -> int:
    import torch

    return int(getattr(torch, type_name).itemsize)


def _broken(name: str, why: str) -> CloisterError:
    return CloisterError(
        Code.DATA_INVALID,
        what=f"{name} does not hold the tensors it should",
        why=why,
        todo="check which program wrote it, and write it again",
    )
