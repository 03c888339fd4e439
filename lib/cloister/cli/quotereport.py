# SPDX-License-Identifier: Apache-2.0
"""The report on one quote: one HTML file without scripts or outside references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cloister import __version__
from cloister.cli.output import clean
from cloister.cli.report import template

_FACTS: Final = {
    "verified as at": "time",
    "policy": "policy",
    "TEE": "tee",
    "quote version": "quote_version",
    "FMSPC": "fmspc",
    "PCE id": "pce_id",
    "platform instance": "platform_instance_id",
    "PCK CA": "pck_ca",
    "root, SHA-256": "root_sha256",
    "status at launch": "launch_status",
    "status now": "current_status",
    "advisories": "advisories",
    "TCB date": "tcb_date",
    "TCB evaluation": "tcb_evaluation_number",
    "earliest expiry": "earliest_expiry",
    "collateral": "collateral",
}


def render_quote_report(document: Mapping[str, Any], *, name: str, quote: Sequence[Sequence[str]]) -> str:
    """Return the report as one HTML document; `document` is what `examine` returned, `quote` rows of its fields."""
    checks = [*document["checks"], *document["policy_checks"]]
    facts = [(title, _text(document[member])) for title, member in _FACTS.items() if document[member] is not None]
    return template("quote.html.j2").render(
        name=clean(name),
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        verdict=document,
        passed=sum(bool(check["ok"]) for check in checks),
        total=len(checks),
        facts=facts,
        quote=quote,
    )


def write_quote_report(path: Path, document: Mapping[str, Any], *, name: str, quote: Sequence[Sequence[str]]) -> None:
    """Write the report; the file appears whole or not at all."""
    from cloister.atomicfile import write_atomically

    write_atomically(path, render_quote_report(document, name=name, quote=quote).encode(), mode=0o644)


def _text(value: object) -> str:
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)
