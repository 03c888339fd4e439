# SPDX-License-Identifier: Apache-2.0
"""`cloister seal` and `cloister open`: directories to ciphertext and back, on the owner's own machine."""

from __future__ import annotations

import asyncio
import enum
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cloister.cli.options import Json, State, existing_directory, in_session
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session


T = TypeVar("T")
Step = Callable[[int, int, str], None]  # bytes done, bytes in all, file at hand


class CheckName(enum.StrEnum):
    """What a directory may be checked for before it is sealed."""

    LABELLED_TEXT = "labelled-text"


def register(app: typer.Typer) -> None:
    """Add both commands."""
    app.command()(seal)
    app.command(name="open")(open_)


def seal(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Directory to seal.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="New directory for the sealed files.")],
    key: Annotated[str, typer.Option("--key", metavar="URI", help="Key to seal with.")],
    dataset: Annotated[str, typer.Option("--name", help="Name in the manifest; default: the key's last part.")] = "",
    check: Annotated[CheckName | None, typer.Option("--check", help="Refuse broken rows, naming them.")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Seal a directory: ciphertext and a manifest that binds names, sizes and order. SRC is left as it is."""
    output = Output(as_json=json)
    existing_directory(source, what="the source")
    if check is CheckName.LABELLED_TEXT:
        check_rows(source)

    async def work(session: Session) -> dict[str, Any]:
        return await seal_directory(session, source, out, key_uri=key, dataset=dataset, output=output)

    output.item(in_session(state, work))


def open_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Sealed directory.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="New directory for the plaintext.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Open a sealed directory on this machine. Its key must have the purpose `export`."""
    output = Output(as_json=json)
    existing_directory(source, what="the sealed directory")
    refuse_existing(out)

    async def work(session: Session) -> dict[str, Any]:
        from cloister.cli.trust import owner_keys
        from cloister.sealed.directory import SealedDirectory, open_directory

        sealed = SealedDirectory.peek(source)
        client = await owner_keys(session)
        data_key = await client.open_data_key(sealed.key_uri, key_version=sealed.key_version, wrapped=sealed.wrapped)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        with output.progress(f"opening {source.name}", size) as advance, whole_or_nothing(out):
            manifest = await stoppable(
                lambda step: open_directory(source, out, data_key=data_key, progress=step), advance
            )
        return {"directory": str(out.absolute()), "files": len(manifest.files), "bytes": manifest.size}

    output.item(in_session(state, work))


def check_rows(directory: Path) -> dict[str, int]:
    """Check labelled text; raise CloisterError(DATA_INVALID) with file, row and reason. Returns rows by file name."""
    from cloister.data.text import check_labelled_text

    rows: dict[str, int] = {}
    for path in sorted(directory.iterdir()):
        if path.suffix in {".tsv", ".jsonl"}:
            rows[path.name] = check_labelled_text(path)
    if not rows:
        raise CloisterError(
            Code.DATA_INVALID,
            what=f"{directory} holds no labelled text",
            why="there is no .tsv or .jsonl file in it",
            todo="put train.tsv, dev.tsv and test.tsv there, each row LABEL<TAB>TEXT",
        )
    return rows


async def seal_directory(
    session: Session, source: Path, out: Path, *, key_uri: str, dataset: str, output: Output
) -> dict[str, Any]:
    """Seal a directory with a new data key of the broker; return what was made."""
    from cloister.cli.trust import owner_keys
    from cloister.keyuri import KeyUri
    from cloister.sealed import directory as sealed

    uri = KeyUri.parse(key_uri)
    refuse_existing(out)
    data_key = await (await owner_keys(session)).generate_data_key(key_uri)
    plain_bytes = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    began = time.monotonic()
    name = dataset or uri.path.rpartition("/")[2]
    with output.progress(f"sealing {source.name}", plain_bytes) as advance, whole_or_nothing(out):
        manifest = await stoppable(
            lambda step: sealed.seal_directory(source, out, data_key=data_key, dataset=name, progress=step), advance
        )
    return {
        "directory": str(out.absolute()),
        "dataset": manifest.dataset,
        "files": len(manifest.files),
        "bytes": plain_bytes,
        "manifest_digest": f"sha384:{manifest.digest.hex()}",
        "key": key_uri,
        "key_version": data_key.key_version,
        "seconds": round(time.monotonic() - began, 3),
    }


class _Stopped(Exception):
    """Ends the work of a thread whose command was cancelled."""


async def stoppable(work: Callable[[Step], T], advance: Callable[[int], None]) -> T:
    """Run `work` in a thread and pass its progress on; Ctrl-C ends it at its next step, and is raised when it has."""
    stop = threading.Event()

    def step(done: int, _total: int, _name: str) -> None:
        if stop.is_set():
            raise _Stopped
        advance(done)

    task = asyncio.ensure_future(asyncio.to_thread(work, step))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.gather(task, return_exceptions=True)
        raise


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[None]:
    """Remove a directory that was not there before when what was to fill it did not end well."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            shutil.rmtree(out, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """Raise CloisterError(FILE_EXISTS) when there is something under this name already."""
    if out.exists() or out.is_symlink():
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{out} is already there",
            why="nothing is overwritten",
            todo="choose another name with --output, or remove it yourself",
        )
