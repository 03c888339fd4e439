# SPDX-License-Identifier: Apache-2.0
"""gRPC in and out: who may call what, wire messages to values and back. No decision is made here."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import grpc

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.identity import Role
from cloister.keyuri import KeyUri
from cloister.release.decide import Peer
from cloister.release.keys import KeyState, Purpose
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister_keybroker.answers import DataKeyAnswer, Receipt, Recipient, argument_error
from cloister_keybroker.keys import KeyRecord
from cloister_keybroker.owners import MAX_PAGE, Owner, OwnerDesk
from cloister_keybroker.workloads import KEM_IDS, Asked, ReleaseDesk, Workload

_S = TypeVar("_S")
_PACKAGE: Final = "cloister.api.keybroker.v1"
RELEASE_SERVICE: Final = f"{_PACKAGE}.KeyReleaseService"
_USERS: Final = frozenset({Role.USER})
_WORKLOADS: Final = frozenset({Role.RANK, Role.BACKEND})

# The coordinator and the gateway are not in it: neither is trusted with data keys.
CALLERS: Final[CallerTable] = {
    f"/{_PACKAGE}.KeyOwnerService/CreateKey": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/GetKey": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/ListKeys": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/EnableKey": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/DisableKey": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/PutReleasePolicy": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/GetReleasePolicy": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/GenerateDataKey": _USERS,
    f"/{_PACKAGE}.KeyOwnerService/OpenDataKey": _USERS,
    f"/{_PACKAGE}.KeyReleaseService/BeginRelease": _WORKLOADS,
    f"/{_PACKAGE}.KeyReleaseService/Release": _WORKLOADS,
}

_PURPOSES: Final = {
    pb.PURPOSE_TRAIN: Purpose.TRAIN,
    pb.PURPOSE_SERVE: Purpose.SERVE,
    pb.PURPOSE_EVALUATE: Purpose.EVALUATE,
    pb.PURPOSE_EXPORT: Purpose.EXPORT,
}
_WIRE_PURPOSES: Final = {purpose: wire for wire, purpose in _PURPOSES.items()}
_WIRE_STATES: Final = {KeyState.ENABLED: pb.KEY_STATE_ENABLED, KeyState.DISABLED: pb.KEY_STATE_DISABLED}
_KEYS_PAGE: Final = 100


class KeyOwnerServicer(rpc.KeyOwnerServiceServicer):
    """What owners do with their keys."""

    def __init__(self, desk: OwnerDesk) -> None:
        self._desk = desk

    async def CreateKey(self, request: pb.CreateKeyRequest, _context: Any) -> pb.CreateKeyResponse:  # noqa: N802
        purposes = [_purpose(purpose) for purpose in request.purposes]
        record = await self._desk.create(_owner(), KeyUri.parse(request.uri), purposes, request.policy_yaml)
        return pb.CreateKeyResponse(key=_key(record))

    async def GetKey(self, request: pb.GetKeyRequest, _context: Any) -> pb.GetKeyResponse:  # noqa: N802
        stored = await self._desk.get(_owner(), KeyUri.parse(request.uri))
        return pb.GetKeyResponse(key=_key(stored.record))

    async def ListKeys(self, request: pb.ListKeysRequest, _context: Any) -> pb.ListKeysResponse:  # noqa: N802
        after = str(KeyUri.parse(request.page_token)) if request.page_token else ""
        size = _page(request.page_size, _KEYS_PAGE, "page_size")
        # One more than asked for says whether there is a next page.
        found = await self._desk.list(_owner(), after=after, limit=size + 1)
        token = str(found[size - 1].record.uri) if len(found) > size else ""
        return pb.ListKeysResponse(keys=[_key(listed.record) for listed in found[:size]], next_page_token=token)

    async def EnableKey(self, request: pb.EnableKeyRequest, _context: Any) -> pb.EnableKeyResponse:  # noqa: N802
        record = await self._desk.set_state(_owner(), KeyUri.parse(request.uri), KeyState.ENABLED)
        return pb.EnableKeyResponse(key=_key(record))

    async def DisableKey(self, request: pb.DisableKeyRequest, _context: Any) -> pb.DisableKeyResponse:  # noqa: N802
        record = await self._desk.set_state(_owner(), KeyUri.parse(request.uri), KeyState.DISABLED)
        return pb.DisableKeyResponse(key=_key(record))

    async def PutReleasePolicy(  # noqa: N802
        self, request: pb.PutReleasePolicyRequest, _context: Any
    ) -> pb.PutReleasePolicyResponse:
        record = await self._desk.put_policy(_owner(), KeyUri.parse(request.uri), request.policy_yaml)
        return pb.PutReleasePolicyResponse(key=_key(record))

    async def GetReleasePolicy(  # noqa: N802
        self, request: pb.GetReleasePolicyRequest, _context: Any
    ) -> pb.GetReleasePolicyResponse:
        stored = await self._desk.get(_owner(), KeyUri.parse(request.uri))
        record = stored.record
        return pb.GetReleasePolicyResponse(
            policy_yaml=stored.policy_yaml, version=record.policy_version, digest=record.policy_digest
        )

    async def GenerateDataKey(  # noqa: N802
        self, request: pb.GenerateDataKeyRequest, _context: Any
    ) -> pb.GenerateDataKeyResponse:
        recipient = Recipient(request.client_nonce, request.hpke_kem_id, request.hpke_public_key)
        answer = await self._desk.generate(_owner(), KeyUri.parse(request.key_uri), recipient)
        return pb.GenerateDataKeyResponse(data_key=_data_key(answer), receipt=_receipt(answer.receipt))

    async def OpenDataKey(self, request: pb.OpenDataKeyRequest, _context: Any) -> pb.OpenDataKeyResponse:  # noqa: N802
        recipient = Recipient(request.client_nonce, request.hpke_kem_id, request.hpke_public_key)
        uri = KeyUri.parse(request.key_uri)
        answer = await self._desk.open(_owner(), uri, request.key_version, request.wrapped, recipient)
        return pb.OpenDataKeyResponse(data_key=_data_key(answer), receipt=_receipt(answer.receipt))


class KeyReleaseServicer(rpc.KeyReleaseServiceServicer):
    """Release to workloads."""

    def __init__(self, desk: ReleaseDesk) -> None:
        self._desk = desk

    async def BeginRelease(self, request: pb.BeginReleaseRequest, _context: Any) -> pb.BeginReleaseResponse:  # noqa: N802
        begun = await self._desk.begin(
            _workload(), KeyUri.parse(request.key_uri), _purpose(request.purpose), request.attestation_result
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
                purpose=_purpose(request.purpose),
                broker_nonce=request.broker_nonce,
                recipient=Recipient(request.client_nonce, request.hpke_kem_id, request.hpke_public_key),
                wrapped=request.wrapped,
                renewal=wanted == "renew",
            ),
        )
        return pb.ReleaseResponse(
            data_key=_data_key(released.data_key),
            receipt=_receipt(released.data_key.receipt),
            policy_version=released.terms.policy_version,
            policy_digest=released.data_key.binding.policy_digest,
            lease_until_unix_ms=released.terms.lease_until_ms,
            decided_unix_ms=released.terms.decided_ms,
        )


def mounted(owners: OwnerDesk, releases: ReleaseDesk) -> Sequence[Mounted]:
    """Return the services of owners and workloads, ready for GrpcServer with CALLERS."""
    owner = _whole(KeyOwnerServicer(owners))  # type: ignore[abstract]
    release = KeyReleaseServicer(releases)
    return (
        Mounted(f"{_PACKAGE}.KeyOwnerService", rpc.add_KeyOwnerServiceServicer_to_server, owner),
        Mounted(f"{_PACKAGE}.KeyReleaseService", rpc.add_KeyReleaseServiceServicer_to_server, release),
    )


def _whole(servicer: _S) -> _S:
    """Answer UNIMPLEMENTED for what the interface has and the servicer does not define; nobody may call it anyway."""

    async def absent(_request: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not served")

    for name in (name for name in dir(servicer) if name[0].isupper()):
        method = getattr(servicer, name)
        if not (inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method)):
            setattr(servicer, name, absent)
    return servicer


def _owner() -> Owner:
    caller = current_caller()
    channel = f"{caller.tls_version}, {caller.key_exchange_group}"
    return Owner(caller.spiffe_id, caller.certificate_der, channel, current_request_id())


def _workload() -> Workload:
    caller = current_caller()
    peer = Peer(caller.spiffe_id, caller.certificate_sha256, caller.tls_version, caller.key_exchange_group)
    return Workload(peer, current_request_id())


def _purpose(wire: int) -> Purpose:
    found = _PURPOSES.get(wire)  # type: ignore[call-overload]  # an unknown number is just an int
    if not isinstance(found, Purpose):
        raise argument_error("purpose", f"{wire}", "one of: " + ", ".join(purpose.value for purpose in Purpose))
    return found


def _page(asked: int, default: int, name: str) -> int:
    if asked > MAX_PAGE:
        raise argument_error(name, f"{asked}", f"at most {MAX_PAGE}")
    return asked or default


def _key(record: KeyRecord) -> pb.Key:
    return pb.Key(
        uri=str(record.uri),
        version=record.newest,
        state=_WIRE_STATES[record.state],
        purposes=sorted(_WIRE_PURPOSES[purpose] for purpose in record.purposes),
        owner=record.owner,
        created_unix_ms=record.created_ms,
        policy_version=record.policy_version,
        policy_digest=record.policy_digest,
    )


def _data_key(answer: DataKeyAnswer) -> pb.SealedDataKey:
    return pb.SealedDataKey(
        sealed=answer.sealed,
        wrapped=answer.wrapped,
        key_uri=answer.binding.key_uri,
        key_version=answer.binding.key_version,
    )


def _receipt(receipt: Receipt) -> pb.Receipt:
    return pb.Receipt(
        signature=receipt.signature,
        log_id=receipt.log_id,
        index=receipt.place.index,
        root=receipt.place.root,
        receipt_spki_der=receipt.receipt_spki_der,
    )
