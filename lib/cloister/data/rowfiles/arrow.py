# SPDX-License-Identifier: Apache-2.0
"""Parquet and Arrow files inside of sealed files: rows by row group or record batch, one in memory at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from cloister.data.rowfiles import Opener, broken, part_of
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    import pyarrow as pa


def arrow() -> Any:
    """Return pyarrow; raise CloisterError(PREREQUISITE_MISSING) that names the extra."""
    try:
        import pyarrow as pa
    except ImportError:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="Parquet and Arrow files need pyarrow",
            why="it is not installed",
            todo="pip install 'cloister[data]'",
        ) from None
    return pa


class _Batches:
    """Rows in batches: what both kinds of file have in common."""

    def __init__(self, name: str, lengths: list[int]) -> None:
        self._name = name
        self._starts = [0, *accumulate(lengths)]
        self._loaded: tuple[int, Any] | None = None  # number and rows of the batch in memory

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, index: int) -> Any:
        number = bisect_right(self._starts, index) - 1
        table = self._batch(number)
        at = index - self._starts[number]
        return table.slice(at, 1).to_pylist()[0]

    def stream(self, part: int, parts: int) -> Iterator[Any]:
        rows = part_of(len(self), part, parts)
        for number in range(len(self._starts) - 1):
            start, end = self._starts[number], self._starts[number + 1]
            first, last = max(start, rows.start), min(end, rows.stop)
            if first < last:
                yield from self._batch(number).slice(first - start, last - first).to_pylist()

    def _batch(self, number: int) -> Any:
        if self._loaded is None or self._loaded[0] != number:
            try:
                self._loaded = number, self._read(number)
            except (OSError, ValueError) as error:
                raise broken(self._name, str(error)[:300]) from None
        return self._loaded[1]

    def _read(self, number: int) -> pa.Table | pa.RecordBatch:
        raise NotImplementedError


class ParquetRows(_Batches):
    """A Parquet file."""

    def __init__(self, name: str, open_file: Opener) -> None:
        pa = arrow()
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(pa.PythonFile(open_file(), mode="r"))
        except (OSError, ValueError) as error:
            raise broken(name, str(error)[:300]) from None
        metadata = self._file.metadata
        super().__init__(name, [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])

    def _read(self, number: int) -> Any:
        return self._file.read_row_group(number)


class ArrowRows(_Batches):
    """An Arrow IPC file (Feather version 2)."""

    def __init__(self, name: str, open_file: Opener) -> None:
        pa = arrow()
        try:
            self._file = pa.ipc.open_file(pa.PythonFile(open_file(), mode="r"))
            lengths = [self._file.get_batch(i).num_rows for i in range(self._file.num_record_batches)]
        except (OSError, ValueError) as error:
            raise broken(name, str(error)[:300]) from None
        super().__init__(name, lengths)

    def _read(self, number: int) -> Any:
        return self._file.get_batch(number)
