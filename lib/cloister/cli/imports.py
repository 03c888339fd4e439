# SPDX-License-Identifier: Apache-2.0
"""`cloister import`: bring data over that other programs encrypted. Plaintext passes through memory only."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import Json, State, existing_file, in_session
from cloister.cli.output import Output
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session

app = typer.Typer(help="Seal what other programs encrypted.", no_args_is_help=True)


@app.callback()
def group() -> None:
    """Seal what other programs encrypted."""


@app.command()
def bigdl(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="File or directory that BigDL or Nano encrypted.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="New sealed directory.")],
    key: Annotated[str, typer.Option("--key", metavar="URI", help="Key to seal with.")],
    legacy_key: Annotated[
        Path,
        typer.Option("--legacy-key", metavar="FILE", help="File with the plaintext data key of the other program."),
    ],
    dataset: Annotated[str, typer.Option("--name", help="Name in the manifest; default: the key's last part.")] = "",
    state: State = None,
    json: Json = False,
) -> None:
    """Open Fernet files with their own key and seal their content. SRC is left as it is; so is what it contains.

    A pickle stays a pickle: sealed, it is authentic, and still runs code when it is loaded.
    """
    from cloister.data.legacy import read_key

    output = Output(as_json=json)
    old = read_key(existing_file(legacy_key, what="the legacy key"))
    files = _files(source)

    async def work(session: Session) -> dict[str, Any]:
        from cloister.cli.sealedfiles import publish, refuse_existing, stoppable
        from cloister.cli.signer import signing_key
        from cloister.cli.trust import owner_keys
        from cloister.data.legacy import read_legacy
        from cloister.keyuri import KeyUri
        from cloister.sealed.directory import SealedDirectoryWriter
        from cloister.sealed.manifest import Manifest

        refuse_existing(out)
        client = await owner_keys(session)
        data_key = await client.generate_data_key(key)
        name = dataset or KeyUri.parse(key).path.rpartition("/")[2]
        signer = signing_key(session.state)

        def seal(step: Any) -> Manifest:
            with SealedDirectoryWriter(out, data_key=data_key, dataset=name, signing_key=signer) as writer:
                done = 0
                for path, place in files.items():
                    writer.add(path, read_legacy(place, old))
                    done += place.stat().st_size
                    step(done, 0, path)
                return writer.finish()

        with output.progress(f"importing {source.name}", sum(p.stat().st_size for p in files.values())) as advance:
            manifest = await stoppable(seal, advance)
        await publish(client, manifest, data_key)
        return {
            "directory": str(out.absolute()),
            "dataset": name,
            "files": len(manifest.files),
            "bytes": manifest.size,
            "manifest_digest": f"sha384:{manifest.digest.hex()}",
            "signer": manifest.signer,
            "key": key,
        }

    output.item(in_session(state, work))


def _files(source: Path) -> dict[str, Path]:
    """Return the files to import by the path they get; refuse a directory in which some are not encrypted."""
    from cloister.data.legacy import is_legacy

    if not source.exists():
        raise CloisterError(Code.FILE_NOT_FOUND, what=f"there is no {source}", todo="check the name")
    found = {source.name: source}
    if source.is_dir():
        found = {str(p.relative_to(source)): p for p in sorted(source.rglob("*")) if p.is_file()}
    for path in found.values():
        with path.open("rb") as file:
            if not is_legacy(file.read(5)):
                raise CloisterError(
                    Code.DATA_INVALID,
                    what=f"{path} is not a file that BigDL encrypted",
                    why="it does not begin like a Fernet token",
                    todo="move it out of the directory, or seal it with: cloister seal",
                )
    if not found:
        raise CloisterError(Code.DATA_INVALID, what=f"{source} holds no files", todo="name the encrypted data")
    return found
