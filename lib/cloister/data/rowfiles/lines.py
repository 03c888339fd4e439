# SPDX-License-Identifier: Apache-2.0
"""JSON lines, CSV and TSV: rows by their place in the file, or streamed in parts.

The index (8 bytes a row) is made in one pass and lives in memory only. A TSV row is a line split at its tabs; a CSV
row may hold quoted line ends.
"""

from __future__ import annotations

import csv
import json
import queue
import threading
from array import array
from collections.abc import Iterator
from typing import Any, Final

from cloister.data.rowfiles import Opener, broken
from cloister.errors import CloisterError
from cloister.sealed.stream import SealedReader

_CHUNK: Final = 1024 * 1024  # bytes read at once
_AHEAD: Final = 4  # chunks that wait to be parsed
MAX_ROW_SIZE: Final = 64 * 1024 * 1024  # bytes; a bound on what one line can make us hold
_BOM: Final = b"\xef\xbb\xbf"


class LineFile:
    """A sealed file of lines."""

    def __init__(self, name: str, kind: str, open_file: Opener, *, memory: int) -> None:
        self._name = name
        self._kind = kind
        self._open = open_file
        self._reader = open_file()
        self._size = self._reader.size
        self._whole: bytes | None = None
        self._offsets: array[int] | None = None
        self._memory = memory
        self._columns: list[str] | None = None

    def __len__(self) -> int:
        return len(self._index()) - 1

    def row(self, index: int) -> Any:
        offsets = self._index()
        start, end = offsets[index], offsets[index + 1]
        if self._whole is not None:
            return self._parse(self._whole[start:end], index)
        self._reader.seek(start)
        line = bytearray(end - start)
        self._reader.readinto(line)
        return self._parse(bytes(line), index)

    def stream(self, part: int, parts: int) -> Iterator[Any]:
        """Cut by bytes, so that nobody reads more than its part; a row belongs to the part in which it begins.

        A CSV row may begin anywhere, so those files are cut by their index.
        """
        begin = self._header()
        if self._kind == "csv":
            offsets = self._index()
            first, last = len(self) * part // parts, len(self) * (part + 1) // parts
            yield from self._between(offsets[first], offsets[last])
            return
        span = self._size - begin
        start, end = begin + span * part // parts, begin + span * (part + 1) // parts
        if start < end:
            yield from self._between(self._next_line(start, begin), self._next_line(end, begin))

    def _between(self, start: int, end: int) -> Iterator[Any]:
        lines = _rows(_ahead(self._open, start, end), self._kind == "csv", self._name)
        for number, line in enumerate(lines):
            if line.strip():
                yield self._parse(line, number)

    def _next_line(self, offset: int, begin: int) -> int:
        """Return where the first line begins at or behind an offset; lines begin at `begin`."""
        if offset <= begin:
            return begin
        self._reader.seek(offset - 1)
        while piece := self._reader.read(_CHUNK):
            at = piece.find(b"\n")
            if at >= 0:
                return self._reader.tell() - len(piece) + at + 1
        return self._size

    def _header(self) -> int:
        """Read the names of the columns; return where the first row begins."""
        if self._kind == "jsonl":
            return 0
        self._reader.seek(0)
        line = next(_rows(_chunks(self._reader, self._size), self._kind == "csv", self._name), b"")
        self._columns = self._cells(line.removeprefix(_BOM), 0)
        if not self._columns or len(set(self._columns)) != len(self._columns):
            raise broken(self._name, "its first row does not name every column once")
        return len(line)

    def _index(self) -> array[int]:
        """Return where each row begins, and the end."""
        if self._offsets is not None:
            return self._offsets
        begin = self._header()
        offsets: array[int] = array("Q")
        at = 0
        self._reader.seek(0)
        kept = bytearray() if self._size <= self._memory else None
        for line in _rows(_chunks(self._reader, self._size), self._kind == "csv", self._name):
            if kept is not None:
                kept += line
            if at >= begin and line.strip():
                offsets.append(at)
            at += len(line)
        offsets.append(at)  # what lies between two rows, empty lines, is stripped when a row is parsed
        self._whole = bytes(kept) if kept is not None else None
        self._offsets = offsets
        return offsets

    def _parse(self, line: bytes, index: int) -> Any:
        try:
            if self._columns is None:
                return json.loads(line)
            cells = self._cells(line, index)
        except (ValueError, RecursionError) as error:
            raise broken(self._name, f"row {index}: {error}") from None
        if len(cells) != len(self._columns):
            raise broken(self._name, f"row {index} has {len(cells)} cells, the first row {len(self._columns)}")
        return dict(zip(self._columns, cells, strict=True))

    def _cells(self, line: bytes, index: int) -> list[str]:
        text = line.decode().rstrip("\r\n")
        if self._kind == "tsv":
            return text.split("\t")
        try:
            return next(csv.reader([text], strict=True), [])
        except csv.Error as error:
            raise broken(self._name, f"row {index}: {error}") from None


def _rows(chunks: Iterator[bytes], quoted: bool, name: str) -> Iterator[bytes]:
    """Yield lines with their ends; with `quoted`, a line end inside of quotes ends no row."""
    rest, open_quote = b"", False
    for chunk in chunks:
        data = rest + chunk
        at, searched = 0, len(rest) if not quoted else 0
        while (end := data.find(b"\n", max(at, searched))) >= 0:
            searched = end + 1
            if quoted:
                open_quote = data.count(b'"', at, end) % 2 == 1
                if open_quote:
                    continue
            yield data[at : end + 1]
            at = end + 1
        rest = data[at:]
        if len(rest) > MAX_ROW_SIZE:
            raise broken(name, f"a row is longer than {MAX_ROW_SIZE} bytes")
    if rest:
        if quoted and rest.count(b'"') % 2:
            raise broken(name, "a quote is not closed")
        yield rest


def _chunks(reader: SealedReader, end: int) -> Iterator[bytes]:
    while (left := end - reader.tell()) > 0 and (piece := reader.read(min(_CHUNK, left))):
        yield piece


def _ahead(open_file: Opener, start: int, end: int) -> Iterator[bytes]:
    """Yield a part of the file in chunks that another thread has decrypted meanwhile."""
    if start >= end:
        return
    ready: queue.Queue[bytes | CloisterError | None] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def put(item: bytes | CloisterError | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            with open_file() as reader:
                reader.seek(start)
                for piece in _chunks(reader, end):
                    if not put(piece):
                        return
            put(None)
        except CloisterError as error:
            put(error)

    thread = threading.Thread(target=work, name="cloister read-ahead", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, CloisterError):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
