# SPDX-License-Identifier: Apache-2.0
"""Labelled text from sealed files: TSV (`label<TAB>text_a`) and JSON lines (`{"label": ..., "text": ...}`).

Strict, so that nothing is lost without a word: a row that does not parse is an error that names file and row. A TSV
row is a line split at its first tab; quotes mean nothing (the csv module would join rows whose text starts with one).
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cloister.atomicfile import file_error
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory

TSV_HEADER: Final = "label\ttext_a"
DEFAULT_LABELS: Final = ("0", "1")
MAX_ROW_SIZE: Final = 1024 * 1024  # bytes; a whole book chapter, and a bound on what one line can make us hold
_SHOWN: Final = 5  # broken rows named in one error
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class LabelledText:
    """One row of a file."""

    row: int  # line number from 1, the header counted
    label: str
    text: str


def read_labelled_text(
    directory: SealedDirectory, name: str, *, labels: Collection[str] = DEFAULT_LABELS
) -> list[LabelledText]:
    """Return all rows of a sealed .tsv or .jsonl file, in order.

    Raises CloisterError: DATA_INVALID for broken rows, otherwise as SealedDirectory does.
    """
    with directory.open_file(name) as file:
        return _read_all(file, name, labels)


def check_labelled_text(path: Path, *, labels: Collection[str] = DEFAULT_LABELS) -> int:
    """Check a plain .tsv or .jsonl file before it is sealed; return its number of rows."""
    try:
        with path.open("rb", buffering=0) as file:
            return len(_read_all(file, str(path), labels))
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error


def _read_all(file: io.RawIOBase, name: str, labels: Collection[str]) -> list[LabelledText]:
    """Parse every row; raise one error that names the first broken rows and counts all."""
    kind = name.rpartition(".")[2].lower()
    if kind not in {"tsv", "jsonl"}:
        raise _broken(name, "its name ends in neither .tsv nor .jsonl")
    rows: list[LabelledText] = []
    bad: list[str] = []
    broken = 0
    for number, line in _lines(io.BufferedReader(file, 1 << 20), name):
        try:
            if kind == "tsv" and number == 1:
                if line.removeprefix(_BOM).decode() != TSV_HEADER:
                    raise ValueError(f"the header is not label<TAB>text_a but {line[:40]!r}")
                continue
            label, text = _tsv(line.decode()) if kind == "tsv" else _json(line.decode())
            if label not in labels:
                raise ValueError(f"the label is {label[:20]!r}, not one of {', '.join(sorted(labels))}")
            if not text.strip():
                raise ValueError("the text is empty")
            rows.append(LabelledText(number, label, text))
        except ValueError as error:
            broken += 1
            if len(bad) < _SHOWN:
                why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
                bad.append(f"row {number}: {why}")
    if broken:
        more = f"; and {broken - len(bad)} more broken rows" if broken > len(bad) else ""
        raise _broken(name, "; ".join(bad) + more)
    if not rows:
        raise _broken(name, "it has no rows")
    return rows


def _lines(file: io.BufferedReader, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends. Only LF ends a line: U+2028 and its kin occur inside of texts."""
    number = 0
    while line := file.readline(MAX_ROW_SIZE + 1):
        number += 1
        if len(line) > MAX_ROW_SIZE:
            raise _broken(name, f"row {number}: it is longer than {MAX_ROW_SIZE} bytes")
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _tsv(line: str) -> tuple[str, str]:
    label, tab, text = line.partition("\t")
    if not tab:
        raise ValueError("there is no tab between label and text" if line else "it is empty")
    return label, text


def _json(line: str) -> tuple[str, str]:
    try:
        row = json.loads(line, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON ({error.msg} at column {error.colno})") from None
    match row:
        case {"label": bool()}:
            pass
        case {"label": str() | int() as label, "text": str() as text, **rest} if not rest:
            return str(label), text
    raise ValueError('it is not of the form {"label": "0", "text": "..."}')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a field is there twice")
    return dict(pairs)


def _broken(name: str, why: str) -> CloisterError:
    return CloisterError(
        Code.DATA_INVALID,
        what=f"{name} is not labelled text",
        why=why,
        todo="correct these rows and try again; nothing was left out or changed",
    )
