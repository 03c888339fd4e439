# SPDX-License-Identifier: Apache-2.0
"""What a person or a program reads: results on stdout, progress and errors on stderr.

With `--json` stdout carries one JSON document, or one JSON object a line where a command streams. Text that came
from elsewhere (log lines, file names, error texts) loses its control characters first, so that it cannot drive the
reader's terminal.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from cloister.errors import EXIT_CODE, CloisterError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PLAIN_WIDTH: Final = 160  # columns when nobody's terminal says otherwise
_KEPT: Final = "\n\t"


def clean(text: str) -> str:
    """Return the text with control and format characters replaced, so that a terminal shows it and obeys none of it."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in _KEPT or unicodedata.category(c) not in {"Cc", "Cf", "Cs"} else "\ufffd" for c in text)


class Output:
    """Where one command's result and progress go."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out: Console | None = None
        self._err: Console | None = None

    @property
    def out(self) -> Console:
        """The console on stdout; for people only."""
        if self._out is None:
            self._out = _console(sys.stdout.isatty(), stderr=False)
        return self._out

    @property
    def err(self) -> Console:
        """The console on stderr: progress."""
        if self._err is None:
            self._err = _console(sys.stderr.isatty(), stderr=True)
        return self._err

    def result(self, document: Mapping[str, Any], render: Callable[[Console], None]) -> None:
        """Give a command's result: the document as JSON, or what `render` prints."""
        if self.as_json:
            write_json(document)
        else:
            render(self.out)

    def rows(
        self, name: str, records: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str, **more: Any
    ) -> None:
        """Give a list: `{name: [...]}` and `more` as JSON, or a table of these columns."""

        def render(console: Console) -> None:
            if not records:
                console.print(empty, markup=False)
                return
            table = make_table(*columns)
            for record in records:
                table.add_row(*(clean(_cell(record.get(column, ""))) for column in columns))
            console.print(table)

        self.result({name: list(records), **more}, render)

    def item(self, document: Mapping[str, Any]) -> None:
        """Give one thing: its JSON, or one `name  value` line a field."""

        def render(console: Console) -> None:
            width = max((len(key) for key in document), default=0)
            for key, value in document.items():
                console.print(f"{key:<{width}}  {clean(_cell(value))}", markup=False, soft_wrap=True)

        self.result(document, render)

    def stream(self, document: Mapping[str, Any], text: str) -> None:
        """Give one piece of a stream: a JSON object on a line of its own, or a line of text."""
        if self.as_json:
            write_json(document, indent=None)
        elif text:
            self.out.print(clean(text), markup=False, soft_wrap=True)

    def tell(self, text: str, *, style: str = "") -> None:
        """Tell a story to a person: on stdout, or on stderr when stdout carries JSON."""
        from rich.text import Text

        (self.err if self.as_json else self.out).print(Text(clean(text), style=style), soft_wrap=True)

    def note(self, text: str) -> None:
        """Tell how things go, on stderr."""
        self.err.print(clean(text), markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar of `total` bytes on stderr, when that is a terminal; yield what takes the count so far."""
        if not self.err.is_terminal:
            yield lambda _done: None
            return
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        text, bar_column, rate = TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn()
        columns = (text, bar_column, DownloadColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=self.err, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda done: bar.update(task, completed=done)


def _console(terminal: bool, *, stderr: bool) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, emoji=False, width=None if terminal else _PLAIN_WIDTH)


def make_table(*columns: str, title: str | None = None) -> Table:
    """Return an empty table in the one style of this command."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        table.add_column(column.replace("_", " "), overflow="fold")
    return table


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_cell(item)}" for key, item in value.items())
    return str(value)


def write_json(document: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Write one JSON document and a line end to stdout at once."""
    sys.stdout.write(json.dumps(document, indent=indent, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_error(error: CloisterError, *, as_json: bool) -> int:
    """Print an error in three lines (what, why, what to do) on stderr, and as JSON on stdout when asked for.

    Returns the exit code of its kind.
    """
    lines = [f"error {error.code.text}: {error.what}"]
    lines += [f"  why: {error.why}"] if error.why else []
    lines += [f"  do:  {error.todo}"] if error.todo else []
    sys.stderr.write("".join(clean(" | ".join(line.splitlines())) + "\n" for line in lines))
    sys.stderr.flush()
    exit_code = EXIT_CODE[error.kind]
    if as_json:
        write_json({"error": error_document(error), "exit_code": exit_code})
    return exit_code


def error_document(error: CloisterError) -> dict[str, str]:
    """Return an error as it stands in JSON output."""
    return {
        "code": error.code.text,
        "kind": error.kind.value,
        "what": error.what,
        "why": error.why,
        "todo": error.todo,
        **({"block": error.block} if error.block else {}),
    }
