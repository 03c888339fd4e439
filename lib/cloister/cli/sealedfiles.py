# SPDX-License-Identifier: Apache-2.0
"""What `cloister seal` and `cloister open` do, for each kind of thing: directory, single file, pipe, table."""

from __future__ import annotations

import asyncio
import csv
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TextIO, TypeVar

from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.guest.ownerkeys import OwnerKeyClient
    from cloister.sealed.datakey import DataKey
    from cloister.sealed.manifest import Manifest
    from cloister.sealed.stream import SealedReader

T = TypeVar("T")
Step = Callable[[int, int, str], None]  # bytes done, bytes in all, file at hand
PIPE: Final = Path("-")
_CHUNK: Final = 1024 * 1024


async def seal_directory(
    session: Session,
    sources: Sequence[Path],
    out: Path,
    *,
    key_uri: str,
    dataset: str,
    output: Output,
    published: bool = True,
) -> dict[str, Any]:
    """Seal into a directory with a new data key of the broker, or go on with an interrupted run's; return what came.

    `published`: the broker remembers this version as the newest, and gives no key to whoever holds an older one.
    """
    from cloister.cli.signer import signing_key
    from cloister.cli.trust import owner_keys
    from cloister.keyuri import KeyUri
    from cloister.sealed import directory as sealed

    name = dataset or KeyUri.parse(key_uri).path.rpartition("/")[2]
    client = await owner_keys(session)
    # What is published under this name already has a successor now.
    version, parent = await client.published_manifest(key_uri, name) if published else (0, b"")
    version += 1
    data_key = await _unfinished(client, out, key_uri=key_uri, dataset=name, version=version, parent=parent)
    if data_key:
        output.note(f"going on with {out}, where sealing was interrupted")
    else:
        refuse_existing(out)
        data_key = await client.generate_data_key(key_uri)
    signer = signing_key(session.state)
    began = time.monotonic()
    with output.progress(f"sealing {sources[0].name}", _size(sources)) as advance:
        manifest = await stoppable(
            lambda step: sealed.seal_directory(
                sources,
                out,
                data_key=data_key,
                dataset=name,
                version=version,
                parent=parent,
                signing_key=signer,
                progress=step,
            ),
            advance,
        )
    if published:
        await publish(client, manifest, data_key)
    return {
        "directory": str(out.absolute()),
        "dataset": manifest.dataset,
        "version": manifest.version,
        "files": len(manifest.files),
        "bytes": manifest.size,
        "manifest_digest": f"sha384:{manifest.digest.hex()}",
        "signer": manifest.signer,
        "key": key_uri,
        "key_version": data_key.key_version,
        "seconds": round(time.monotonic() - began, 3),
    }


async def publish(client: OwnerKeyClient, manifest: Manifest, data_key: DataKey) -> None:
    """Tell the broker that this is the newest version of its data set: older ones get no key any more."""
    await client.publish_manifest(
        manifest.key_uri,
        dataset_id=manifest.dataset,
        version=manifest.version,
        manifest_digest=manifest.digest,
        parent_digest=manifest.parent,
        key_version=data_key.key_version,
        wrapped=data_key.wrapped,
    )


async def seal_file(
    session: Session, source: Path, out: Path, *, key_uri: str, dataset: str, output: Output
) -> dict[str, Any]:
    """Seal one file, or standard input, into one sealed file, or to standard output."""
    from cloister.cli.trust import owner_keys
    from cloister.keyuri import KeyUri
    from cloister.sealed.directorywriter import argument
    from cloister.sealed.format import AssociatedData, check_path
    from cloister.sealed.stream import SealedWriter

    name = dataset or KeyUri.parse(key_uri).path.rpartition("/")[2]
    refuse_existing(out)
    argument(check_path, source.name)
    data_key = await (await owner_keys(session)).generate_data_key(key_uri)
    about = AssociatedData(name, "stdin" if source == PIPE else source.name)
    target: Path | BinaryIO = sys.stdout.buffer if out == PIPE else out

    def work(step: Step) -> int:
        with _input(source) as plain, SealedWriter(target, data_key=data_key, associated=about) as sealed:
            while piece := plain.read(_CHUNK):
                sealed.write(piece)
                step(sealed.plaintext_length, 0, about.path)
        return sealed.plaintext_length

    with output.progress(f"sealing {about.path}", 0 if source == PIPE else source.stat().st_size) as advance:
        size = await stoppable(work, advance)
    return {"file": str(out), "dataset": name, "path": about.path, "bytes": size, "key": key_uri}


