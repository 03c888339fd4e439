# SPDX-License-Identifier: Apache-2.0
"""`cloister quote`: what stands in a quote, whether it is authentic, and how up to date its platform is."""

from __future__ import annotations

import re
import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final

import typer

from cloister.cli.collateralsource import Directory, EditionOption, Pccs, PccsCa, Root, choose_place, from_file, look_up
from cloister.cli.options import Json, State, existing_file
from cloister.cli.output import Output, clean, make_table
from cloister.collateral.family import Edition, Family
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.tdx.collateral import Collateral

app = typer.Typer(help="TDX and SGX quotes as files.", no_args_is_help=True)

_SECONDS: Final = re.compile(r"[0-9]{1,11}")  # Unix time, until the year 5138
# Members of a verdict that a person reads as `name  value`.
_FACTS: Final = (
    "tee", "quote_version", "fmspc", "pce_id", "platform_instance_id", "pck_ca", "root_sha256", "status",
    "launch_status", "current_status", "advisories", "tcb_date", "tcb_evaluation_number", "earliest_expiry", "time",
    "collateral",
)  # fmt: skip


class Policy(StrEnum):
    """How much is asked of a quote."""

    VERIFY = "verify"  # authentic, of a platform that is not revoked
    DEFAULT = "default"  # that, and the strict default policy


@app.callback()
def _group() -> None:
    """TDX and SGX quotes as files."""


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TDX or SGX quote of version 3, 4 or 5, raw bytes.")],
    json: Json = False,
) -> None:
    """Print every field of a quote. Nothing is verified: a forged quote shows what its forger wrote."""
    from cloister.tdx.quote import QuoteRejected, parse_quote
    from cloister.tdx.show import describe

    data = read_quote(file)
    try:
        fields = describe(parse_quote(data))
    except QuoteRejected as error:
        raise CloisterError(
            Code.QUOTE_REJECTED,
            what=f"{file.name} is not a TDX or SGX quote of version 3, 4 or 5",
            why=f"{error.check}: {error.reason}",
            todo="give the raw quote, not its hexadecimal or Base64 form",
        ) from error
    output = Output(as_json=json)
    if json:
        document: dict[str, dict[str, str]] = {}
        for section, field, value in fields:
            document.setdefault(section, {})[field] = value
        output.item(document)
        return
    output.note("Not verified: this is what the quote claims.")
    table = make_table("section", "field", "value")
    shown = ""
    for section, field, value in fields:
        table.add_row(clean(section) if section != shown else "", clean(field), clean(value))
        shown = section
    output.out.print(table)


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A TDX or SGX quote of version 3, 4 or 5, raw bytes.")],
    collateral: Annotated[
        Path | None,
        typer.Option("--collateral", metavar="BUNDLE", help="Collateral; without it what is kept here, or Intel's."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Verify as at this time, not as of now.")
    ] = None,
    policy: Annotated[Policy, typer.Option("--policy", help="How much is asked of the quote.")] = Policy.DEFAULT,
    html: Annotated[Path | None, typer.Option("--html", metavar="OUT", help="Write a report, too.")] = None,
    edition: EditionOption = Edition.STANDARD,
    pccs: Pccs = None,
    pccs_ca: PccsCa = None,
    root: Root = None,
    directory: Directory = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Verify a quote, check by check: under Intel's root, with the collateral of its platform.

    Ends with 0 when it is accepted, with 3 when it is not; with another code there is no verdict.
    """
    from cloister.cli.quoteverdict import examine

    data = read_quote(file)
    now = datetime.now(UTC) if at is None else parse_time(at)
    place = choose_place(root=root, directory=directory, pccs=pccs, pccs_ca=pccs_ca, state=state)
    given = None if collateral is None else existing_file(collateral, what="the collateral")
    output = Output(as_json=json)

    def source(family: Family) -> tuple[Collateral, str]:
        if given is not None:
            return from_file(given, family), str(given)
        return look_up(family, place, now=now, fixed=at is not None, note=output.note)

    document = examine(data, source, root=place.root, now=now, fixed=at is not None, policy=policy, edition=edition)
    quote = document.pop("quote", [])
    if html is not None:
        from cloister.cli.quotereport import write_quote_report

        write_quote_report(html, document, name=file.name, quote=quote)
    _tell(output, document)
    if "error" in document:
        raise typer.Exit(int(document["exit_code"]))


@app.command()
def conformance(
    json: Json = False,  # noqa: ARG001 (answers are JSON in any case)
) -> None:
    """Answer cases of an outside suite: one JSON object a line on stdin, one answer a line on stdout.

    The form of both is in docs/attestation.md. Ends with 0 when every line has its answer, whatever that is.
    """
    answer_cases(sys.stdin.buffer, sys.stdout.buffer)


def answer_cases(cases: BinaryIO, answers: BinaryIO) -> None:
    """Answer each line as it comes, in constant memory; a line beyond the limit is answered and skipped."""
    from cloister.tdx.conformance import MAX_CASE_SIZE, run_case

    while line := cases.readline(MAX_CASE_SIZE + 2):
        case = line.removesuffix(b"\n")
        answers.write(run_case(case) + b"\n")
        # Whoever waits for an answer before it sends the next case gets it.
        answers.flush()
        while line and not line.endswith(b"\n"):
            line = cases.readline(1 << 20)


def read_quote(path: Path) -> bytes:
    """Return a file's bytes, one more than a quote can have at most; raise CloisterError."""
    from cloister.atomicfile import file_error
    from cloister.tdx.quote import MAX_QUOTE_SIZE

    try:
        with existing_file(path, what="the quote").open("rb") as file:
            return file.read(MAX_QUOTE_SIZE + 1)
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error


def parse_time(text: str) -> datetime:
    """Read ISO 8601 with a zone, or Unix seconds; raise CloisterError(ARGUMENT_INVALID)."""
    try:
        moment = datetime.fromtimestamp(int(text), UTC) if _SECONDS.fullmatch(text) else datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"--at {text[:80]}: not a time" if moment is None else f"--at {text[:80]}: a time without a zone",
            why="documents are valid to the second",
            todo="write it like 2026-11-01T12:00:00Z, or as Unix seconds",
        )
    return moment.astimezone(UTC)


def _tell(output: Output, document: dict[str, Any]) -> None:
    """Give the document as JSON, or checks, facts and verdict to a person."""
    if output.as_json:
        output.item(document)
    else:
        for title, name in (("verification", "checks"), ("default policy", "policy_checks")):
            if not document[name]:
                continue
            table = make_table("check", "ok", "wanted", "got", title=title)
            for row in document[name]:
                cells = (row["name"], "yes" if row["ok"] else "NO", row["wanted"], row["got"])
                table.add_row(*(clean(cell) for cell in cells))
            output.out.print(table)
        facts = {name: document[name] for name in _FACTS if document[name] not in (None, [])}
        output.item(facts)
        for warning in document["warnings"]:
            output.tell(f"warning: {warning}", style="yellow")
    if document["simulated"]:
        output.note("SIMULATED: the root is a development root; this says nothing about a real platform.")
    if "error" not in document:
        if not output.as_json:
            output.tell(f"\naccepted ({document['policy']}): {document['status']}", style="green")
        return
    error = document["error"]
    lines = [f"error {error['code']}: {error['what']}", f"  why: {error['why']}", f"  do:  {error['todo']}"]
    sys.stderr.write("".join(clean(line) + "\n" for line in lines))
