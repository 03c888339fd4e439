# SPDX-License-Identifier: Apache-2.0
"""`cloister audit`: what the broker decided, and proof that its log is the one that was seen before."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import Json, State, existing_file, in_session, state_directory
from cloister.cli.output import Output
from cloister.errors import CloisterError

if TYPE_CHECKING:
    from cloister.cli.session import Session

app = typer.Typer(help="The broker's decision log: read it, keep it, verify it.", no_args_is_help=True)

KeyOption = Annotated[
    str, typer.Option("--log-key", metavar="NAME+ID+KEY", help="The log's key; default: the one remembered here.")
]
UriOption = Annotated[str, typer.Option("--key", metavar="URI", help="Only decisions about this key.")]


@app.command()
def verify(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Exported logs, receipts, checkpoints, proofs.")
    ] = None,
    log_key: KeyOption = "",
    state: State = None,
    json: Json = False,
) -> None:
    """Verify files offline; without any, the broker's whole log as it is now.

    Two checkpoints are of one log that only grew when a proof or an exported log beside them says so.
    """
    from cloister.cli.auditlog import Evidence, known_key

    output = Output(as_json=json)
    columns = ("file", "what", "log_size", "readable", "index", "action", "key_uri", "caller")
    if files:
        evidence = Evidence(known_key(state_directory(state), log_key))
        for path in files:
            evidence.add(existing_file(path, what="the file"))
        evidence.compare()
        output.rows("verified", evidence.results, columns, empty="")
        return

    with tempfile.TemporaryDirectory(prefix="cloister-") as directory:
        path = Path(directory) / "broker"
        document = _exported(path, state, log_key)
    output.rows("verified", [document], columns, empty="")


@app.command()
def tail(
    key: UriOption = "",
    limit: Annotated[int, typer.Option("-n", "--limit", min=1, max=1000, help="At most so many.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Show the newest decisions of your tenant, oldest first: every release, granted or not, and why."""
    output = Output(as_json=json)

    async def work(session: Session) -> None:
        from cloister.cli.auditlog import decision_document, look_at_log

        client, look = await look_at_log(session)
        first = look.checkpoint.size
        for decision in reversed(await client.newest(limit=limit, key_uri=key)):
            document = decision_document(decision)
            output.stream(document, _line(document))
            first = decision.index + 1
        if follow:
            async for decision in client.follow(first=first, key_uri=key):
                document = decision_document(decision)
                output.stream(document, _line(document))

    in_session(state, work)


@app.command()
def show(
    index: Annotated[int, typer.Argument(min=0, help="Its number in the log.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Show one decision whole, block by block; its place in the log is proven."""
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, Any]:
        from cloister.cli.auditlog import entry_document, look_at_log

        client, look = await look_at_log(session)
        logged, _, checkpoint = await client.decision(index, look.seen.log)
        output.note(f"proven: entry {index} of {checkpoint.size}, log {look.seen.log.name}")
        return entry_document(logged)

    document = in_session(state, work)
    if json:
        output.item(document)
        return
    output.item({name: value for name, value in document.items() if name != "blocks" and value not in ("", 0)})
    output.rows("blocks", document["blocks"], ("name", "ok", "wanted", "got"), empty="")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="File to write: JSON lines.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Save the whole log: your tenant's entries, the hashes of all others, and the checkpoint they add up to.

    It is verified before it is in its place. `cloister audit verify FILE` does it again, offline.
    """
    from cloister.atomicfile import file_error

    output = Output(as_json=json)
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        document = _exported(unfinished, state, "")
        unfinished.replace(file)
    except OSError as error:
        raise file_error(error, what=f"cannot write {file}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    output.item(document | {"file": str(file.absolute())})


@app.command()
def checkpoint(
    out: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Save the signed note.")] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Get the log's size and root, signed; it must continue what was seen before, and is remembered."""

    async def work(session: Session) -> dict[str, Any]:
        from cloister.atomicfile import write_atomically
        from cloister.cli.auditlog import look_at_log

        _, look = await look_at_log(session)
        if out is not None:
            write_atomically(out, look.seen.note, mode=0o644)
        found = look.checkpoint
        return {
            "log_key": str(look.seen.log),
            "size": found.size,
            "root": found.root.hex(),
            "checkpoint": look.seen.note.decode(),
        }

    Output(as_json=json).item(in_session(state, work))


@app.command()
def prove(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Checkpoint.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Later checkpoint.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Proof to write.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Get the proof that the log only grew between two checkpoints; it verifies offline, with nothing else."""
    notes = [existing_file(path, what="the checkpoint").read_bytes() for path in (old, new)]

    async def work(session: Session) -> dict[str, Any]:
        from cloister.atomicfile import write_atomically
        from cloister.cli.auditlog import look_at_log

        client, look = await look_at_log(session)
        document = await client.growth(notes[0], notes[1], look.seen.log)
        before, after = document.check(look.seen.log)
        write_atomically(out, document.to_bytes(), mode=0o644)
        return {"file": str(out.absolute()), "old_size": before.size, "new_size": after.size}

    Output(as_json=json).item(in_session(state, work))


@app.command()
def forget(state: State = None, json: Json = False) -> None:
    """Forget which log was seen before: when its operator has explained why another stands in its place."""
    from cloister.transparency.seen import Seen

    directory = state_directory(state)
    document: dict[str, Any] = {"forgotten": directory.seen_log.exists()}
    with suppress(CloisterError):  # a damaged file is forgotten like any other
        seen = Seen.load(directory.seen_log)
        if seen is not None:
            document |= {"log_key": str(seen.log), "size": seen.checkpoint.size, "checkpoint": seen.note.decode()}
    directory.seen_log.unlink(missing_ok=True)
    Output(as_json=json).item(document)


def _exported(path: Path, state: Path | None, log_key: str) -> dict[str, Any]:
    """Export the log into a file and verify the file; return what it holds."""
    from cloister.cli.auditlog import Evidence, export_log, known_key

    with path.open("wb") as file:

        async def work(session: Session) -> dict[str, Any]:
            return await export_log(session, file.write)

        in_session(state, work)
    evidence = Evidence(known_key(state_directory(state), log_key))
    evidence.add(path)
    return evidence.results[0]


def _line(document: dict[str, Any]) -> str:
    verdict = "granted" if document["granted"] else f"denied: {', '.join(document['failed']) or 'see show'}"
    subject = document["key_uri"] or "-"
    parts = (f"{document['index']:>8}", document["time"], document["action"], subject, document["caller"], verdict)
    return "  ".join(parts)
