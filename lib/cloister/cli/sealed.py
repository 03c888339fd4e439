# SPDX-License-Identifier: Apache-2.0
"""`cloister sealed`: look at sealed data, check it, and bring it under a newer version of its key."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, State, in_session
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.sealed.manifest import Manifest

app = typer.Typer(help="Look at sealed data, check it, re-wrap it.", no_args_is_help=True)

Place = Annotated[Path, typer.Argument(metavar="PATH", help="Sealed directory or file.")]
Places = Annotated[list[Path], typer.Argument(metavar="PATH...", help="Sealed directories or files.")]
_COLUMNS: Final = ("path", "bytes", "sealed_bytes", "segment_size", "schema_version")


@app.command()
def ls(path: Place, json: Json = False) -> None:
    """List the files of a sealed directory, from its manifest; needs no key, and says who signed it."""
    manifest = _manifest(path)
    signed = _signature(manifest, path)
    output = Output(as_json=json)
    records = [
        {
            "path": entry.path,
            "bytes": entry.length,
            "sealed_bytes": entry.stream_length,
            "segment_size": entry.segment_size,
            "schema_version": entry.schema_version,
        }
        for entry in manifest.files
    ]
    output.rows("files", records, _COLUMNS, empty="nothing")
    output.note(f"{manifest.dataset}, version {manifest.version}; {signed}")


@app.command()
def info(path: Place, json: Json = False) -> None:
    """Show what can be known without a key: which key opens it, what it claims to be, who signed it."""
    if path.is_dir():
        from cloister.sealed.directory import SealedDirectory

        manifest, peek = _manifest(path), SealedDirectory.peek(path)
        document: dict[str, Any] = {
            "kind": "sealed directory",
            "dataset": manifest.dataset,
            "version": manifest.version,
            "parent": f"sha384:{manifest.parent.hex()}" if manifest.parent else "",
            "manifest_digest": f"sha384:{peek.manifest_digest.hex()}",
            "signer": manifest.signer,
            "signature": _signature(manifest, path),
            "key": peek.key_uri,
            "key_version": peek.key_version,
            "files": len(manifest.files),
            "bytes": manifest.size,
        }
    else:
        document = _file_info(path)
    Output(as_json=json).item(document)


@app.command()
def verify(
    paths: Places,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Only what needs no key: form, listing, signature.")
    ] = False,
    signers: Annotated[
        list[str] | None, typer.Option("--signer", metavar="DID", help="Accept only what this did:key signed.")
    ] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Read every byte and check that it is what was sealed. The key must have the purpose `export`."""
    output = Output(as_json=json)
    if without_key:
        found = [_verify_outside(path, signers or []) for path in paths]
    else:

        async def work(session: Session) -> list[dict[str, Any]]:
            return [await _verify(session, path, signers or [], output) for path in paths]

        found = in_session(state, work)
    output.rows("verified", found, ("path", "dataset", "version", "files", "bytes", "signer"), empty="nothing")


@app.command()
def rewrap(paths: Places, state: State = None, json: Json = False) -> None:
    """Bring the headers under the newest version of the key; the data is not touched, and manifests stay.

    Give the same command again when it was interrupted.
    """
    output = Output(as_json=json)

    async def work(session: Session) -> list[dict[str, Any]]:
        return [await _rewrap(session, path, output) for path in paths]

    output.rows("rewrapped", in_session(state, work), ("path", "key", "key_version", "files"), empty="nothing")


async def _rewrap(session: Session, path: Path, output: Output) -> dict[str, Any]:
    import asyncio

    from cloister.cli.sealedfiles import stoppable
    from cloister.cli.trust import owner_keys
    from cloister.sealed.rewrap import rewrap_directory, rewrap_file

    client = await owner_keys(session)
    loop = asyncio.get_running_loop()

    def ask(key_uri: str, key_version: int, wrapped: bytes) -> tuple[int, bytes]:
        asked = client.rewrap_data_key(key_uri, key_version=key_version, wrapped=wrapped)
        answer = asyncio.run_coroutine_threadsafe(asked, loop).result()
        return answer.key_version, answer.wrapped

    with output.progress(f"re-wrapping {path.name}", 0) as advance:
        if path.is_dir():
            done = await stoppable(lambda step: rewrap_directory(path, ask, progress=step), advance)
        else:
            done = await stoppable(lambda _step: rewrap_file(_existing(path), ask), advance)
    return {"path": str(path), "key": done.key_uri, "key_version": done.key_version, "files": done.files}


