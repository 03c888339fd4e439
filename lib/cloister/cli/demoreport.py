# SPDX-License-Identifier: Apache-2.0
"""Gather what the demo's report shows: verdicts, decisions, certificates and measurements, from the services."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from cloister.cli.attest import list_verdicts
from cloister.cli.keys import list_decisions
from cloister.cli.login import UserCertificate
from cloister.cli.report import CertificateRow, RunReport
from cloister.cli.state import SERVICES
from cloister.cli.trust import evidence_rows, verify_services

if TYPE_CHECKING:
    from cloister.cli.demo import Run
    from cloister.cli.follow import JobView
    from cloister.cli.session import Session


async def make_report(run: Run, session: Session, view: JobView) -> RunReport:
    """Return the report of a finished run."""
    verified = await verify_services(session, SERVICES)
    # Those of this stack: attest remembers earlier ones too.
    since = datetime.fromtimestamp(session.stack.started_unix_s, UTC).isoformat(timespec="milliseconds")
    verdicts = [verdict for verdict in await list_verdicts(session, limit=200) if verdict["time"] >= since]
    uris = [uri for uri, _ in run.policies]
    decisions = [entry for uri in uris for entry in await list_decisions(session, limit=100, key_uri=uri)]
    certificates = [
        _row(service, x509.load_pem_x509_certificate(found.leaf_pem)) for service, found in verified.items()
    ]
    user = UserCertificate.read(session.state)
    if user is not None:
        certificates.append(_row("you", user.leaf))
    results = run.job["results"]
    headline = [(name.replace("_", " "), f"{value:.2%}") for name, value in sorted(results.items()) if "acc" in name]
    headline += [
        ("seconds in all", f"{run.elapsed_s:.1f}"),
        ("attested processes", str(len({verdict["spiffe_id"] for verdict in verdicts if verdict["accepted"]}))),
    ]
    return RunReport(
        title="Sealed data, attested training, confidential serving",
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        simulated=session.stack.simulated,
        headline=headline,
        steps=run.steps,
        facts=[
            ("job", run.job["job_id"]),
            ("rows", ", ".join(f"{name}: {count:,}" for name, count in run.rows_by_file.items())),
            ("arguments", " ".join(run.job["args"])),
            *(
                (f"rank {rank['rank']}", f"core {rank['core']}, process {rank['process_id']}")
                for rank in run.job["ranks"]
            ),
            ("model archive", run.model["archive"]),
        ],
        curve=[(float(step), loss) for step, loss in view.curve],
        accuracy=[(float(step), values["dev_accuracy"]) for step, values in view.metrics if "dev_accuracy" in values],
        evidence=evidence_rows(verified),
        verdicts=verdicts,
        decisions=sorted(decisions, key=lambda entry: int(entry["index"])),
        certificates=certificates,
        predictions=run.predictions,
        policies=run.policies,
    )


def _row(who: str, certificate: x509.Certificate) -> CertificateRow:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return CertificateRow(
        who=who,
        spiffe_id=names.get_values_for_type(x509.UniformResourceIdentifier)[0],
        serial=f"{certificate.serial_number:x}",
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        not_after=certificate.not_valid_after_utc.isoformat(timespec="seconds"),
    )