async def open_directory(
    session: Session, source: Path, out: Path, *, signers: Sequence[str], output: Output
) -> dict[str, Any]:
    """Open a sealed directory, or go on with it."""
    from cloister.cli.trust import owner_keys
    from cloister.sealed.directory import SealedDirectory
    from cloister.sealed.extraction import MARKER_NAME

    if not (out / MARKER_NAME).exists():
        refuse_existing(out)
    peek = SealedDirectory.peek(source)
    client = await owner_keys(session)
    data_key = await client.open_data_key(
        peek.key_uri, key_version=peek.key_version, wrapped=peek.wrapped, manifest_digest=peek.manifest_digest
    )
    directory = SealedDirectory.open(source, data_key=data_key, signers=signers)
    with output.progress(f"opening {source.name}", directory.manifest.size) as advance:
        await stoppable(lambda step: directory.extract(out, progress=step), advance)
    manifest = directory.manifest
    return {
        "directory": str(out.absolute()),
        "dataset": manifest.dataset,
        "version": manifest.version,
        "signer": manifest.signer,
        "files": len(manifest.files),
        "bytes": manifest.size,
    }


async def open_file(session: Session, source: Path, out: Path, *, output: Output) -> dict[str, Any]:
    """Open one sealed file, or one on standard input, into a file or to standard output."""
    from cloister.atomicfile import AtomicFile
    from cloister.cli.trust import owner_keys
    from cloister.sealed.format import Header
    from cloister.sealed.stream import SealedReader

    refuse_existing(out)
    with _seekable(source) as sealed:
        header = Header.read(sealed, name=str(source))
        client = await owner_keys(session)
        data_key = await client.open_data_key(header.key_uri, key_version=header.key_version, wrapped=header.wrapped)
        sealed.seek(0)
        with SealedReader(sealed, data_key=data_key, name=str(source)) as reader:

            def work(step: Step) -> int:
                if out == PIPE:
                    return _copy(reader, sys.stdout.buffer, step)
                with AtomicFile(out) as target:
                    return _copy(reader, target, step)

            with output.progress(f"opening {source}", reader.size) as advance:
                size = await stoppable(work, advance)
    return {"file": str(out), "dataset": header.associated.dataset, "path": header.associated.path, "bytes": size}


async def seal_table(session: Session, source: Path, out: Path, *, key_uri: str, columns: list[str]) -> dict[str, Any]:
    """Seal columns of a table into another table."""
    from cloister.cli.trust import owner_keys
    from cloister.sealed.columns import dialect_of, read_rows, seal_columns

    if source == PIPE:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="a table is not read from standard input",
            why="its rows are counted first, so that none can be removed unnoticed",
            todo="write it to a file",
        )
    refuse_existing(out)
    with _text(source) as lines:
        count = sum(1 for _ in read_rows(lines, source.name)) - 1
    data_key = await (await owner_keys(session)).generate_data_key(key_uri)
    with _text(source) as lines, _table(out, dialect_of(source.name)) as write:
        rows = read_rows(lines, source.name)
        for row in seal_columns(rows, count=count, names=columns, data_key=data_key):
            write(row)
    return {"file": str(out), "columns": columns, "rows": count, "bytes": source.stat().st_size, "key": key_uri}


