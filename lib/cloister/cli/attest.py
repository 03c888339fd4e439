# SPDX-License-Identifier: Apache-2.0
"""`cloister attest`: what attest found out about every process that enrolled."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister.cli.options import Json, State, in_session
from cloister.cli.output import Output, clean, make_table

if TYPE_CHECKING:
    from cloister.cli.session import Session

app = typer.Typer(help="Verdicts about the evidence of every process.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Verdicts about the evidence of every process."""


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
        columns = ("time", "role", "accepted", "simulated", "passed", "failed", "spiffe_id")
        output.rows("verdicts", found, columns, empty="no verdicts yet")
        return
    for verdict in found:
        table = make_table("check", "ok", "wanted", "got", title=clean(f"{verdict['time']} {verdict['spiffe_id']}"))
        for check in verdict["checks"]:
            row = (check["name"], "yes" if check["ok"] else "NO", check["wanted"], check["got"])
            table.add_row(*(clean(cell) for cell in row))
        output.out.print(table)


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
