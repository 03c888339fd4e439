# SPDX-License-Identifier: Apache-2.0
"""`cloister policy replay`, and explain at the broker: a policy over what is in the log."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.options import Json, State, existing_file, in_session
from cloister.cli.output import Output
from cloister.cli.policy import PolicyFile, policy_text
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.release.blocks import Decision
    from cloister.release.keys import Purpose

_TIMEOUT_S: Final = 300.0  # of a replay: 10,000 requests take some ten seconds
_SINCE: Final = re.compile(r"([1-9][0-9]{0,5})([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def register(app: typer.Typer) -> None:
    """Add the commands to `cloister policy`."""
    app.command()(replay)


def replay(
    file: PolicyFile,
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Only the last 30m, 12h, 7d.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most so many requests, newest first.")] = 1000,
    everything: Annotated[bool, typer.Option("--all", help="Also requests of which nothing would change.")] = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Run a policy over the requests in the log: who would gain, who would lose access, and by which block.

    Each request is decided again at its own time, with its own attestation result. Nothing changes.
    """
    policy_yaml = policy_text(existing_file(file, what="the policy").read_bytes())
    since_s = _seconds(since) if since else 0
    output = Output(as_json=json)

    async def work(session: Session) -> dict[str, int]:
        seen = gained = lost = 0
        async for row in replayed(session, policy_yaml, since_s=since_s, limit=limit):
            seen += 1
            gained += row["change"] == "gains"
            lost += row["change"] == "loses"
            if everything or row["change"]:
                blocks = ", ".join(block["name"] for block in row["failed"])
                verdict = row["change"] or ("still granted" if row["now"] else "still denied")
                text = f"{row['index']:>7}  {row['time']}  {verdict:<13}  {row['purpose']:<8}  {row['caller']}"
                output.stream(row, f"{text}  {blocks}".rstrip())
        return {"requests": seen, "gain": gained, "lose": lost}

    found = in_session(state, work)
    if json:
        output.stream({"summary": found}, "")
    else:
        output.tell(f"{found['requests']} requests: {found['gain']} would gain access, {found['lose']} would lose it")


async def replayed(session: Session, policy_yaml: bytes, *, since_s: int, limit: int) -> AsyncIterator[dict[str, Any]]:
    """Yield the requests in the log with what a policy would make of each, newest first."""
    from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
    from cloister.runtime.channel import stream

    stub = keybroker_pb2_grpc.PolicyServiceStub(session.channel("keybroker"))
    request = keybroker_pb2.ReplayPolicyRequest(policy_yaml=policy_yaml, since_s=since_s, limit=limit)
    async for answer in stream(stub.ReplayPolicy, request, timeout_s=_TIMEOUT_S, what="replaying the policy"):
        change = {(False, True): "gains", (True, False): "loses"}.get((answer.was_granted, answer.would_be_granted), "")
        yield {
            "index": answer.index,
            "time": datetime.fromtimestamp(answer.time_unix_ms / 1000, UTC).isoformat(timespec="milliseconds"),
            "caller": answer.caller,
            "purpose": answer.purpose,
            "was": answer.was_granted,
            "now": answer.would_be_granted,
            "change": change,
            "failed": [_block(block) for block in answer.failed],
        }


@dataclass(frozen=True, slots=True)
class Question:
    """What to explain: a token, or without one the request at an index; an empty policy is the one in force."""

    policy_yaml: bytes
    key_uri: str
    token: str
    index: int
    purpose: Purpose | None


async def explained(session: Session, question: Question) -> Decision:
    """Ask the broker what a policy makes of a token or of a logged request."""
    from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
    from cloister.release.blocks import Block, Decision

    request = keybroker_pb2.ExplainPolicyRequest(policy_yaml=question.policy_yaml, key_uri=question.key_uri)
    if question.token:
        request.attestation_result = question.token
    else:
        request.index = question.index
    if question.purpose:
        request.purpose = keybroker_pb2.Purpose.Value(f"PURPOSE_{question.purpose.name}")
    stub = keybroker_pb2_grpc.PolicyServiceStub(session.channel("keybroker"))
    answer = await session.call(stub.ExplainPolicy, request, what="having the policy explained")
    return Decision(tuple(Block(block.name, block.ok, block.wanted, block.got) for block in answer.blocks))


def _block(block: Any) -> dict[str, Any]:
    return {"name": block.name, "ok": block.ok, "wanted": block.wanted, "got": block.got}


def _seconds(text: str) -> int:
    found = _SINCE.fullmatch(text)
    if found is None:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"--since {text}: not a time",
            why="it is a number and s, m, h or d",
            todo="write for example 30m, 12h or 7d",
        )
    return int(found[1]) * _SECONDS[found[2]]
