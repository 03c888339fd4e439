# SPDX-License-Identifier: Apache-2.0
"""The owner's own look at the services: evidence verified on this machine, before anything is entrusted to them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cloister.cli.report import ServiceEvidence
from cloister.cli.stackconfig import PACKAGES
from cloister.errors import CloisterError, Code
from cloister.identity import Role

if TYPE_CHECKING:
    from cloister.cli.session import Session
    from cloister.guest.owner import VerifiedService
    from cloister.guest.ownerkeys import OwnerKeyClient

_TRUSTED: Final = ("attest", "keybroker")  # attest names the workloads, the keybroker holds the keys


async def verify_services(session: Session, services: Sequence[str] = _TRUSTED) -> dict[str, VerifiedService]:
    """Verify services against this installation's own code, each once a session; return all that were verified.

    Raises CloisterError(EVIDENCE_UNEXPECTED) that names the first check that failed.
    """
    missing = [service for service in services if service not in session.verified]
    if not missing:
        return session.verified
    from cloister.collateral.offline import OfflineCollateral
    from cloister.guest.enrol import SERVICES_LOOK_S
    from cloister.guest.evidence import EvidenceVerifier
    from cloister.guest.measure import digest_of_package
    from cloister.guest.owner import verify_service_evidence
    from cloister.tdx.trustroot import TrustRoot

    root = TrustRoot.from_pem(_read_root(Path(session.stack.root_certificate)), simulated=session.stack.simulated)
    verifier = EvidenceVerifier(root, OfflineCollateral(Path(session.stack.collateral), root=root))
    found = await asyncio.gather(
        *(
            verify_service_evidence(
                session.stack.endpoint(service),
                role=Role(service),
                credentials=session.credentials,
                verifier=verifier,
                expected_scripts=[digest_of_package(PACKAGES[service])],
                now=datetime.now(UTC),
                patience_s=SERVICES_LOOK_S + 5.0,
            )
            for service in missing
        )
    )
    session.verified |= dict(zip(missing, found, strict=True))
    return session.verified


async def owner_keys(session: Session) -> OwnerKeyClient:
    """Return a client for the owner's keys that speaks to the verified broker and to no other.

    Its log must go on from what was seen of it before: a store that was put back may hold revoked policies.
    """
    from cloister.cli.auditlog import look_at_log
    from cloister.cli.signer import signing_key
    from cloister.guest.ownerkeys import OwnerKeyClient

    verified = (await verify_services(session))["keybroker"]
    await look_at_log(session)
    return OwnerKeyClient(
        session.credentials,
        session.stack.endpoint("keybroker"),
        signing_key=signing_key(session.state),
        verified=verified,
        keep=session.receipts.append,
    )


def evidence_rows(verified: dict[str, VerifiedService]) -> Sequence[ServiceEvidence]:
    """Return what was verified, for the report."""
    rows = []
    for service, found in verified.items():
        body = found.evidence.body
        workload = found.evidence.workload
        measurements = [("MRTD", body.mr_td), ("MRSEAM", body.mr_seam)]
        measurements += [(f"RTMR{number}", register) for number, register in enumerate(body.rtmrs)]
        measurements += [("environment", workload.environment), ("code", workload.script), ("config", workload.config)]
        rows.append(
            ServiceEvidence(
                service=service,
                checks=[{"name": c.name, "ok": c.ok, "wanted": c.wanted, "got": c.got} for c in found.checks],
                measurements=[(name, value.hex()) for name, value in measurements],
            )
        )
    return rows


def _read_root(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"the platform's root certificate {path} cannot be read",
            why=error.strerror or str(error),
            todo="cloister dev up makes it; without it no evidence can be verified",
        ) from error
