# SPDX-License-Identifier: Apache-2.0
"""safetensors files as rows: every tensor has one entry of its first dimension for each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

from cloister.data.rowfiles import Opener, broken, part_of
from cloister.data.tensors import read_layout, tensor_memory

_AT_ONCE: Final = 256  # rows of a stream that are read together


class TensorRows:
    """Rows that are cut out of tensors, each read on its own."""

    def __init__(self, name: str, open_file: Opener) -> None:
        self._reader = open_file()
        self._layout = read_layout(self._reader, name)
        lengths = {place.shape[0] if place.shape else -1 for place in self._layout.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise broken(name, "its tensors do not have one and the same first dimension")
        self._length = lengths.pop()

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Any:
        return {name: tensor[0] for name, tensor in self._rows(index, 1).items()}

    def stream(self, part: int, parts: int) -> Iterator[Any]:
        rows = part_of(self._length, part, parts)
        for start in range(rows.start, rows.stop, _AT_ONCE):
            count = min(_AT_ONCE, rows.stop - start)
            read = self._rows(start, count)
            for at in range(count):
                yield {name: tensor[at] for name, tensor in read.items()}

    def _rows(self, start: int, count: int) -> dict[str, Any]:
        import torch

        read = {}
        for name, place in self._layout.items():
            tensor = torch.empty((count, *place.shape[1:]), dtype=getattr(torch, place.type_name))
            self._reader.seek(place.offset + start * math.prod(place.shape[1:]) * tensor.element_size())
            self._reader.readinto(tensor_memory(tensor))
            read[name] = tensor
        return read
