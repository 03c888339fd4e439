# SPDX-License-Identifier: Apache-2.0
"""Run the example cases of a policy: through the very decision that releases keys. Pure.

A case begins with what the policy itself accepts: hardware that is up to date, the first allowed value of every
list, the first identity that may ask for the purpose, as many approvals as are asked for. Its changes are applied,
and the outcome has to be the expected one; for a denial, by the block that a caller would be told of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from cloister.ear import AFFIRMING, MAX_LIFETIME, WARNING, Ear, TeeClaims, WorkloadClaims
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block, Decision
from cloister.release.claims import Case, Situation
from cloister.release.decide import Counters, Peer, Request, decide
from cloister.release.keys import KEY_EXCHANGES, ROLE_PURPOSES, KeyState, Purpose
from cloister.release.policy import ReleasePolicy

_ANY: Final = bytes(48)  # where a policy does not care
_NONCE: Final = b"\x01" * 32
_NAME: Final = "example"
_CERTIFICATE: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What became of a case."""

    case: Case
    decision: Decision

    @property
    def got(self) -> Block | None:
        """The block that refused, None when everything held."""
        return self.decision.failed

    @property
    def ok(self) -> bool:
        return (self.got.name if self.got else "") == self.case.block

    def __str__(self) -> str:
        wanted = f"denied by {self.case.block}" if self.case.block else "allowed"
        if self.got is None:
            return f"{self.case.name}: wanted {wanted}; got allowed"
        got = f"denied by {self.got.name} (wanted {self.got.wanted}; got {self.got.got})"
        return f"{self.case.name}: wanted {wanted}; got {got}"


def run_cases(policy: ReleasePolicy, now: datetime) -> Iterator[CaseResult]:
    """Yield the outcome of every case of a policy."""
    return (CaseResult(case, outcome_of(policy, case, now)) for case in policy.cases)


def check_cases(policy: ReleasePolicy, now: datetime) -> None:
    """Raise CloisterError(CASE_FAILED) for a policy that does not do what its own cases say."""
    failed = [result for result in run_cases(policy, now) if not result.ok]
    if failed:
        raise CloisterError(
            Code.CASE_FAILED,
            what=f"{len(failed)} of the {len(policy.cases)} cases of {policy.name} version {policy.version} fail",
            why=str(failed[0]),
            todo="correct the policy or its case; cloister policy test shows all of them",
        )


def outcome_of(
    policy: ReleasePolicy, case: Case, now: datetime, *, accepted_by: ReleasePolicy | None = None
) -> Decision:
    """Return the decision on a case; with `accepted_by`, on a request that begins with what another policy accepts."""
    there = _situation(accepted_by or policy, case.changes, now)
    approvers = policy.approvals.of[: there.approvals] if policy.approvals else ()
    return decide(
        Request(
            key=policy.key,
            key_version=there.key_version,
            purpose=there.purpose,
            broker_nonce=_NONCE,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_key_digest=_ANY,
        ),
        _ear(there, now),
        Peer(there.caller, _CERTIFICATE, "TLSv1.3", there.key_exchange),
        policy,
        ExampleKey.of(policy, state=there.key_state, newest=there.key_version),
        Counters("", there.released, frozenset(approvers)),
        now,
    )


@dataclass(frozen=True, slots=True)
class ExampleKey:
    """A key under a policy, as far as the policy tells."""

    uri: KeyUri
    owner: str
    state: KeyState
    newest: int
    policy_version: int
    policy_digest: bytes
    min_version: int = 1
    policy_withdrawn: bool = False
    purposes: frozenset[Purpose] = frozenset(Purpose)

    @classmethod
    def of(cls, policy: ReleasePolicy, *, state: KeyState = KeyState.ENABLED, newest: int) -> ExampleKey:
        return cls(policy.key, policy.owner, state, newest, policy.version, policy.digest)


def _situation(policy: ReleasePolicy, changes: Any, now: datetime) -> Situation:
    """Return what the policy accepts, changed."""
    purpose: Purpose = changes.get("purpose", policy.purposes[0])
    workload, tee = policy.workload, policy.tee
    first = {name: values[0] for name, values in policy.measurements.items()}
    accepted = Situation(
        purpose=purpose,
        key_version=policy.min_key_version,
        caller=_caller(policy, purpose),
        mr_td=first.get("mr_td", _ANY),
        mr_seam=first.get("mr_seam", _ANY),
        rtmr0=first.get("rtmr0", _ANY),
        rtmr1=first.get("rtmr1", _ANY),
        rtmr2=first.get("rtmr2", _ANY),
        script=workload.script[0],
        environment=workload.environment[0] if workload.environment else _ANY,
        config=workload.config[0] if workload.config else _ANY,
        datasets=workload.datasets[:1] if workload.datasets else (),
        piid=tee.platforms[0] if tee.platforms else bytes(16),
        key_exchange=policy.key_exchange[0] if policy.key_exchange else KEY_EXCHANGES[0],
        approvals=policy.approvals.threshold if policy.approvals else 0,
        tcb_status=tee.tcb.statuses[0] if tee.tcb else "UpToDate",
        tcb_date=((tee.tcb and tee.tcb.min_date) or now.date()).isoformat(),
    )
    return replace(accepted, **changes)


def _caller(policy: ReleasePolicy, purpose: Purpose) -> SpiffeId:
    """Return the first identity that the policy lets in and whose role may have the purpose."""
    domain, tenant = SpiffeId.parse(policy.owner).trust_domain, policy.key.tenant
    anyone = (
        SpiffeId.of_rank(domain, tenant=tenant, job="0", rank=0),
        SpiffeId.of_backend(domain, tenant=tenant, model="0", backend="0"),
    )
    callers = tuple(glob.example() for glob in policy.identities) if policy.identities else anyone
    return next((caller for caller in callers if purpose in ROLE_PURPOSES[caller.role]), callers[0])


def _ear(there: Situation, now: datetime) -> Ear:
    """Return what attest would say."""
    current = there.tcb_status in (None, "UpToDate")
    issued = now - there.evidence_age
    return Ear(
        issuer=str(SpiffeId.service(there.caller.trust_domain, Role.ATTEST)),
        audience=f"spiffe://{there.caller.trust_domain}",
        issued_at=issued,
        expires_at=issued + MAX_LIFETIME,
        token_id=_NAME,
        nonces=(_ANY.hex(), *((_NONCE.hex(),) if there.broker_nonce else ())),
        certificate_sha256=_CERTIFICATE,
        hpke_key_digest=_ANY,
        spiffe_id=str(there.caller),
        status=there.status or (AFFIRMING if current else WARNING),
        trustworthiness={},
        tee=TeeClaims(
            mr_td=there.mr_td,
            mr_seam=there.mr_seam,
            rtmrs=(there.rtmr0, there.rtmr1, there.rtmr2, _ANY),
            debug=there.debug,
            simulated=there.simulated,
            fmspc=bytes(6),
            piid=there.piid,
            tcb_status=there.tcb_status,
            tcb_date=there.tcb_date,
            advisories=there.advisories,
            collateral_issued=None if there.collateral_age is None else (now - there.collateral_age).isoformat(),
        ),
        workload=WorkloadClaims(
            role=there.caller.role,
            environment=there.environment,
            trust_bundle=_ANY,
            script=there.script,
            config=there.config,
            datasets=there.datasets,
        ),
        policy_digest=_ANY,
        verifier_id="",
    )
