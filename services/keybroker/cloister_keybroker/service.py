# SPDX-License-Identifier: Apache-2.0
"""gRPC in and out: who may call what, wire messages to values and back. No decision is made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.identity import Role
from cloister.keyuri import KeyUri
from cloister.release.decide import Peer
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister.transparency.entry import LoggedEntry
from cloister_keybroker import wire
from cloister_keybroker.answers import Recipient, argument_error
from cloister_keybroker.ownerservice import CALLERS as OWNER_CALLERS
from cloister_keybroker.ownerservice import Desks, KeyOwnerServicer
from cloister_keybroker.store import KeyStore
from cloister_keybroker.wire import PACKAGE
from cloister_keybroker.workloads import KEM_IDS, Asked, ReleaseDesk, Workload

_USERS: Final = frozenset({Role.USER})
_WORKLOADS: Final = frozenset({Role.RANK, Role.BACKEND})

# The coordinator and the gateway are not in it: neither is trusted with data keys.
CALLERS: Final[CallerTable] = {
    **OWNER_CALLERS,
    f"/{PACKAGE}.KeyReleaseService/BeginRelease": _WORKLOADS,
    f"/{PACKAGE}.KeyReleaseService/Release": _WORKLOADS,
    f"/{PACKAGE}.DecisionLogService/ListDecisions": _USERS,
}

_DECISIONS_PAGE: Final = 50
_MAX_ANSWER: Final = 2 * 1024 * 1024  # bytes of one listing: half of what a client receives at most


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
            raise argument_error("data_key", "neither a wrapped data key nor generate", "the one or the other")
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


class DecisionLogServicer(rpc.DecisionLogServiceServicer):
    """The log, to users of the tenant whose callers it is about."""

    def __init__(self, store: KeyStore) -> None:
        self._store = store

    async def ListDecisions(  # noqa: N802
        self, request: pb.ListDecisionsRequest, _context: Any
    ) -> pb.ListDecisionsResponse:
        """Answer with the newest entries; fewer than asked for when they would not fit into one message."""
        tenant = current_caller().spiffe_id.tenant
        uri = str(KeyUri.parse(request.key_uri)) if request.key_uri else ""
        limit = wire.page(request.limit, _DECISIONS_PAGE, "limit")
        entries = await self._store.read(lambda t: t.newest_entries(tenant, key_uri=uri, limit=limit))
        return pb.ListDecisionsResponse(decisions=_within(_MAX_ANSWER, entries))


def mounted(desks: Desks, releases: ReleaseDesk, store: KeyStore) -> Sequence[Mounted]:
    """Return the broker's services, ready for GrpcServer with CALLERS."""
    owner = KeyOwnerServicer(desks)
    decisions = wire.whole(DecisionLogServicer(store))  # type: ignore[abstract]
    release = KeyReleaseServicer(releases)
    return (
        Mounted(f"{PACKAGE}.KeyOwnerService", rpc.add_KeyOwnerServiceServicer_to_server, owner),
        Mounted(f"{PACKAGE}.KeyReleaseService", rpc.add_KeyReleaseServiceServicer_to_server, release),
        Mounted(f"{PACKAGE}.DecisionLogService", rpc.add_DecisionLogServiceServicer_to_server, decisions),
    )


def _workload() -> Workload:
    caller = current_caller()
    peer = Peer(caller.spiffe_id, caller.certificate_sha256, caller.tls_version, caller.key_exchange_group)
    return Workload(peer, current_request_id())


def _within(limit: int, entries: Iterable[LoggedEntry]) -> list[pb.Decision]:
    decisions, size = [], 0
    for logged in entries:
        decision = _decision(logged)
        size += decision.ByteSize() + 8
        if size > limit:
            break
        decisions.append(decision)
    return decisions


def _decision(logged: LoggedEntry) -> pb.Decision:
    entry = logged.entry
    return pb.Decision(
        index=logged.index,
        time_unix_ms=logged.time_ms,
        action=entry.action,
        key_uri=entry.key_uri,
        caller=entry.caller,
        granted=entry.granted,
        blocks=[pb.Block(name=b.name, ok=b.ok, wanted=b.wanted, got=b.got) for b in entry.blocks],
    )
