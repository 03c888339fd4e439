# SPDX-License-Identifier: Apache-2.0
"""EvidenceService: what a service answers to "prove what you are", over a nonce of the caller."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.identity import Role
from cloister.protocol import NONCE_SIZE
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted

SERVICE_NAME: Final = "cloister.api.common.v1.EvidenceService"
# Everybody with an identity may ask: evidence is made to be shown.
EVIDENCE_CALLERS: Final[CallerTable] = {f"/{SERVICE_NAME}/GetEvidence": frozenset(Role)}


class EvidenceServicer(evidence_pb2_grpc.EvidenceServiceServicer):
    """Quote over the service's own keys. A quote is never addressed to anybody but the caller itself."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    async def GetEvidence(  # noqa: N802
        self, request: evidence_pb2.GetEvidenceRequest, _context: Any
    ) -> evidence_pb2.GetEvidenceResponse:
        caller = str(current_caller().spiffe_id)
        if request.audience != caller:
            # Evidence for somebody else could be passed on to them as an answer to their own question.
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="evidence is addressed to its caller only",
                why=f"audience must be {caller}",
                todo="put your own SPIFFE id into audience",
            )
        if len(request.nonce) != NONCE_SIZE:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"a nonce of {len(request.nonce)} bytes",
                why=f"a nonce has {NONCE_SIZE} bytes",
                todo="draw a random one for each call",
            )
        evidence = await asyncio.to_thread(
            self._identity.guest.evidence,
            nonce=request.nonce,
            audience=request.audience,
            trust_domain=self._identity.bundle.trust_domain,
        )
        return evidence_pb2.GetEvidenceResponse(evidence=evidence)


def mounted_evidence(identity: Identity) -> Mounted:
    """Return the service, ready to be mounted on a GrpcServer; its callers are EVIDENCE_CALLERS."""
    return Mounted(SERVICE_NAME, evidence_pb2_grpc.add_EvidenceServiceServicer_to_server, EvidenceServicer(identity))
