# SPDX-License-Identifier: Apache-2.0
"""What a holder of a recovery share does: verify the attest that waits for it, and then give it the share.

Verified on this machine: the quote, the expected code, that what it is about to recover is what it measured, and that
its configuration is the one the CA was sealed in, or one that the holder names. The share goes to the quoted key only.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.appraisal.checklist import Checklist, EvidenceRefused, short
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import EvidenceVerifier, Expected, VerifiedEvidence
from cloister.hpke import seal
from cloister.identity import Role
from cloister.protocol import NONCE_SIZE, RECOVERY_AUDIENCE, recovery_share_info
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import invoke, open_public_channel
from cloister.secret import SecretBytes
from cloister.tdx.check import Check

_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a holder gives a share to. Digests are SHA-384, 48 bytes."""

    trust_domain: str
    scripts: Collection[bytes]  # of attest's package; none means nobody gets it
    config: bytes | None = None  # in place of the one that the CA was sealed in
    generation: int = 0  # an older state is refused


@dataclass(frozen=True, slots=True)
class Waiting:
    """An attest that waits for shares, verified."""

    evidence: VerifiedEvidence
    checks: tuple[Check, ...]
    bundle: TrustBundle
    share_set: str
    threshold: int
    count: int
    given: tuple[int, ...]
    generation: int
    sealed_at: datetime


@dataclass(frozen=True, slots=True)
class Given:
    """What became of a share."""

    waiting: Waiting
    number: int
    missing: int


async def give_share(
    endpoint: str, share: SecretBytes, wanted: Wanted, *, verifier: EvidenceVerifier, now: datetime
) -> Given:
    """Verify the attest at `endpoint` and give it a share; raise CloisterError.

    EVIDENCE_UNEXPECTED names the failed check, and nothing was given; SHARE_INVALID is attest's word on the share.
    """
    async with await open_public_channel(endpoint, trust_domain=wanted.trust_domain) as channel:
        stub = attest_pb2_grpc.RecoveryServiceStub(channel)
        nonce = secrets.token_bytes(NONCE_SIZE)
        request = attest_pb2.GetRecoveryRequest(nonce=nonce)
        response = await invoke(stub.GetRecovery, request, timeout_s=_TIMEOUT_S, what="ask attest what it recovers")
        waiting = await _verify(response, nonce, wanted, verifier, now)
        info = recovery_share_info(waiting.share_set, waiting.bundle.digest)
        sealed = seal(waiting.evidence.hpke_public_key, share, info=info)
        answer: attest_pb2.GiveShareResponse = await invoke(
            stub.GiveShare,
            attest_pb2.GiveShareRequest(sealed_share=sealed),
            timeout_s=_TIMEOUT_S,
            what="give attest a recovery share",
        )
    return Given(waiting, answer.number, answer.missing)


async def _verify(
    response: attest_pb2.GetRecoveryResponse, nonce: bytes, wanted: Wanted, verifier: EvidenceVerifier, now: datetime
) -> Waiting:
    bundle = TrustBundle.parse(response.trust_bundle)
    checklist, code = Checklist(), Code.EVIDENCE_UNEXPECTED
    try:
        expected = Expected(nonce, RECOVERY_AUDIENCE, wanted.trust_domain)
        evidence = await verifier.verify(response.evidence, expected, now=now, checklist=checklist)
        checklist.require(
            "service.role", evidence.role is Role.ATTEST, code, wanted=str(Role.ATTEST), got=evidence.role
        )
        script = evidence.workload.script
        known = any(secrets.compare_digest(script, digest) for digest in wanted.scripts)
        scripts = " or ".join(short(digest) for digest in wanted.scripts) or "nothing: no digest is expected"
        checklist.require("service.script", known, code, wanted=scripts, got=short(script))
        checklist.require_equal("recovery.trust-bundle", code, wanted=bundle.digest, got=evidence.workload.trust_bundle)
        config = wanted.config or response.sealed_config
        checklist.require_equal("recovery.configuration", code, wanted=config, got=evidence.workload.config)
        checklist.require(
            "recovery.generation",
            response.generation >= wanted.generation,
            code,
            wanted=f"{wanted.generation} or later",
            got=response.generation,
        )
    except EvidenceRefused as error:
        raise CloisterError(
            code,
            what="what waits for recovery shares here is not to be trusted",
            why=str(error),
            todo="give it no share; a configuration that you want has to be named by its digest",
        ) from None
    return Waiting(
        evidence=evidence,
        checks=checklist.checks,
        bundle=bundle,
        share_set=response.share_set,
        threshold=response.threshold,
        count=response.count,
        given=tuple(response.given),
        generation=response.generation,
        sealed_at=datetime.fromtimestamp(response.sealed_unix_s, UTC),
    )
