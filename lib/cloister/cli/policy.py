# SPDX-License-Identifier: Apache-2.0
"""`cloister policy`: write, test and compare release policies, and see why a TD would or would not get a key.

validate, test, diff and explain --token work on files alone: no broker, no certificate.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.keys import PurposeName
from cloister.cli.options import Json, State, existing_file, in_session
from cloister.cli.output import Output, clean, error_document, make_table, write_json
from cloister.errors import EXIT_CODE, CloisterError, Code

if TYPE_CHECKING:
    from rich.console import Console

    from cloister.ear import Ear
    from cloister.release.blocks import Block, Decision
    from cloister.release.policy import ReleasePolicy

PolicyFile = Annotated[Path, typer.Argument(metavar="FILE", help="Release policy (YAML), or its signed envelope.")]
_SHOWN: Final = 48  # characters of wanted and got in a table; --json has all


def command_group() -> typer.Typer:
    """Return `cloister policy`."""
    from cloister.cli import policyreplay, policysign

    app = typer.Typer(help="Release policies: test them, compare them, see what they would do.", no_args_is_help=True)
    app.command()(validate)
    app.command(name="test")(run_cases_of)
    app.command()(diff)
    app.command()(explain)
    policyreplay.register(app)
    policysign.register(app)
    return app


def validate(file: PolicyFile, json: Json = False) -> None:
    """Check that the broker would take a policy: its form, and its own cases."""
    from cloister.policyblocks import digest_text
    from cloister.release.cases import check_cases

    policy = read_policy(file)
    check_cases(policy, datetime.now(UTC))
    Output(as_json=json).item(
        {
            "name": policy.name,
            "version": policy.version,
            "digest": digest_text(policy.digest),
            "key": str(policy.key),
            "purposes": [purpose.value for purpose in policy.purposes],
            "cases": len(policy.cases),
        }
    )


def run_cases_of(file: PolicyFile, json: Json = False) -> None:
    """Run a policy's own example cases; a failing one fails the command."""
    from cloister.release.cases import check_cases, run_cases

    policy, now = read_policy(file), datetime.now(UTC)
    rows = [
        {
            "ok": result.ok,
            "case": result.case.name,
            "wanted": result.case.block or "allow",
            "got": result.got.name if result.got else "allow",
            "why": "" if result.ok else str(result),
        }
        for result in run_cases(policy, now)
    ]
    problem = None
    try:
        check_cases(policy, now)
    except CloisterError as error:
        problem = error
    output = Output(as_json=json)
    if json and problem is not None:  # one document: the rows as well as the error
        exit_code = EXIT_CODE[problem.kind]
        write_json({"cases": rows, "error": error_document(problem), "exit_code": exit_code})
        raise typer.Exit(exit_code)
    output.rows("cases", rows, ("ok", "case", "wanted", "got"), empty="the policy has no cases")
    for row in rows:
        if row["why"]:
            output.tell(f"{row['why']}")
    if problem is not None:
        raise problem


def diff(old: PolicyFile, new: PolicyFile, json: Json = False) -> None:
    """Compare two policies: what lets more pass, what less, and which of their cases come out otherwise."""
    from cloister.release.difference import changes, turned

    before, after = read_policy(old), read_policy(new)
    found = [
        {"effect": change.effect.value, "place": change.place, "old": change.old, "new": change.new}
        for change in changes(before, after)
    ]
    turns = [
        {"case": f"{turn.source}: {turn.case}", "old": _outcome(turn.old), "new": _outcome(turn.new)}
        for turn in turned(before, after, datetime.now(UTC))
    ]
    follows = (after.version, after.previous) == (before.version + 1, before.digest)

    def render(console: Console) -> None:
        _table(console, found, ("effect", "place", "old", "new"), empty="the policies allow the same")
        if turns:
            _table(console, turns, ("case", "old", "new"), empty="")
        if not follows:
            console.print(f"NEW does not follow OLD: its version has to be {before.version + 1}, its previous", end=" ")
            console.print(f"sha384:{before.digest.hex()}", markup=False, soft_wrap=True)

    document = {"same": not found, "follows": follows, "changes": found, "cases": turns}
    Output(as_json=json).result(document, render)


