# SPDX-License-Identifier: Apache-2.0
"""Enrolment (release protocol, B), step by step; every decision is on record before it is told.

1. nonce: given out here, for this role, not expired; taken for good whatever comes of the attempt
2. evidence: authentic, addressed to us, over this nonce (cloister.guest.evidence)
3. certificate request: signed by the very TLS key of the quote
4. appraisal (appraise.py): welcome, and who
5. certificate and attestation result, bound to each other

Attest enrols itself through the same steps: there is no other way to a certificate.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import cloister
from cloister import ear
from cloister.api.attest.v1 import attest_pb2
from cloister.api.common.v1 import evidence_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import Checklist, EvidenceRefused, VerifiedEvidence, verify_evidence
from cloister.identity import Role, SpiffeId
from cloister.protocol import NONCE_SIZE, combined_nonce
from cloister.runtime.logging import get_logger
from cloister.tdx.verify import TrustRoot
from cloister.tlv import sha384
from cloister_attest.appraise import Appraisal, AppraisalPolicy, appraise
from cloister_attest.authority import Authority, Issued
from cloister_attest.nonces import Nonces
from cloister_attest.registry import Registry
from cloister_attest.requests import RequestedKey, read_request
from cloister_attest.verdicts import Verdict, Verdicts


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
        authority: Authority,
        policy: AppraisalPolicy,
        roots: Sequence[TrustRoot],
        users: Mapping[bytes, SpiffeId],
        registry: Registry,
        verdicts: Verdicts,
        terms: Terms,
        clock: Callable[[], datetime],
    ) -> None:
        """`users` maps the SHA-256 of a public key (SubjectPublicKeyInfo, DER) to its holder."""
        self._authority = authority
        self._policy = policy
        self._roots = tuple(roots)
        self._users = dict(users)
        self._registry = registry
        self._verdicts = verdicts
        self._terms = terms
        self._clock = clock
        self._nonces = Nonces(terms.nonce)
        self._self_id = SpiffeId.service(policy.trust_domain, Role.ATTEST)

    def trust_bundle(self) -> bytes:
        """Return the trust bundle of this CA epoch, canonical JSON."""
        return self._authority.bundle.to_bytes()

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
            nonce=self._nonces.give(role=request.role, now=self._clock()),
            audience=str(self._self_id),
            ca_epoch=self._authority.epoch,
            expires_in_s=int(self._terms.nonce.total_seconds()),
        )

    async def attest(self, request: attest_pb2.AttestRequest) -> attest_pb2.AttestResponse:
        """Verify, appraise, issue; raise CloisterError that names the failed check."""
        checklist, now, claimed = Checklist(), self._clock(), request.evidence.role[:32]
        evidence: VerifiedEvidence | None = None
        try:
            self._take_nonce(request, checklist, now)  # 1
            evidence = await self._verify(request, checklist, now)  # 2
            requested = read_request(request.csr_der, checklist)  # 3
            checklist.require_equal("csr.key", Code.CSR_INVALID, wanted=evidence.tls_spki_der, got=requested.spki_der)
            appraisal = await self._appraise(evidence, checklist)  # 4
        except EvidenceRefused as refusal:
            simulated = evidence is not None and evidence.quote.simulated
            await self._record(claimed, checklist, None, now=now, simulated=simulated, evidence=request.evidence)
            self._log_refusal(claimed, refusal)
            raise refusal.public("this TD does not get an identity") from None
        return await self._issue(request, evidence, requested, appraisal, checklist, now)  # 5

    async def issue_user(
        self, request: attest_pb2.IssueUserCertificateRequest
    ) -> attest_pb2.IssueUserCertificateResponse:
        """Issue a certificate to the holder of a registered key; the request's signature proves possession."""
        checklist, now = Checklist(), self._clock()
        try:
            requested = read_request(request.csr_der, checklist)
            fingerprint = hashlib.sha256(requested.spki_der).digest()
            user = self._users.get(fingerprint)
            code, wanted = Code.USER_NOT_REGISTERED, "the SHA-256 of a registered user's key"
            if user is None:
                checklist.refuse("user.registered", code, wanted=wanted, got=fingerprint.hex())
            checklist.require("user.registered", True, code, wanted=wanted, got=fingerprint.hex())
        except EvidenceRefused as refusal:
            await self._record(Role.USER, checklist, None, now=now)
            self._log_refusal(Role.USER, refusal)
            raise refusal.public("this key does not get a user's certificate") from None
        issued = self._authority.issue(user, requested.public_key, life=self._terms.user, now=now)
        await self._record(Role.USER, checklist, user, now=now)
        get_logger().info("user certificate issued", spiffe_id=str(user), not_after=issued.not_after.isoformat())
        return attest_pb2.IssueUserCertificateResponse(
            certificate_chain_pem=issued.chain_pem,
            spiffe_id=str(user),
            trust_bundle=self.trust_bundle(),
            certificate_not_after_unix_s=int(issued.not_after.timestamp()),
        )

    def _take_nonce(self, request: attest_pb2.AttestRequest, checklist: Checklist, now: datetime) -> None:
        code, wanted = Code.NONCE_UNKNOWN, "a nonce of Challenge, not used before"
        taken = self._nonces.take(request.challenge_nonce)
        if taken is None:
            checklist.refuse("nonce.outstanding", code, wanted=wanted, got="another")
        checklist.require("nonce.outstanding", True, code, wanted=wanted, got="as wanted")
        fresh = now < taken.expires_at
        checklist.require(
            "nonce.unexpired", fresh, code, wanted=f"before {taken.expires_at.isoformat()}", got=now.isoformat()
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

    async def _verify(self, request: attest_pb2.AttestRequest, checklist: Checklist, now: datetime) -> VerifiedEvidence:
        return await asyncio.to_thread(
            verify_evidence,
            request.evidence,
            nonce=combined_nonce(request.challenge_nonce, request.relying_party_nonce),
            audience=str(self._self_id),
            trust_domain=self._policy.trust_domain,
            roots=self._roots,
            now=now,
            checklist=checklist,
        )

    async def _appraise(self, evidence: VerifiedEvidence, checklist: Checklist) -> Appraisal:
        rank, place = evidence.workload.rank, evidence.workload.backend
        job = await self._registry.job(rank.job) if rank else None
        backend = await self._registry.backend(place.tenant, place.model, place.backend) if place else None
        return appraise(evidence, policy=self._policy, job=job, backend=backend, checklist=checklist)

    async def _issue(
        self,
        request: attest_pb2.AttestRequest,
        evidence: VerifiedEvidence,
        requested: RequestedKey,
        appraisal: Appraisal,
        checklist: Checklist,
        now: datetime,
    ) -> attest_pb2.AttestResponse:
        who = appraisal.spiffe_id
        issued = self._authority.issue(who, requested.public_key, life=self._terms.svid, now=now)
        result = self._result(request, evidence, appraisal, issued, now)
        token = ear.issue(result, key=self._authority.token_key, key_id=self._authority.token_key_id)
        simulated = evidence.quote.simulated
        await self._record(who.role, checklist, who, now=now, simulated=simulated, evidence=request.evidence)
        get_logger().info(
            "enrolment accepted",
            spiffe_id=str(who),
            simulated=simulated,
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
        )

    def _result(
        self,
        request: attest_pb2.AttestRequest,
        evidence: VerifiedEvidence,
        appraisal: Appraisal,
        issued: Issued,
        now: datetime,
    ) -> ear.Ear:
        who, workload, body = appraisal.spiffe_id, evidence.workload, evidence.quote.quote.body
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
            spiffe_id=str(who),
            status=appraisal.status,
            trustworthiness=appraisal.trustworthiness,
            tee=ear.TeeClaims(
                mr_td=body.mr_td,
                mr_seam=body.mr_seam,
                rtmrs=body.rtmrs,
                debug=False,  # a TD under debug was refused
                simulated=evidence.quote.simulated,
                fmspc=evidence.quote.fmspc,
                piid=evidence.quote.platform_instance_id,
            ),
            workload=ear.WorkloadClaims(
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
            ),
            policy_digest=self._policy.digest,
            verifier_id=f"cloister-attest/{cloister.__version__}",
            inputs={"quote": sha384(request.evidence.quote), "event_log": sha384(request.evidence.event_log)},
        )

    async def _record(
        self,
        role: str,
        checklist: Checklist,
        who: SpiffeId | None,
        *,
        now: datetime,
        simulated: bool = False,
        evidence: evidence_pb2.Evidence | None = None,
    ) -> None:
        await self._verdicts.add(
            Verdict(
                time=now,
                role=role,
                tenant=who.tenant if who else "",
                spiffe_id=str(who) if who else "",
                accepted=who is not None,
                simulated=simulated,
                checks=checklist.checks,
                quote_digest=sha384(evidence.quote) if evidence else b"",
                event_log_digest=sha384(evidence.event_log) if evidence else b"",
            )
        )

    def _log_refusal(self, role: str, refusal: EvidenceRefused) -> None:
        failed = refusal.checks[-1]
        get_logger().warning(
            "enrolment refused",
            role=role,
            check=failed.name,
            wanted=failed.wanted,
            got=failed.got,
            error=refusal.code.text,
        )
