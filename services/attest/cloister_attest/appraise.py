# SPDX-License-Identifier: Apache-2.0
"""Is this acceptable workload welcome, and who is it? Pure: workload, policy and registry entries in, identity out.

What its platform and its TD must be was judged before, with the evidence (cloister.appraisal).
1. it trusts this CA and no other: the trust bundle it holds trusts nobody but epochs that are trusted now, and the one
   it began with (measured) was ours, too
2. a service:  its code is in the configured list
   a rank:     its job is registered and open, of this tenant and size, with this script and configuration
   a backend:  it is registered and open, with this handler and archive
3. the identity follows from role and registry; nothing the workload says about itself beyond its measurements counts

Whether it may have a key is not decided here: that is the key's release policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cloister.appraisal.checklist import Checklist, short
from cloister.errors import Code
from cloister.identity import Role, SpiffeId
from cloister.tdx.workload import BackendClaim, RankClaim, Workload
from cloister.tlv import sha384, tlv
from cloister_attest.workloads import Backend, Job


@dataclass(frozen=True, slots=True)
class AppraisalPolicy:
    """What the configuration and this CA epoch demand."""

    trust_domain: str
    bundle_digest: bytes  # of the present bundle, 48 bytes
    services: Mapping[Role, frozenset[bytes]]  # SHA-384 digests of packages
    td_policy: bytes  # digest of the policy for platforms and TDs, and of its reference sets, 48 bytes
    accepted_bundles: frozenset[bytes] = frozenset()  # beside the present one: what a TD may hold
    known_bundles: frozenset[bytes] = frozenset()  # what a TD may have begun with; by itself not enough

    @property
    def digest(self) -> bytes:
        """SHA-384 over all of it (48 bytes): which policy a verdict was made under."""
        rows = [
            tlv("service", role, *sorted(digests))
            for role, digests in sorted(self.services.items(), key=lambda item: str(item[0]))
        ]
        return sha384(tlv("cloister-appraisal-v2", self.trust_domain, self.bundle_digest, self.td_policy, *rows))


def appraise(
    workload: Workload,
    *,
    policy: AppraisalPolicy,
    trust_bundle: bytes,
    job: Job | None,
    backend: Backend | None,
    checklist: Checklist,
) -> SpiffeId:
    """Return who this is; raise EvidenceRefused when it is not welcome.

    `trust_bundle` is the digest of the bundle that it holds now (`VerifiedEvidence.trust_bundle`). `job` and `backend`
    are the registry's entries for the names in the workload's claims, or None.
    """
    _bundles(workload.trust_bundle, trust_bundle, policy, checklist)
    domain = policy.trust_domain
    match workload:
        case Workload(role=Role.RANK, rank=RankClaim() as claim):
            _rank(workload, claim, job, checklist)
            return SpiffeId.of_rank(domain, tenant=claim.tenant, job=claim.job, rank=claim.rank)
        case Workload(role=Role.BACKEND, backend=BackendClaim() as place):
            _backend(workload, place, backend, checklist)
            return SpiffeId.of_backend(domain, tenant=place.tenant, model=place.model, backend=place.backend)
        case _:
            _service(workload, policy.services.get(workload.role, frozenset()), checklist)
            return SpiffeId.service(domain, workload.role)


def _bundles(measured: bytes, held: bytes, policy: AppraisalPolicy, checklist: Checklist) -> None:
    accepted = policy.accepted_bundles | {policy.bundle_digest}
    # Of ours, and of the past: whoever holds it can learn of the present one, so it is told apart.
    code = Code.BUNDLE_STALE if held in policy.known_bundles else Code.APPRAISAL_FAILED
    wanted = short(policy.bundle_digest)
    checklist.require("workload.trust-bundle", held in accepted, code, wanted=wanted, got=short(held))
    if held != measured:
        ours = measured in accepted | policy.known_bundles
        code, wanted = Code.APPRAISAL_FAILED, "a bundle of this CA"
        checklist.require("workload.measured-bundle", ours, code, wanted=wanted, got=short(measured))


def _service(workload: Workload, known: frozenset[bytes], checklist: Checklist) -> None:
    code = Code.WORKLOAD_NOT_REGISTERED
    wanted = " or ".join(sorted(short(digest) for digest in known)) or f"no code may become {workload.role}"
    checklist.require(
        "service.script",
        workload.role.is_service and workload.script in known,
        code,
        wanted=wanted,
        got=short(workload.script),
    )


def _rank(workload: Workload, claim: RankClaim, job: Job | None, checklist: Checklist) -> None:
    code = Code.WORKLOAD_NOT_REGISTERED
    registered = job if job is not None and (job.job_id, job.tenant) == (claim.job, claim.tenant) else None
    if registered is None:
        checklist.refuse("job.registered", code, wanted=f"a job {claim.job} of {claim.tenant}", got="none registered")
    checklist.require("job.registered", True, code, wanted=f"a job {claim.job} of {claim.tenant}", got="registered")
    checklist.require("job.open", registered.open, code, wanted="open", got="open" if registered.open else "closed")
    fits = claim.world_size == registered.world_size
    checklist.require("job.world-size", fits, code, wanted=registered.world_size, got=claim.world_size)
    fits = 0 <= claim.rank < registered.world_size
    checklist.require("job.rank", fits, code, wanted=f"0 to {registered.world_size - 1}", got=claim.rank)
    checklist.require_equal("job.script", code, wanted=registered.script, got=workload.script)
    checklist.require_equal("job.config", code, wanted=registered.config, got=workload.config)


def _backend(workload: Workload, claim: BackendClaim, backend: Backend | None, checklist: Checklist) -> None:
    code = Code.WORKLOAD_NOT_REGISTERED
    names = (claim.tenant, claim.model, claim.backend)
    found = backend if backend is not None and (backend.tenant, backend.model, backend.backend) == names else None
    wanted = f"a backend {claim.backend} of {claim.tenant}'s model {claim.model}"
    if found is None:
        checklist.refuse("backend.registered", code, wanted=wanted, got="none registered")
    checklist.require("backend.registered", True, code, wanted=wanted, got="registered")
    checklist.require("backend.open", found.open, code, wanted="open", got="open" if found.open else "closed")
    checklist.require_equal("backend.script", code, wanted=found.script, got=workload.script)
    checklist.require_equal("backend.config", code, wanted=found.config, got=workload.config)
