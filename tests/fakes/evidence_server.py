# SPDX-License-Identifier: Apache-2.0
"""A small server for transport tests: EvidenceService with a behaviour per audience, and everything around it real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from cloister.api.common.v1 import evidence_pb2 as pb
from cloister.api.common.v1 import evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import CredentialSource
from cloister.runtime.server import GrpcServer, Mounted

SERVICE = "cloister.api.common.v1.EvidenceService"
METHOD = f"/{SERVICE}/GetEvidence"


class EvidenceFake(evidence_pb2_grpc.EvidenceServiceServicer):
    """Answers with who called; `audience` picks what else happens."""

    def __init__(self, next_hop: evidence_pb2_grpc.EvidenceServiceStub | None = None) -> None:
        self.entered = asyncio.Event()
        self.leave = asyncio.Event()
        self.request_ids: list[str] = []
        self._next_hop = next_hop

    async def GetEvidence(self, request: pb.GetEvidenceRequest, context: Any) -> pb.GetEvidenceResponse:
        self.request_ids.append(current_request_id())
        match request.audience:
            case "wait":
                self.entered.set()
                await self.leave.wait()
            case "rich":
                raise CloisterError(Code.KEY_DISABLED, what="the key is disabled", why="its owner said so", todo="ask")
            case "long":
                raise CloisterError(Code.KEY_DISABLED, what="评" * 9000, why="评" * 9000, todo="评" * 9000)
            case "crash":
                raise ValueError("the root key is 0123456789abcdef")
            case "abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "gone")
            case "forward" if self._next_hop is not None:
                return await invoke(  # type: ignore[no-any-return]
                    self._next_hop.GetEvidence, pb.GetEvidenceRequest(), timeout_s=5, what="forward"
                )
        caller = current_caller()
        evidence = pb.Evidence(
            role=str(caller.spiffe_id), trust_domain=caller.tls_version, audience=caller.key_exchange_group
        )
        evidence.quote = bytes(len(request.nonce)) if request.audience == "echo-size" else b""
        return pb.GetEvidenceResponse(evidence=evidence)


def mounted(servicer: EvidenceFake) -> Mounted:
    return Mounted(SERVICE, evidence_pb2_grpc.add_EvidenceServiceServicer_to_server, servicer)


@asynccontextmanager
async def evidence_server(
    credentials: CredentialSource, servicer: EvidenceFake | None = None, **options: Any
) -> AsyncIterator[GrpcServer]:
    """Run a keybroker-like server that admits users to GetEvidence."""
    options.setdefault("callers", {METHOD: frozenset({Role.USER})})
    options.setdefault("section", "127.0.0.1:0")
    server = GrpcServer(credentials=credentials, services=[mounted(servicer or EvidenceFake())], **options)
    await server.start()
    try:
        yield server
    finally:
        await server.drain(0.2)


@asynccontextmanager
async def evidence_stub(
    endpoint: str, credentials: CredentialSource, role: Role = Role.KEYBROKER, **options: Any
) -> AsyncIterator[Any]:
    """Open a channel and give the stub."""
    async with open_channel(endpoint, role=role, credentials=credentials, **options) as channel:
        yield evidence_pb2_grpc.EvidenceServiceStub(channel)


async def ask(stub: Any, audience: str = "", *, timeout_s: float = 5.0, nonce: bytes = b"") -> Any:
    """Call GetEvidence; raise CloisterError."""
    request = pb.GetEvidenceRequest(audience=audience, nonce=nonce)
    response = await invoke(stub.GetEvidence, request, timeout_s=timeout_s, what="get evidence")
    return response.evidence