async def _verify(session: Session, path: Path, signers: list[str], output: Output) -> dict[str, Any]:
    from cloister.cli.sealedfiles import stoppable
    from cloister.cli.trust import owner_keys
    from cloister.sealed.directory import SealedDirectory
    from cloister.sealed.format import Header
    from cloister.sealed.stream import SealedReader

    client = await owner_keys(session)
    if not path.is_dir():
        with _existing(path).open("rb") as file:
            header = Header.read(file, name=str(path))
        data_key = await client.open_data_key(header.key_uri, key_version=header.key_version, wrapped=header.wrapped)
        with SealedReader(path, data_key=data_key) as reader:
            size = len(reader.readall())
        return {"path": str(path), "dataset": header.associated.dataset, "files": 1, "bytes": size}
    peek = SealedDirectory.peek(path)
    data_key = await client.open_data_key(
        peek.key_uri, key_version=peek.key_version, wrapped=peek.wrapped, manifest_digest=peek.manifest_digest
    )
    directory = SealedDirectory.open(path, data_key=data_key, signers=signers)
    with output.progress(f"verifying {path.name}", directory.manifest.size) as advance:
        await stoppable(lambda step: directory.verify(progress=step), advance)
    return _verified(path, directory.manifest)


def _verify_outside(path: Path, signers: list[str]) -> dict[str, Any]:
    from cloister.sealed.directory import SealedDirectory
    from cloister.sealed.manifest import manifest_invalid

    if not path.is_dir():
        return {"path": str(path), "dataset": _file_info(path)["dataset"], "files": 1}
    manifest = _manifest(path)
    if manifest.signer or signers:
        manifest.verify_signature(name=str(path))
    if signers and manifest.signer not in signers:
        raise manifest_invalid(str(path), f"it was signed by {manifest.signer}, not by {' or '.join(signers)}")
    SealedDirectory.check_outside(path, manifest)
    return _verified(path, manifest)


def _verified(path: Path, manifest: Manifest) -> dict[str, Any]:
    return {
        "path": str(path),
        "dataset": manifest.dataset,
        "version": manifest.version,
        "files": len(manifest.files),
        "bytes": manifest.size,
        "signer": manifest.signer,
    }


def _file_info(path: Path) -> dict[str, Any]:
    from cloister.sealed.columns import read_rows, sealed_columns
    from cloister.sealed.format import Header
    from cloister.sealed.segments import Layout

    if _existing(path).suffix in {".csv", ".tsv"}:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            headers = sealed_columns(next(iter(read_rows(lines, path.name)), []))
        keys = sorted({f"{header.key_uri} version {header.key_version}" for header in headers.values()})
        names = [header.name for header in headers.values()]
        return {"kind": "table", "dataset": "", "sealed_columns": names, "keys": keys}
    with path.open("rb") as file:
        header = Header.read(file, name=str(path))
    bound = header.associated
    length = Layout(header.segment_size).plaintext_length(path.stat().st_size - header.size)
    return {
        "kind": "sealed file",
        "dataset": bound.dataset,
        "path": bound.path,
        "schema_version": bound.schema_version,
        "file_id": bound.file_id.hex(),
        "key": header.key_uri,
        "key_version": header.key_version,
        "segment_size": header.segment_size,
        "bytes": length,
        "modified": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
    }


def _manifest(path: Path) -> Manifest:
    from cloister.sealed.manifest import MANIFEST_NAME, Manifest, read_manifest

    return Manifest.parse(read_manifest(path), name=str(path / MANIFEST_NAME))


def _signature(manifest: Manifest, path: Path) -> str:
    if not manifest.signer:
        return "not signed"
    manifest.verify_signature(name=str(path))
    return f"signed by {manifest.signer}"


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there is no sealed file {path}",
            why="it does not exist" if not path.exists() else "it is not a regular file",
            todo="name a sealed directory or file",
        )
    return path