async def open_table(session: Session, source: Path, out: Path, *, columns: list[str]) -> dict[str, Any]:
    """Open the sealed columns of a table into another table, which appears when all of it was authentic."""
    from cloister.cli.trust import owner_keys
    from cloister.sealed.columns import dialect_of, open_columns, read_rows, sealed_columns

    refuse_existing(out)
    with _text(source) as lines:
        headers = sealed_columns(next(iter(read_rows(lines, source.name)), []))
    client, keys = await owner_keys(session), {}
    for header in headers.values():
        if header.wrapped not in keys:
            found = await client.open_data_key(header.key_uri, key_version=header.key_version, wrapped=header.wrapped)
            keys[header.wrapped] = found.secret
    rows_seen = -1
    with _text(source) as lines, _table(out, dialect_of(source.name)) as write:
        rows = read_rows(lines, source.name)
        for row in open_columns(rows, data_key=lambda header: keys[header.wrapped], only=columns):
            write(row)
            rows_seen += 1
    names = columns or [header.name for header in headers.values()]
    return {"file": str(out), "columns": names, "rows": rows_seen, "bytes": source.stat().st_size}


async def _unfinished(
    client: OwnerKeyClient, out: Path, *, key_uri: str, dataset: str, version: int, parent: bytes
) -> DataKey | None:
    """Return the data key of an interrupted run of the same work, when the broker gives it once more."""
    from cloister.sealed.journal import read_unfinished

    found = read_unfinished(out)
    wanted = (key_uri, dataset, version, parent.hex())
    if found is None or (found.key_uri, found.dataset, found.version, found.parent) != wanted:
        return None
    return await client.resume_data_key(key_uri, key_version=found.key_version, wrapped=bytes.fromhex(found.wrapped))


def _size(sources: Sequence[Path]) -> int:
    files = [path for source in sources for path in (source.rglob("*") if source.is_dir() else [source])]
    return sum(path.stat().st_size for path in files if path.is_file())


def _copy(source: SealedReader, target: Any, step: Step) -> int:
    done = 0
    while piece := source.read(_CHUNK):
        target.write(piece)
        done += len(piece)
        step(done, 0, "")
    return done


@contextmanager
def _input(source: Path) -> Iterator[BinaryIO]:
    if source == PIPE:
        yield sys.stdin.buffer
    else:
        with source.open("rb") as file:
            yield file


@contextmanager
def _seekable(source: Path) -> Iterator[BinaryIO]:
    """Open a sealed file; one on standard input is kept in memory, because its end is checked before its beginning."""
    if source != PIPE:
        with source.open("rb") as file:
            yield file
        return
    with os.fdopen(os.memfd_create("cloister-sealed", os.MFD_CLOEXEC), "w+b") as file:
        while piece := sys.stdin.buffer.read(_CHUNK):
            file.write(piece)
        file.seek(0)
        yield file


@contextmanager
def _text(source: Path) -> Iterator[TextIO]:
    with source.open(encoding="utf-8-sig", newline="") as file:
        yield file


@contextmanager
def _table(out: Path, dialect: dict[str, str]) -> Iterator[Callable[[Sequence[str]], Any]]:
    """Write a table that appears whole, or not at all."""
    import io

    from cloister.atomicfile import AtomicFile

    with AtomicFile(out) as file:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n", **dialect)  # type: ignore[arg-type]

        def write(row: Sequence[str]) -> None:
            writer.writerow(row)
            file.write(text.getvalue().encode())
            text.seek(0)
            text.truncate()

        yield write


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


def refuse_existing(out: Path) -> None:
    """Raise CloisterError(FILE_EXISTS) when there is something under this name already."""
    from cloister.sealed.journal import MARKER_NAME
    from cloister.sealed.manifest import MANIFEST_NAME

    if out == PIPE or ((out / MARKER_NAME).exists() and not (out / MANIFEST_NAME).exists()):
        return  # an interrupted run of other work is written over
    if out.exists() or out.is_symlink():
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{out} is already there",
            why="nothing is overwritten",
            todo="choose another name with --output, or remove it yourself",
        )
