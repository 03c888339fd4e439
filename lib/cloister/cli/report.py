# SPDX-License-Identifier: Apache-2.0
"""The report of a run: one HTML file without scripts or outside references, readable in light and dark.

Everything in it that came from a service goes through autoescape; the charts are the only markup made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister.cli.chart import line_chart
from cloister.cli.output import clean


@dataclass(frozen=True, slots=True)
class CertificateRow:
    """A certificate that took part."""

    who: str
    spiffe_id: str
    serial: str  # hex
    sha256: str  # hex, of the DER form
    not_after: str


@dataclass(frozen=True, slots=True)
class ServiceEvidence:
    """What the owner's own verification of a service found."""

    service: str
    checks: Sequence[Mapping[str, Any]]  # name, ok, wanted, got
    measurements: Sequence[tuple[str, str]]  # register, hex


@dataclass(frozen=True, slots=True)
class RunReport:
    """Everything the report shows."""

    title: str
    made: str  # ISO 8601
    simulated: bool
    headline: Sequence[tuple[str, str]]  # figure, value
    steps: Sequence[tuple[str, float]]  # what, seconds
    facts: Sequence[tuple[str, str]]
    curve: Sequence[tuple[float, float]]  # step, loss
    accuracy: Sequence[tuple[float, float]]  # step, dev accuracy
    evidence: Sequence[ServiceEvidence]
    verdicts: Sequence[Mapping[str, Any]]
    decisions: Sequence[Mapping[str, Any]]
    certificates: Sequence[CertificateRow]
    predictions: Sequence[Mapping[str, Any]] = field(default_factory=tuple)  # text, label, probability, over
    policies: Sequence[tuple[str, str]] = field(default_factory=tuple)  # key URI, YAML


def render_report(report: RunReport) -> str:
    """Return the report as one HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("cloister.cli"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["clean"] = lambda value: clean(str(value))
    loss = line_chart(
        report.curve, title="Training loss", x_label="step", y_format=lambda y: f"{y:.2f}", y_from_zero=True
    )
    accuracy = line_chart(
        report.accuracy, title="Accuracy on dev", x_label="step", y_format=lambda y: f"{y:.0%}", markers=True
    )
    return environment.get_template("report.html.j2").render(
        report=report,
        loss_chart=Markup(loss),  # noqa: S704 (made of numbers and escaped titles in chart.py)
        accuracy_chart=Markup(accuracy),  # noqa: S704
        longest_s=max((seconds for _, seconds in report.steps), default=1.0) or 1.0,
    )


def write_report(report: RunReport, path: Path) -> None:
    """Write the report; the file appears whole or not at all."""
    from cloister.atomicfile import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_report(report).encode(), mode=0o644)
