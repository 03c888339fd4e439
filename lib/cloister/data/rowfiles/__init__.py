# SPDX-License-Identifier: Apache-2.0
"""Rows of sealed files, one module per kind of file; what a kind cannot do without stays out until it is used.

.jsonl          a JSON value a line                        lines.py
.csv .tsv       a dict by the names of the first row       lines.py
.parquet        a dict by column; plain Parquet inside     arrow.py    extra: data
.arrow .feather a dict by column; Arrow IPC file inside    arrow.py    extra: data
.safetensors    a dict of tensors, first dimension = row   tensors.py
.tar            WebDataset: a dict by extension            tars.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

from cloister.errors import CloisterError, Code
from cloister.sealed.stream import SealedReader

KINDS: Final = ("jsonl", "csv", "tsv", "parquet", "arrow", "feather", "safetensors", "tar")

# Opens the file once more, for a reader of its own.
Opener = Callable[[], SealedReader]


class RowFile(Protocol):
    """A file of rows. Not for several threads at once; a forked process may go on using it."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """Return a row by its place."""

    def stream(self, part: int, parts: int) -> Iterator[Any]:
        """Yield the rows of one of so many about equal parts, in order, reading ahead; every row is in one part."""


def open_rows(name: str, open_file: Opener, *, memory: int) -> RowFile:
    """Return the rows of a sealed file by its name's ending; files of up to `memory` bytes are kept in memory.

    Raises CloisterError(DATA_INVALID) for an ending that stands for no rows.
    """
    kind = name.rpartition(".")[2].lower()
    match kind:
        case "jsonl" | "csv" | "tsv":
            from cloister.data.rowfiles.lines import LineFile

            return LineFile(name, kind, open_file, memory=memory)
        case "parquet":
            from cloister.data.rowfiles.arrow import ParquetRows

            return ParquetRows(name, open_file)
        case "arrow" | "feather":
            from cloister.data.rowfiles.arrow import ArrowRows

            return ArrowRows(name, open_file)
        case "safetensors":
            from cloister.data.rowfiles.tensors import TensorRows

            return TensorRows(name, open_file)
        case "tar":
            from cloister.data.rowfiles.tars import TarRows

            return TarRows(name, open_file)
    raise CloisterError(
        Code.DATA_INVALID,
        what=f"{name} is not a file of rows",
        why=f"rows come from files that end in {', '.join(KINDS)}",
        todo="name the files of the data set, or open this one with SealedDirectory.open_file",
    )


def part_of(count: int, part: int, parts: int) -> range:
    """Return the places of one of so many about equal parts of `count` rows."""
    return range(count * part // parts, count * (part + 1) // parts)


def broken(name: str, why: str) -> CloisterError:
    """Return the error for a file that is authentic and still not what its name says."""
    return CloisterError(
        Code.DATA_INVALID,
        what=f"{name} does not hold rows as its name says",
        why=why,
        todo="check which program wrote it, and seal it again",
    )
