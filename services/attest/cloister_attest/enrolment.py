# SPDX-License-Identifier: Apache-2.0
"""Enrolment (release protocol, B), step by step; every decision is on record before it is told.

1. nonce: given out here, for this role, not expired; taken for good whatever comes of the attempt
2. evidence: authentic, addressed to us, over this nonce, of a platform and TD that the policy accepts
   (cloister.guest.evidence)
3. certificate request: signed by the very TLS key of the quote
4. appraisal (appraise.py): welcome, and who; not on the deny-list
5. certificate and attestation result, bound to each other

Attest enrols itself through the same steps: there is no other way to a certificate.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from cloister import ear
from cloister.api.attest.v1 import attest_pb2
from cloister.api.common.v1 import evidence_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import (
    Checklist,
    EvidenceRefused,
    EvidenceVerifier,
    Expected,
    Trail,
    VerifiedEvidence,
)
from cloister.guest.verdictbundle import VERIFIER_ID, collateral_digest
from cloister.guest.verdictsignature import VerdictSigner
from cloister.identity import Role, SpiffeId
from cloister.protocol import NONCE_SIZE, combined_nonce
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.logging import get_logger
from cloister.tlv import sha384
from cloister_attest.appraise import AppraisalPolicy, appraise
from cloister_attest.authority import Issued
from cloister_attest.ca import WorkloadCa
from cloister_attest.denylist import DenyList, Fact, facts_of
from cloister_attest.issued import IssuedRegister
from cloister_attest.nonces import Nonces
from cloister_attest.registry import Registry
from cloister_attest.requests import RequestedKey, read_request
from cloister_attest.results import Course, references_digest, tee_claims, workload_claims
from cloister_attest.users import User, UserRegister
from cloister_attest.verdicts import Grounds, Verdict, Verdicts


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long what is issued lives."""

    svid: timedelta
    result: timedelta
    user: timedelta
    nonce: timedelta


