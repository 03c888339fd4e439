# SPDX-License-Identifier: Apache-2.0
"""`cloister seal` and `cloister open`: directories, files, tables and pipes; sealed, and (keys that allow it) back."""

from __future__ import annotations

import enum
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, Receipt, State, existing_directory, in_session
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session

_TABLES: Final = frozenset({".csv", ".tsv"})
PIPE: Final = Path("-")


class CheckName(enum.StrEnum):
    """What a directory may be checked for before it is sealed."""

    LABELLED_TEXT = "labelled-text"


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command()(seal)
    app.command(name="open")(open_)


def seal(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC...", help="Directories and files, or - for standard input.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", help="New sealed directory; a file when it ends in .sealed or is -."
        ),
    ],
    key: Annotated[str, typer.Option("--key", metavar="URI", help="Key to seal with.")],
    dataset: Annotated[str, typer.Option("--name", help="Name in the manifest; default: the key's last part.")] = "",
    check: Annotated[CheckName | None, typer.Option("--check", help="Refuse broken rows, naming them.")] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="NAME", help="Seal these columns of a CSV or TSV file; may be repeated."),
    ] = None,
    receipt: Receipt = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Seal data: ciphertext, and a manifest that binds names, sizes and version. SRC is left as it is.

    Sealed again under the same name, data is the next version: jobs that read an older one get no key any more.
    An interrupted run goes on when the same command is given again.
    """
    from cloister.cli import sealedfiles

    output = Output(as_json=json)
    _check_sources(sources)
    single = out == PIPE or out.suffix == ".sealed" or bool(columns)
    if (single or PIPE in sources) and (len(sources) != 1 or sources[0].is_dir()):
        raise _usage("one file is sealed into a file", "OUT ends in .sealed or is -, SRC is -, or there is --column")
    if not single and PIPE in sources:
        raise _usage("standard input is sealed into a file", "name OUT something.sealed, or - for standard output")
    if check is CheckName.LABELLED_TEXT:
        for source in sources:
            check_rows(source)

    async def work(session: Session) -> dict[str, Any]:
        if columns:
            return await sealedfiles.seal_table(session, sources[0], out, key_uri=key, columns=columns)
        if single:
            return await sealedfiles.seal_file(session, sources[0], out, key_uri=key, dataset=dataset, output=output)
        return await sealedfiles.seal_directory(session, sources, out, key_uri=key, dataset=dataset, output=output)

    _show(output, in_session(state, work, receipts=receipt), out)


def open_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Sealed directory, file or table, or - for stdin.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="New directory or file for the plaintext, or -.")
    ],
    columns: Annotated[
        list[str] | None, typer.Option("--column", metavar="NAME", help="Open only these columns of a table.")
    ] = None,
    signers: Annotated[
        list[str] | None,
        typer.Option("--signer", metavar="DID", help="Accept only directories that this did:key signed."),
    ] = None,
    receipt: Receipt = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Open what was sealed, on this machine. Its key must have the purpose `export`."""
    from cloister.cli import sealedfiles

    output = Output(as_json=json)
    if source != PIPE and source.is_dir():

        async def work(session: Session) -> dict[str, Any]:
            return await sealedfiles.open_directory(session, source, out, signers=signers or [], output=output)

    else:
        if source != PIPE and not source.exists():
            existing_directory(source, what="the sealed directory")
        table = bool(columns) or (source != PIPE and source.suffix in _TABLES)

        async def work(session: Session) -> dict[str, Any]:
            if table:
                return await sealedfiles.open_table(session, source, out, columns=columns or [])
            return await sealedfiles.open_file(session, source, out, output=output)

    _show(output, in_session(state, work, receipts=receipt), out)


def check_rows(place: Path) -> dict[str, int]:
    """Check labelled text; raise CloisterError(DATA_INVALID) with file, row and reason. Returns rows by file name."""
    from cloister.data.text import check_labelled_text

    rows: dict[str, int] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else [place]:
        if path.suffix in {".tsv", ".jsonl"}:
            rows[path.name] = check_labelled_text(path)
    if not rows:
        raise CloisterError(
            Code.DATA_INVALID,
            what=f"{place} holds no labelled text",
            why="there is no .tsv or .jsonl file in it",
            todo="put train.tsv, dev.tsv and test.tsv there, each row LABEL<TAB>TEXT",
        )
    return rows


def _show(output: Output, document: dict[str, Any], out: Path) -> None:
    """Give the result, unless standard output carries the data."""
    if out == PIPE:
        sys.stdout.buffer.flush()
        output.note(f"{document['bytes']} bytes")
    else:
        output.item(document)


def _check_sources(sources: list[Path]) -> None:
    for source in sources:
        if source != PIPE and not source.exists():
            raise CloisterError(
                Code.FILE_NOT_FOUND,
                what=f"there is no {source}",
                why="it is neither a file nor a directory",
                todo="check the name; nothing was sealed",
            )


def _usage(what: str, why: str) -> CloisterError:
    return CloisterError(Code.ARGUMENT_INVALID, what=what, why=why, todo="cloister seal --help has examples")
