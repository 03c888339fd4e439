# SPDX-License-Identifier: Apache-2.0
"""KeyReleaseService on the wire, and what owners and workloads may call. No decision is made here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.identity import Role
from cloister.keyuri import KeyUri
from cloister.release.decide import Peer
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister_keybroker import wire
from cloister_keybroker.answers import Recipient, argument_error
from cloister_keybroker.approvalservice import CALLERS as APPROVAL_CALLERS
from cloister_keybroker.ownerservice import CALLERS as OWNER_CALLERS
from cloister_keybroker.ownerservice import Desks, KeyOwnerServicer
from cloister_keybroker.policyservice import CALLERS as POLICY_CALLERS
from cloister_keybroker.wire import PACKAGE
from cloister_keybroker.workloads import KEM_IDS, Asked, ReleaseDesk, Workload

RELEASE_SERVICE: Final = f"{PACKAGE}.KeyReleaseService"
_WORKLOADS: Final = frozenset({Role.RANK, Role.BACKEND})

# The coordinator and the gateway are not in it: neither is trusted with data keys.
CALLERS: Final[CallerTable] = {
    **OWNER_CALLERS,
    **APPROVAL_CALLERS,
    **POLICY_CALLERS,
    f"/{RELEASE_SERVICE}/BeginRelease": _WORKLOADS,
    f"/{RELEASE_SERVICE}/Release": _WORKLOADS,
}


class KeyReleaseServicer(rpc.KeyReleaseServiceServicer):
    """Release to workloads."""

    def __init__(self, desk: ReleaseDesk) -> None:
        self._desk = desk

    async def BeginRelease(self, request: pb.BeginReleaseRequest, _context: Any) -> pb.BeginReleaseResponse:  # noqa: N802
        begun = await self._desk.begin(
            _workload(), KeyUri.parse(request.key_uri), wire.purpose(request.purpose), request.attestation_result
        )
        return pb.BeginReleaseResponse(
            nonce=begun.nonce,
            policy_version=begun.policy_version,
            policy_digest=begun.policy_digest,
            fresh_enough=begun.fresh_enough,
            hpke_kem_ids=KEM_IDS,
        )

    async def Release(self, request: pb.ReleaseRequest, _context: Any) -> pb.ReleaseResponse:  # noqa: N802
        wanted = request.WhichOneof("data_key")
        if wanted is None or (wanted == "wrapped") != bool(request.wrapped):
            raise argument_error("data_key", "no wrapped data key, generate or renew", "one of them")
        released = await self._desk.release(
            _workload(),
            Asked(
                token=request.attestation_result,
                key=KeyUri.parse(request.key_uri),
                key_version=request.key_version,
                purpose=wire.purpose(request.purpose),
                broker_nonce=request.broker_nonce,
                recipient=Recipient(request.client_nonce, request.hpke_kem_id, request.hpke_public_key),
                wrapped=request.wrapped,
                renewal=wanted == "renew",
            ),
        )
        return pb.ReleaseResponse(
            data_key=wire.data_key(released.data_key),
            receipt=wire.receipt(released.data_key.receipt),
            policy_version=released.terms.policy_version,
            policy_digest=released.data_key.binding.policy_digest,
            lease_until_unix_ms=released.terms.lease_until_ms,
            decided_unix_ms=released.terms.decided_ms,
        )


def mounted(desks: Desks, releases: ReleaseDesk) -> Sequence[Mounted]:
    """Return the services of owners and workloads, ready for GrpcServer with CALLERS."""
    owner, release = KeyOwnerServicer(desks), KeyReleaseServicer(releases)
    return (
        Mounted(f"{PACKAGE}.KeyOwnerService", rpc.add_KeyOwnerServiceServicer_to_server, owner),
        Mounted(RELEASE_SERVICE, rpc.add_KeyReleaseServiceServicer_to_server, release),
    )


def _workload() -> Workload:
    caller = current_caller()
    peer = Peer(caller.spiffe_id, caller.certificate_sha256, caller.tls_version, caller.key_exchange_group)
    return Workload(peer, current_request_id())