def explain(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="Release policy or envelope; default: the one in force.")
    ] = None,
    token: Annotated[Path | None, typer.Option("--token", help="An attestation result (EAR, JWT).")] = None,
    index: Annotated[int | None, typer.Option("--index", min=0, help="Or the index of a request in the log.")] = None,
    key: Annotated[str, typer.Option("--key", metavar="URI", help="Whose policy in force, without FILE.")] = "",
    purpose: Annotated[
        PurposeName | None, typer.Option("--purpose", help="Default: the first that the policy and the role allow.")
    ] = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Say block by block what a policy makes of a token, or of a past request: what was wanted, what was got.

    FILE with --token needs no broker; then the token's signature is not looked at, nor what only the broker knows.
    """
    from cloister.release.explain import explain_token
    from cloister.release.keys import Purpose

    if (token is None) == (index is None) or (file is None and token is not None and not key):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="it is not clear what is to be explained",
            why="a policy is applied to one attestation result, or to one request in the log",
            todo="give FILE or --key URI with --token FILE, or --index N",
        )
    wanted = Purpose(purpose) if purpose else None
    if file is not None and token is not None:
        decision = explain_token(read_policy(file), _read_token(token)[1], purpose=wanted)
    else:
        from cloister.cli.policyreplay import Question, explained

        question = Question(
            policy_yaml=policy_text(existing_file(file, what="the policy").read_bytes()) if file else b"",
            key_uri=key,
            token=_read_token(token)[0] if token else "",
            index=index or 0,
            purpose=wanted,
        )
        decision = in_session(state, lambda session: explained(session, question))
    show_decision(Output(as_json=json), decision)


def _read_token(path: Path) -> tuple[str, Ear]:
    """Return a token and what it says; whether it is authentic is not looked at."""
    from cloister import ear as ears

    try:
        text = existing_file(path, what="the attestation result").read_text("ascii").strip()
        return text, ears.read_unverified(text)
    except (ears.TokenRejected, UnicodeDecodeError) as error:
        raise CloisterError(
            Code.TOKEN_INVALID,
            what=f"{path} holds no attestation result",
            why=str(error),
            todo="name the file with the JWT that attest issued",
        ) from None


def read_policy(path: Path) -> ReleasePolicy:
    """Return the policy in a file: YAML, or the payload of a signed envelope."""
    from cloister.release.policy import parse_policy

    return parse_policy(policy_text(existing_file(path, what="the policy").read_bytes()))


def policy_text(data: bytes) -> bytes:
    """Return a policy's YAML, out of its envelope when it is in one; nobody's signature is checked."""
    from cloister import strictjson
    from cloister.dsse import Envelope

    try:
        value = strictjson.load(data, max_size=len(data))
    except strictjson.StrictJsonError:
        return data  # not JSON: YAML, or nothing
    # A policy may be written as JSON as well; it has no member of this name.
    return Envelope.parse(data).payload if isinstance(value, dict) and "payloadType" in value else data


def show_decision(output: Output, decision: Decision) -> None:
    """Show every block with what was wanted and got."""
    document = {"granted": decision.granted, "blocks": [block_document(block) for block in decision.blocks]}

    def render(console: Console) -> None:
        _table(console, document["blocks"], ("ok", "name", "wanted", "got"), empty="no blocks: nothing is released")
        for block in decision.blocks:
            if not block.ok:
                lines = f"{block.name}\n  wanted {clean(block.wanted)}\n  got    {clean(block.got)}"
                console.print(lines, markup=False, soft_wrap=True)
        failed = decision.failed
        console.print("granted" if decision.granted else f"denied by {failed.name if failed else 'default'}")

    output.result(document, render)


def block_document(block: Block) -> dict[str, Any]:
    """Return a block as JSON output shows it."""
    return {"name": block.name, "ok": block.ok, "wanted": block.wanted, "got": block.got}


def _outcome(decision: Decision) -> str:
    return "allow" if decision.failed is None else decision.failed.name


def _table(console: Console, records: Any, columns: tuple[str, ...], *, empty: str) -> None:
    if not records:
        console.print(empty, markup=False)
        return
    table = make_table(*columns)
    for record in records:
        table.add_row(*(clean(_cell(record[column])) for column in columns))
    console.print(table)


def _cell(value: object) -> str:
    text = ("yes" if value else "NO") if isinstance(value, bool) else str(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
