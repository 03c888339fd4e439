# SPDX-License-Identifier: Apache-2.0
"""`cloister attest`: what attest found out about every process that enrolled, and finding it out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import Json, State, existing_file, in_session, run_async
from cloister.cli.output import Output, clean, make_table
from cloister.errors import EXIT_CODE, CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.guest.verdictbundle import Replayed, VerdictBundle

app = typer.Typer(help="Verdicts about the evidence of every process, and the workload CA.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Verdicts about the evidence of every process, and the workload CA."""


@app.command()
def verdicts(
    spiffe_id: Annotated[str, typer.Option("--id", help="Only verdicts about this SPIFFE id.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many, newest first.")] = 20,
    checks: Annotated[bool, typer.Option("--checks", help="Print every check with what was wanted and got.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """List attest's verdicts, newest first."""

    async def work(session: Session) -> list[dict[str, Any]]:
        return await list_verdicts(session, limit=limit, spiffe_id=spiffe_id)

    found = in_session(state, work)
    output = Output(as_json=json)
    if json or not checks:
        columns = ("id", "time", "role", "accepted", "simulated", "passed", "failed", "spiffe_id")
        output.rows("verdicts", found, columns, empty="no verdicts yet")
        return
    for verdict in found:
        table = make_table("check", "ok", "wanted", "got", title=clean(f"{verdict['time']} {verdict['spiffe_id']}"))
        for check in verdict["checks"]:
            row = (check["name"], "yes" if check["ok"] else "NO", check["wanted"], check["got"])
            table.add_row(*(clean(cell) for cell in row))
        output.out.print(table)


@app.command()
def bundle(
    verdict: Annotated[int, typer.Argument(metavar="ID", min=1, help="Of `cloister attest verdicts`.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Save a verdict with everything it was made from: quote, event log, collateral, policy."""

    async def work(session: Session) -> bytes:
        from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc

        answer = await session.call(
            attest_pb2_grpc.VerdictServiceStub(session.channel("attest")).GetVerdictBundle,
            attest_pb2.GetVerdictBundleRequest(id=verdict),
            what="getting a verdict",
        )
        return bytes(answer.bundle)

    from cloister.atomicfile import write_atomically

    data = in_session(state, work)
    write_atomically(out.resolve(), data, mode=0o644)
    Output(as_json=json).item({"id": verdict, "file": str(out.resolve()), "bytes": len(data)})


@app.command()
def replay(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Made by `cloister attest bundle`.")],
    root: Annotated[Path | None, typer.Option(help="Root that it must be under (PEM).")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Keys of attest, one of which must have signed it: JWK set, or trust bundle.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a verdict again from its file alone, offline, at the time of the verdict; exit 0 when it is the same."""
    from cloister.guest import verdictbundle

    source = existing_file(file, what="the verdict bundle")
    if source.stat().st_size > verdictbundle.MAX_BUNDLE_SIZE:
        raise CloisterError(
            Code.VERDICT_INVALID,
            what=f"{source.name} is no verdict bundle",
            why=f"it is larger than {verdictbundle.MAX_BUNDLE_SIZE} bytes",
            todo="name a file that `cloister attest bundle` made",
        )
    data = source.read_bytes()
    recorded = verdictbundle.VerdictBundle.parse(data)
    if root is not None:
        _require_root(recorded, existing_file(root, what="the root"))
    signature = _signature(recorded, data, existing_file(keys, what="the keys") if keys else None)
    made = run_async(verdictbundle.replay(recorded))
    _show_replay(Output(as_json=json), recorded, made, signature)
    if not made.same:
        if json:
            raise typer.Exit(EXIT_CODE[Code.VERDICT_INVALID.kind])  # the replay is the one document on stdout
        raise CloisterError(
            Code.VERDICT_INVALID,
            what="the verdict does not follow from what the file holds",
            why=made.differences[0],
            todo="trust neither; get the bundle again from attest",
        )


def _require_root(recorded: VerdictBundle, path: Path) -> None:
    from cloister.tdx.trustroot import TrustRoot

    root = TrustRoot.from_pem(path.read_bytes(), simulated=recorded.root.simulated)
    if root.certificate_der != recorded.root.certificate_der:
        raise CloisterError(
            Code.VERDICT_INVALID,
            what="the verdict was made under another root",
            why=f"wanted SHA-256 {root.fingerprint.hex()}",
            todo="name the root that attest was configured with at the time",
        )


def _signature(recorded: VerdictBundle, data: bytes, keys: Path | None) -> str:
    """Return what is to be said of a bundle's signature; with keys, raise CloisterError unless it verifies."""
    from cloister.ear import TokenRejected
    from cloister.guest.verdictsignature import signing_key_id, verify_signature

    if keys is not None:
        return f"verified: by the key {verify_signature(data, keys=_token_keys(keys))}"
    if not recorded.signature:
        return "UNSIGNED: anybody can have made this file"
    try:
        return f"not verified: name the keys of attest with --keys (it names the key {signing_key_id(recorded)})"
    except TokenRejected as error:
        raise CloisterError(
            Code.VERDICT_INVALID,
            what="the signature of the verdict bundle is none",
            why=str(error),
            todo="get the bundle again from attest",
        ) from None


def _token_keys(path: Path) -> Sequence[Mapping[str, str]]:
    """Read attest's token keys from a JWK set (RFC 7517) or a trust bundle."""
    import json

    from cloister.runtime.bundle import TrustBundle

    data = path.read_bytes()
    try:
        document = json.loads(data)
        if isinstance(document, dict) and isinstance(keys := document.get("keys"), list):
            return [key for key in keys if isinstance(key, dict)]
    except ValueError:
        pass
    return TrustBundle.parse(data).token_keys


def _show_replay(output: Output, recorded: VerdictBundle, made: Replayed, signature: str) -> None:
    import hashlib

    verdict = made.evidence.verdict if made.evidence else None
    document = {
        "same": made.same,
        "accepted": made.accepted,
        "spiffe_id": recorded.spiffe_id,
        "time": recorded.time.isoformat(),
        "verifier": recorded.verifier,
        "signature": signature,
        "root_sha256": hashlib.sha256(recorded.root.certificate_der).hexdigest(),
        "simulated": recorded.root.simulated,
        "tcb_status": str(verdict.status) if verdict else "",
        "advisories": list(verdict.advisories) if verdict else [],
        "differences": list(made.differences),
    }
    if output.as_json:
        checks = [{"name": c.name, "ok": c.ok, "wanted": c.wanted, "got": c.got} for c in made.checks]
        output.item(document | {"checks": checks})
        return
    table = make_table("check", "ok", "wanted", "got", title=clean(f"{recorded.time} {recorded.spiffe_id}"))
    for check in made.checks:
        table.add_row(*(clean(cell) for cell in (check.name, "yes" if check.ok else "NO", check.wanted, check.got)))
    output.out.print(table)
    output.item(document)


async def list_verdicts(session: Session, *, limit: int, spiffe_id: str = "") -> list[dict[str, Any]]:
    """Return verdicts, newest first, as documents."""
    from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc

    answer = await session.call(
        attest_pb2_grpc.VerdictServiceStub(session.channel("attest")).ListVerdicts,
        attest_pb2.ListVerdictsRequest(limit=limit, spiffe_id=spiffe_id),
        what="listing verdicts",
    )
    return [
        {
            "id": verdict.id,
            "has_bundle": verdict.has_bundle,
            "time": datetime.fromtimestamp(verdict.time_unix_ms / 1000, UTC).isoformat(timespec="milliseconds"),
            "role": verdict.role,
            "spiffe_id": verdict.spiffe_id,
            "accepted": verdict.accepted,
            "simulated": verdict.simulated,
            "passed": sum(check.ok for check in verdict.checks),
            "failed": [check.name for check in verdict.checks if not check.ok],
            "checks": [
                {"name": check.name, "ok": check.ok, "wanted": check.wanted, "got": check.got}
                for check in verdict.checks
            ],
        }
        for verdict in answer.verdicts
    ]
