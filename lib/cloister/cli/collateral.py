# SPDX-License-Identifier: Apache-2.0
"""`cloister collateral`: what Intel says about platforms, fetched, kept, and carried to where there is no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cloister.cli.collateralsource import (
    Directory,
    EditionOption,
    Pccs,
    PccsCa,
    Place,
    Root,
    choose_place,
    family_named,
    kept_families,
)
from cloister.cli.options import Json, State, existing_file, run_async
from cloister.cli.output import Output
from cloister.collateral.family import Edition, Family, PckCa, Tee
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.collateral.bundle import CollateralBundle
    from cloister.collateral.commands import Outcome

app = typer.Typer(help="What Intel says about platforms: fetched, kept, carried.", no_args_is_help=True)

_SOON: Final = timedelta(days=7)
_COLUMNS: Final = ("family", "evaluation_number", "expires", "path")
Reset = Annotated[bool, typer.Option("--reset", help="Accept collateral that is older than what is here.")]


@app.callback()
def _group() -> None:
    """What Intel says about platforms: fetched, kept, carried."""


@app.command()
def fetch(
    quote: Annotated[
        list[Path] | None, typer.Option("--quote", metavar="FILE", help="Of this quote's platform.")
    ] = None,
    fmspc: Annotated[list[str] | None, typer.Option("--fmspc", help="Of these platforms; 12 hex digits.")] = None,
    ca: Annotated[PckCa, typer.Option("--ca", help="With --fmspc: which CA certifies them.")] = PckCa.PLATFORM,
    tee: Annotated[Tee, typer.Option("--tee", help="With --fmspc.")] = Tee.TDX,
    edition: EditionOption = Edition.STANDARD,
    pccs: Pccs = None,
    pccs_ca: PccsCa = None,
    root: Root = None,
    directory: Directory = None,
    reset: Reset = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Fetch the collateral of platforms, verify it and keep it.

    Without --quote and --fmspc: anew, for every family that is here.
    """
    from cloister.collateral import commands

    place = choose_place(root=root, directory=directory, pccs=pccs, pccs_ca=pccs_ca, state=state)
    server = place.require_server()
    families = [_family_of(path, place, edition) for path in quote or ()]
    families += [Family.of(digits, ca, tee, edition) for digits in fmspc or ()]
    families = list(dict.fromkeys(families or kept_families(place.directory)))
    if not families:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="there is nothing to fetch",
            why=f"no quote and no FMSPC is named, and no collateral is kept in {place.directory}",
            todo="name a quote with --quote, or platforms with --fmspc",
        )
    place.create()
    output = Output(as_json=json)
    output.note(f"fetching from {server.base_url}: {', '.join(family.name for family in families)}")
    outcomes = run_async(commands.fetch(families, place.directory, server=server, root=place.root, reset=reset))
    output.rows("families", _records(outcomes), _COLUMNS, empty="")


@app.command()
def export(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="As `cloister collateral show` names it.")],
    target: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    root: Root = None,
    directory: Directory = None,
    state: State = None,
    json: Json = False,
) -> None:
    """Write a family's bundle to a file that can be carried to another machine."""
    from cloister.collateral import commands

    place = choose_place(root=root, directory=directory, pccs=None, pccs_ca=None, state=state)
    found = family_named(family)
    outcome = commands.export(found, place.directory, target, root=place.root, now=datetime.now(UTC))
    Output(as_json=json).item(_record(outcome))


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="A bundle, or platform_collaterals.json of a PCCS.")],
    root: Root = None,
    directory: Directory = None,
    reset: Reset = False,
    state: State = None,
    json: Json = False,
) -> None:
    """Verify the collateral in a file and keep it."""
    from cloister.collateral import commands

    place = choose_place(root=root, directory=directory, pccs=None, pccs_ca=None, state=state)
    path = existing_file(source, what="the bundle")
    place.create()
    imported = commands.import_(path, place.directory, root=place.root, now=datetime.now(UTC), reset=reset)
    output = Output(as_json=json)
    refused = [
        {"family": family.name, "code": error.code.text, "what": error.what, "why": error.why}
        for family, error in imported.refused
    ]
    if json:
        output.item({"families": _records(imported.taken), "refused": refused})
        return
    output.rows("families", _records(imported.taken), _COLUMNS, empty="")
    for row in refused:
        output.note(f"not taken: {row['family']}: {row['what']} ({row['why']})")


@app.command()
def show(
    what: Annotated[
        str | None, typer.Argument(metavar="[FAMILY|FILE]", help="One of them, document by document.")
    ] = None,
    root: Root = None,
    directory: Directory = None,
    state: State = None,
    json: Json = False,
) -> None:
    """List the collateral that is kept here, or the documents of one bundle. Everything is verified anew."""
    from cloister.collateral.bundle import CollateralBundle, bundle_path, require_root

    place = choose_place(root=root, directory=directory, pccs=None, pccs_ca=None, state=state)
    output = Output(as_json=json)
    now = datetime.now(UTC)
    if what is not None:
        path = Path(what)
        if not path.is_file():
            path = existing_file(bundle_path(place.directory, family_named(what)), what="the bundle")
        output.rows("documents", _documents(CollateralBundle.read(path), place, now), _DOCUMENT_COLUMNS, empty="")
        return
    families = kept_families(place.directory)
    if families:
        require_root(place.directory, place.root)
    records = [_kept(place, family, now) for family in families]
    empty = f"no collateral in {place.directory}"
    output.rows("families", records, ("family", "evaluation_number", "fetched", "expires", "state", "why"), empty=empty)


_DOCUMENT_COLUMNS: Final = ("document", "number", "issued", "expires", "state")


def _documents(bundle: CollateralBundle, place: Place, now: datetime) -> list[dict[str, Any]]:
    documents = bundle.verify(place.root).documents.values()
    return [
        {
            "document": document.resource.kind.value,
            "number": document.number,
            "issued": _time(document.issued),
            "expires": _time(document.expires),
            "state": _state(document.valid_from, document.expires, now),
        }
        for document in documents
    ]


def _kept(place: Place, family: Family, now: datetime) -> dict[str, Any]:
    from cloister.collateral.bundle import CollateralBundle, bundle_path

    try:
        bundle = CollateralBundle.read(bundle_path(place.directory, family))
        verified = bundle.verify(place.root)
        if bundle.family != family:
            raise CloisterError(Code.COLLATERAL_INVALID, what="", why=f"it says {bundle.family.name}")
    except CloisterError as error:
        why = error.why or error.what
        return {"family": family.name, "state": "not good", "why": why}
    return {
        "family": family.name,
        "evaluation_number": verified.evaluation_number,
        "fetched": _time(bundle.fetched_at),
        "expires": _time(verified.expires),
        "state": _state(verified.valid_from, verified.expires, now),
        "why": "",
    }


def _state(start: datetime, end: datetime, now: datetime) -> str:
    """Return "valid", "expires soon" (within seven days), "expired" or "not valid yet"."""
    if now < start:
        return "not valid yet"
    if now > end:
        return "expired"
    return "expires soon" if end - now <= _SOON else "valid"


def _family_of(path: Path, place: Place, edition: Edition) -> Family:
    from cloister.cli.quote import read_quote
    from cloister.collateral.commands import family_of

    return family_of(read_quote(path), roots=[place.root], edition=edition)


def _records(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    return [_record(outcome) for outcome in outcomes]


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "family": outcome.family.name,
        "evaluation_number": outcome.evaluation_number,
        "expires": _time(outcome.expires),
        "path": str(outcome.path),
    }


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
