# SPDX-License-Identifier: Apache-2.0
"""`cloister quote`: what stands in a TDX quote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.cli.options import Json, existing_file
from cloister.cli.output import Output, clean, make_table
from cloister.errors import CloisterError, Code

app = typer.Typer(help="TDX quotes as files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """TDX quotes as files."""


@app.command()
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A version 4 TDX quote, raw bytes.")],
    json: Json = False,
) -> None:
    """Print every field of a quote. Nothing is verified: a forged quote shows what its forger wrote."""
    from cloister.tdx.quote import Quote, QuoteRejected
    from cloister.tdx.show import describe

    path = existing_file(file, what="the quote")
    try:
        fields = describe(Quote.parse(path.read_bytes()))
    except QuoteRejected as error:
        raise CloisterError(
            Code.QUOTE_REJECTED,
            what=f"{path.name} is not a TDX quote of version 4",
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
