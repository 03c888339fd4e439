# SPDX-License-Identifier: Apache-2.0
"""ApprovalService on the wire: messages to values and back. No decision is made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.identity import Role
from cloister.keyuri import KeyUri
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister_keybroker import wire
from cloister_keybroker.approvaldesk import ApprovalDesk, Messenger
from cloister_keybroker.approvals import StoredApproval

_SERVICE: Final = f"{wire.PACKAGE}.ApprovalService"
CALLERS: Final[CallerTable] = {
    path: frozenset({Role.USER}) for path in (f"/{_SERVICE}/SubmitApproval", f"/{_SERVICE}/ListApprovals")
}


class ApprovalServicer(rpc.ApprovalServiceServicer):
    """Take and list approvals."""

    def __init__(self, desk: ApprovalDesk) -> None:
        self._desk = desk

    async def SubmitApproval(  # noqa: N802
        self, request: pb.SubmitApprovalRequest, _context: Any
    ) -> pb.SubmitApprovalResponse:
        standing = await self._desk.submit(_messenger(), request.envelope)
        return pb.SubmitApprovalResponse(have=standing.have, need=standing.need)

    async def ListApprovals(self, request: pb.ListApprovalsRequest, _context: Any) -> pb.ListApprovalsResponse:  # noqa: N802
        found = await self._desk.list(_messenger(), KeyUri.parse(request.key_uri))
        return pb.ListApprovalsResponse(approvals=[_approval(approval) for approval in found])


def mounted_approvals(desk: ApprovalDesk) -> Sequence[Mounted]:
    """Return the service, ready for GrpcServer with CALLERS."""
    return (Mounted(_SERVICE, rpc.add_ApprovalServiceServicer_to_server, ApprovalServicer(desk)),)


def _messenger() -> Messenger:
    caller = current_caller()
    return Messenger(caller.spiffe_id, f"{caller.tls_version}, {caller.key_exchange_group}", current_request_id())


def _approval(approval: StoredApproval) -> pb.Approval:
    statement = approval.statement
    return pb.Approval(
        approver=approval.approver,
        job=statement.job,
        purpose=wire.wire_purpose(statement.purpose),
        policy_digest=statement.policy_digest,
        expires_unix_ms=statement.expires_ms,
        envelope=approval.envelope,
    )
