# SPDX-License-Identifier: Apache-2.0
"""PolicyService on the wire: messages to values and back. No decision is made here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.identity import Role
from cloister.release.blocks import Block
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister_keybroker import wire
from cloister_keybroker.answers import argument_error
from cloister_keybroker.policydesk import PolicyDesk, Replayed

_SERVICE: Final = f"{wire.PACKAGE}.PolicyService"
CALLERS: Final[CallerTable] = {
    path: frozenset({Role.USER}) for path in (f"/{_SERVICE}/ExplainPolicy", f"/{_SERVICE}/ReplayPolicy")
}
_LONGEST_S: Final = 100 * 365 * 86_400  # what a date can go back


class PolicyServicer(rpc.PolicyServiceServicer):
    """Explain and replay policies."""

    def __init__(self, desk: PolicyDesk, clock: Callable[[], datetime]) -> None:
        self._desk = desk
        self._clock = clock

    async def ExplainPolicy(self, request: pb.ExplainPolicyRequest, _context: Any) -> pb.ExplainPolicyResponse:  # noqa: N802
        subject = request.WhichOneof("subject")
        if subject is None:
            raise argument_error("subject", "nothing", "an attestation result, or the index of a logged request")
        tenant = current_caller().spiffe_id.tenant
        if subject == "index":
            decision = await self._desk.explain_request(
                tenant, policy_yaml=request.policy_yaml, key_uri=request.key_uri, index=request.index
            )
        else:
            decision = await self._desk.explain_token(
                tenant,
                policy_yaml=request.policy_yaml,
                key_uri=request.key_uri,
                token=request.attestation_result,
                purpose=wire.purpose(request.purpose) if request.purpose else None,
                now=self._clock(),
            )
        return pb.ExplainPolicyResponse(granted=decision.granted, blocks=[_block(block) for block in decision.blocks])

    async def ReplayPolicy(  # noqa: N802
        self, request: pb.ReplayPolicyRequest, _context: Any
    ) -> AsyncIterator[pb.ReplayPolicyResponse]:
        since = self._clock() - timedelta(seconds=min(request.since_s, _LONGEST_S)) if request.since_s else None
        tenant = current_caller().spiffe_id.tenant
        async for replayed in self._desk.replay(
            tenant, policy_yaml=request.policy_yaml, since=since, limit=request.limit
        ):
            yield _replayed(replayed)


def mounted_policies(desk: PolicyDesk, clock: Callable[[], datetime]) -> Sequence[Mounted]:
    """Return the service, ready for GrpcServer with CALLERS."""
    return (Mounted(_SERVICE, rpc.add_PolicyServiceServicer_to_server, PolicyServicer(desk, clock)),)


def _replayed(replayed: Replayed) -> pb.ReplayPolicyResponse:
    logged, decision = replayed.logged, replayed.decision
    return pb.ReplayPolicyResponse(
        index=logged.index,
        time_unix_ms=logged.time_ms,
        caller=logged.entry.caller,
        purpose=logged.entry.purpose,
        was_granted=logged.entry.granted,
        would_be_granted=decision.granted,
        failed=[_block(block) for block in decision.blocks if not block.ok],
    )


def _block(block: Block) -> pb.Block:
    return pb.Block(name=block.name, ok=block.ok, wanted=block.wanted, got=block.got)