class Enrolment:
    """The verifier. Safe to call concurrently from one event loop."""

    def __init__(
        self,
        *,
        ca: WorkloadCa,
        policy: AppraisalPolicy,
        verifier: EvidenceVerifier,
        users: UserRegister,
        issued: IssuedRegister,
        registry: Registry,
        verdicts: Verdicts,
        denials: DenyList,
        terms: Terms,
        clock: Callable[[], datetime],
        elapsed_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """What `policy` says about trust bundles is replaced by what the CA says at the time."""
        self._ca = ca
        self._policy = policy
        self._verifier = verifier
        self._users = users
        self._issued = issued
        self._registry = registry
        self._verdicts = verdicts
        self._denials = denials
        self._terms = terms
        self._clock = clock
        self._nonces = Nonces(terms.nonce, elapsed_s)
        self._own_facts: frozenset[Fact] = frozenset()
        self._self_id = SpiffeId.service(policy.trust_domain, Role.ATTEST)

    @property
    def own_facts(self) -> frozenset[Fact]:
        """What could be denied about attest itself, once it has enrolled."""
        return self._own_facts

    def trust_bundle(self) -> bytes:
        """Return the present trust bundle, canonical JSON."""
        return self._ca.told.bundle_bytes

    async def trust_update(self, sequence: int) -> bytes:
        """Return what changed since the trust update of `sequence`, signed; empty when that is nothing."""
        return self._ca.update_after(sequence)

    def follow(self, _bundle: TrustBundle) -> None:
        """Do nothing: attest knows what it told itself."""

    async def challenge(self, request: attest_pb2.ChallengeRequest) -> attest_pb2.ChallengeResponse:
        """Give out a nonce for one enrolment in one role."""
        if request.role not in [str(role) for role in Role if role.is_workload]:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="no TD can enrol in this role",
                why=f"roles are {', '.join(role for role in Role if role.is_workload)}",
                todo="name one of these",
            )
        return attest_pb2.ChallengeResponse(
            nonce=self._nonces.give(role=request.role),
            audience=str(self._self_id),
            ca_epoch=self._ca.issuing.epoch,
            expires_in_s=int(self._terms.nonce.total_seconds()),
        )

    async def attest(self, request: attest_pb2.AttestRequest) -> attest_pb2.AttestResponse:
        """Verify, appraise, issue; raise CloisterError that names the failed check."""
        checklist, now, claimed = Checklist(), self._clock(), request.evidence.role[:32]
        course: Course | None = None
        try:
            nonce = self._take_nonce(request, checklist)  # 1
            expected = Expected(nonce, str(self._self_id), self._policy.trust_domain)
            course = Course(expected, len(checklist.checks), 0, Trail())
            evidence = await self._verify(request, course, checklist, now)  # 2
            requested = read_request(request.csr_der, checklist)  # 3
            checklist.require_equal("csr.key", Code.CSR_INVALID, wanted=evidence.tls_spki_der, got=requested.spki_der)
            who = await self._appraise(evidence, checklist)  # 4
            await self._require_not_denied(who, checklist, evidence)
            issued = self._ca.issuing.issue(who, requested.public_key, life=self._terms.svid, now=now)  # 5
            await self._remember(issued, checklist, evidence, now=now)
        except EvidenceRefused as refusal:
            await self._record(claimed, checklist, None, now=now, course=course, evidence=request.evidence)
            self._log_refusal(claimed, refusal)
            raise refusal.public("this TD does not get an identity") from None
        return await self._answer(request, evidence, issued, course, checklist, now)

    async def issue_user(
        self, request: attest_pb2.IssueUserCertificateRequest
    ) -> attest_pb2.IssueUserCertificateResponse:
        """Issue a certificate to the holder of a registered key; the request's signature proves possession."""
        checklist, now = Checklist(), self._clock()
        try:
            requested = read_request(request.csr_der, checklist)
            fingerprint = hashlib.sha256(requested.spki_der).digest()
            user = self._users.by_key(fingerprint)
            code, wanted = Code.USER_NOT_REGISTERED, "the SHA-256 of a registered user's key"
            if user is None:
                checklist.refuse("user.registered", code, wanted=wanted, got=fingerprint.hex())
            checklist.require("user.registered", True, code, wanted=wanted, got=fingerprint.hex())
            issued = await self.issue_to(user, requested, checklist=checklist, now=now)
        except EvidenceRefused as refusal:
            await self._record(Role.USER, checklist, None, now=now)
            self._log_refusal(Role.USER, refusal)
            raise refusal.public("this key does not get a user's certificate") from None
        await self._record(Role.USER, checklist, user.spiffe_id, now=now)
        return attest_pb2.IssueUserCertificateResponse(
            certificate_chain_pem=issued.chain_pem,
            spiffe_id=str(user.spiffe_id),
            trust_bundle=self.trust_bundle(),
            certificate_not_after_unix_s=int(issued.not_after.timestamp()),
        )

    async def issue_to(self, user: User, requested: RequestedKey, *, checklist: Checklist, now: datetime) -> Issued:
        """Issue a certificate to a registered user; raise EvidenceRefused when the user is denied."""
        await self._require_not_denied(user.spiffe_id, checklist)
        issued = self._ca.issuing.issue(user.spiffe_id, requested.public_key, life=self._terms.user, now=now)
        await self._remember(issued, checklist, now=now)
        who, not_after = str(user.spiffe_id), issued.not_after.isoformat()
        get_logger().info("user certificate issued", spiffe_id=who, not_after=not_after)
        return issued

    def _take_nonce(self, request: attest_pb2.AttestRequest, checklist: Checklist) -> bytes:
        """Return the nonce that the quote must be over."""
        code, wanted = Code.NONCE_UNKNOWN, "a nonce of Challenge, not used before"
        taken = self._nonces.take(request.challenge_nonce)
        if taken is None:
            checklist.refuse("nonce.outstanding", code, wanted=wanted, got="another")
        checklist.require("nonce.outstanding", True, code, wanted=wanted, got="as wanted")
        age_s, life_s = taken.age_s, self._terms.nonce.total_seconds()
        checklist.require(
            "nonce.unexpired", age_s < life_s, code, wanted=f"within {life_s:g} s", got=f"after {age_s:.1f} s"
        )
        same = taken.role == request.evidence.role
        checklist.require("nonce.role", same, code, wanted=taken.role, got=request.evidence.role[:32])
        size = len(request.relying_party_nonce)
        checklist.require(
            "nonce.relying-party",
            size in (0, NONCE_SIZE),
            Code.ARGUMENT_INVALID,
            wanted=f"none, or {NONCE_SIZE} bytes",
            got=f"{size} bytes",
        )
        return combined_nonce(request.challenge_nonce, request.relying_party_nonce)

    async def _verify(
        self, request: attest_pb2.AttestRequest, course: Course, checklist: Checklist, now: datetime
    ) -> VerifiedEvidence:
        try:
            return await self._verifier.verify(
                request.evidence, course.expected, now=now, checklist=checklist, trail=course.trail
            )
        finally:
            course.ended = len(checklist.checks)

    async def _appraise(self, evidence: VerifiedEvidence, checklist: Checklist) -> SpiffeId:
        rank, place = evidence.workload.rank, evidence.workload.backend
        job = await self._registry.job(rank.job) if rank else None
        backend = await self._registry.backend(place.tenant, place.model, place.backend) if place else None
        told = self._ca.told
        policy = replace(
            self._policy,
            bundle_digest=told.bundle_digest,
            accepted_bundles=told.accepted,
            known_bundles=told.known,
        )
        return appraise(
            evidence.workload,
            policy=policy,
            trust_bundle=evidence.trust_bundle,
            job=job,
            backend=backend,
            checklist=checklist,
        )

    async def _require_not_denied(
        self, who: SpiffeId, checklist: Checklist, evidence: VerifiedEvidence | None = None
    ) -> None:
        denial = await self._denials.first(facts_of(who, evidence))
        got = "not on it" if denial is None else f"{denial.kind} {denial.value}"
        wanted = "nothing that is on the deny-list"
        checklist.require("not-denied", denial is None, Code.DENY_LISTED, wanted=wanted, got=got)
        if who == self._self_id:
            self._own_facts = frozenset(facts_of(who, evidence))

    async def _remember(
        self, issued: Issued, checklist: Checklist, evidence: VerifiedEvidence | None = None, *, now: datetime
    ) -> None:
        """Remember a certificate before it is given out, and give out none that a denial has missed meanwhile."""
        facts = frozenset(facts_of(issued.spiffe_id, evidence))
        await self._issued.add(issued, facts, now=now)
        denial = await self._denials.first(iter(facts))
        if denial is not None:
            got = f"{denial.kind} {denial.value}"
            checklist.refuse("still-not-denied", Code.DENY_LISTED, wanted="nothing that was denied meanwhile", got=got)

    async def _answer(
        self,
        request: attest_pb2.AttestRequest,
        evidence: VerifiedEvidence,
        issued: Issued,
        course: Course,
        checklist: Checklist,
        now: datetime,
    ) -> attest_pb2.AttestResponse:
        who, authority = issued.spiffe_id, self._ca.issuing
        result = self._result(request, evidence, course, issued, now)
        token = ear.issue(result, key=authority.token_key, key_id=authority.token_key_id)
        await self._record(who.role, checklist, who, now=now, course=course, evidence=request.evidence)
        get_logger().info(
            "enrolment accepted",
            spiffe_id=str(who),
            simulated=evidence.verdict.simulated,
            tcb_status=str(evidence.verdict.status),
            result_id=result.token_id,
            not_after=issued.not_after.isoformat(),
            checks=len(checklist.checks),
        )
        return attest_pb2.AttestResponse(
            certificate_chain_pem=issued.chain_pem,
            spiffe_id=str(who),
            attestation_result=token,
            trust_bundle=self.trust_bundle(),
            certificate_not_after_unix_s=int(issued.not_after.timestamp()),
            attestation_result_expires_unix_s=int(result.expires_at.timestamp()),
            trust_update=self._ca.update_after(request.trust_sequence),
        )

    def _result(
        self,
        request: attest_pb2.AttestRequest,
        evidence: VerifiedEvidence,
        course: Course,
        issued: Issued,
        now: datetime,
    ) -> ear.Ear:
        collateral = course.trail.collateral
        issued_at = now.replace(microsecond=0)
        return ear.Ear(
            issuer=str(self._self_id),
            audience=f"spiffe://{self._policy.trust_domain}",
            issued_at=issued_at,
            expires_at=issued_at + self._terms.result,
            token_id=secrets.token_hex(16),
            nonces=tuple(nonce.hex() for nonce in (request.challenge_nonce, request.relying_party_nonce) if nonce),
            certificate_sha256=hashlib.sha256(issued.leaf_der).digest(),
            hpke_key_digest=sha384(evidence.hpke_public_key),
            spiffe_id=str(issued.spiffe_id),
            status=evidence.appraisal.status,
            trustworthiness=evidence.appraisal.trustworthiness,
            tee=tee_claims(evidence),
            workload=workload_claims(evidence, issued.spiffe_id),
            policy_digest=replace(self._policy, bundle_digest=self._ca.told.bundle_digest).digest,
            verifier_id=VERIFIER_ID,
            inputs={
                "quote": sha384(request.evidence.quote),
                "event_log": sha384(request.evidence.event_log),
                "collateral": collateral_digest(collateral) if collateral else b"",
                "policy": self._verifier.policy.digest,
                "references": references_digest(self._verifier),
            },
        )

    async def _record(
        self,
        role: str,
        checklist: Checklist,
        who: SpiffeId | None,
        *,
        now: datetime,
        course: Course | None = None,
        evidence: evidence_pb2.Evidence | None = None,
    ) -> None:
        grounds: Grounds | None = None
        if course is not None and evidence is not None:
            args = (evidence, self._verifier, checklist.checks)
            signer = self._verdict_signer()
            grounds = await asyncio.to_thread(course.grounds, *args, now=now, who=who, signer=signer)
        verdict = Verdict(
            time=now,
            role=role,
            tenant=who.tenant if who else "",
            spiffe_id=str(who) if who else "",
            accepted=who is not None,
            # Everything under a development root is, whatever became of it, and whoever was decided about.
            simulated=self._verifier.root.simulated,
            checks=checklist.checks,
            quote_digest=sha384(evidence.quote) if evidence else b"",
            event_log_digest=sha384(evidence.event_log) if evidence else b"",
        )
        await self._verdicts.add(verdict, grounds)

    def _verdict_signer(self) -> VerdictSigner:
        authority = self._ca.issuing
        return VerdictSigner(authority.token_key, authority.token_key_id, str(self._self_id))

    def _log_refusal(self, role: str, refusal: EvidenceRefused) -> None:
        failed = refusal.failed
        get_logger().warning(
            "enrolment refused",
            role=role,
            check=failed.name,
            wanted=failed.wanted,
            got=failed.got,
            error=refusal.code.text,
        )
