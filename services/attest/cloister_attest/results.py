# SPDX-License-Identifier: Apache-2.0
"""From accepted evidence to the claims of an attestation result, and to the bundle that its verdict is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cloister import ear
from cloister.api.common.v1 import evidence_pb2
from cloister.appraisal.judge import issued_at
from cloister.appraisal.references import ReferenceSet
from cloister.errors import CloisterError
from cloister.guest.evidence import EvidenceVerifier, Expected, Trail, VerifiedEvidence
from cloister.guest.verdictbundle import (
    VERIFIER_ID,
    RecordedCheck,
    RecordedError,
    RecordedEvidence,
    RecordedExpectation,
    RecordedRoot,
    VerdictBundle,
    collateral_json,
)
from cloister.guest.verdictsignature import VerdictSigner
from cloister.identity import SpiffeId
from cloister.tdx.check import Check
from cloister.tdx.collateral import Collateral
from cloister.tlv import sha384, tlv
from cloister_attest.verdicts import Grounds

_MAX_REFUSED: Final = 128 * 1024  # bytes of refused evidence: whoever has seen one genuine chain can send any log


def td_policy_digest(verifier: EvidenceVerifier) -> bytes:
    """Return SHA-384 over the policy for TDs and all its reference sets (48 bytes)."""
    return sha384(tlv("cloister-td-policy-v1", verifier.policy.digest, references_digest(verifier)))


def references_digest(verifier: EvidenceVerifier) -> bytes:
    """Return SHA-384 over the reference sets, by name (48 bytes)."""
    sets: Sequence[ReferenceSet] = [found for _, found in sorted(verifier.references.items())]
    return sha384(tlv("cloister-references-v1", *(found.digest for found in sets)))


def tee_claims(evidence: VerifiedEvidence) -> ear.TeeClaims:
    """Return what the token says about platform and TD."""
    verdict, body = evidence.verdict, evidence.body
    return ear.TeeClaims(
        mr_td=body.mr_td,
        mr_seam=body.mr_seam,
        rtmrs=body.rtmrs,
        debug=False,  # a TD under debug was refused
        simulated=verdict.simulated,
        fmspc=verdict.pck.fmspc,
        piid=verdict.pck.platform_instance_id,
        tcb_status=str(verdict.status),
        tcb_date=_utc(verdict.tcb_date),
        advisories=verdict.advisories,
        tcb_evaluation=verdict.tcb_evaluation_number,
        collateral_issued=_utc(issued_at(verdict.collateral)),
        collateral_expires=_utc(verdict.earliest_expiry),
    )


def workload_claims(evidence: VerifiedEvidence, who: SpiffeId) -> ear.WorkloadClaims:
    """Return what the token says about the workload."""
    workload = evidence.workload
    return ear.WorkloadClaims(
        role=workload.role,
        environment=workload.environment,
        trust_bundle=workload.trust_bundle,
        script=workload.script,
        config=workload.config,
        datasets=workload.datasets,
        tenant=who.tenant,
        job=who.job,
        rank=workload.rank.rank if workload.rank else None,
        world_size=workload.rank.world_size if workload.rank else None,
        model=who.model,
        backend=who.backend,
    )


@dataclass(slots=True)
class Course:
    """How an enrolment went: which checks were about the request, the evidence, the identity."""

    expected: Expected
    began: int  # number of checks before the evidence was looked at
    ended: int  # and after
    trail: Trail

    def grounds(
        self,
        evidence: evidence_pb2.Evidence,
        verifier: EvidenceVerifier,
        checks: tuple[Check, ...],
        *,
        now: datetime,
        who: SpiffeId | None,
        signer: VerdictSigner,
    ) -> Grounds | None:
        """Return what to keep of it, signed.

        That is nothing for what is not even of a platform under the root, or what is refused and large.
        """
        size = len(evidence.quote) + len(evidence.event_log)
        if self.trail.platform is None or (who is None and size > _MAX_REFUSED):
            return None
        bundle = VerdictBundle(
            verifier=VERIFIER_ID,
            time=now.astimezone(UTC),
            root=RecordedRoot(certificate_der=verifier.root.certificate_der, simulated=verifier.root.simulated),
            expected=RecordedExpectation(
                nonce=self.expected.nonce, audience=self.expected.audience, trust_domain=self.expected.trust_domain
            ),
            evidence=RecordedEvidence.of(evidence),
            collateral=None,
            unavailable=_error(self.trail.unavailable),
            policy="",
            references=(),
            before=tuple(map(RecordedCheck.of, checks[: self.began])),
            checks=tuple(map(RecordedCheck.of, checks[self.began : self.ended])),
            after=tuple(map(RecordedCheck.of, checks[self.ended :])),
            accepted=who is not None,
            spiffe_id=str(who) if who else "",
        )
        policy = verifier.policy.source.decode()
        references = tuple(found.source.decode() for _, found in sorted(verifier.references.items()))
        signed = signer.sign(bundle, collateral=self.trail.collateral, policy=policy, references=references)
        return Grounds(signed, _json(self.trail.collateral), policy, references)


def _json(collateral: Collateral | None) -> bytes:
    return b"" if collateral is None else collateral_json(collateral)


def _error(error: CloisterError | None) -> RecordedError | None:
    if error is None:
        return None
    return RecordedError(code=error.code.name, what=error.what, why=error.why, todo=error.todo)


def _utc(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
