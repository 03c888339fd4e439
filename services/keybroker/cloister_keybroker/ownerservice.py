# SPDX-License-Identifier: Apache-2.0
"""KeyOwnerService on the wire: messages to values and back. No decision is made here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.guard import CallerTable
from cloister_keybroker import wire
from cloister_keybroker.answers import Recipient
from cloister_keybroker.datakeys import DataKeyDesk, WrappedKey
from cloister_keybroker.datasets import Publication
from cloister_keybroker.desk import Owner
from cloister_keybroker.destruction import DestructionDesk
from cloister_keybroker.owners import NewKey, OwnerDesk

# A certificate of a user gets as far as the desks; they ask whose key it is.
CALLERS: Final[CallerTable] = {
    f"/{method.containing_service.full_name}/{method.name}": frozenset({Role.USER})
    for method in pb.DESCRIPTOR.services_by_name["KeyOwnerService"].methods
}
_KEYS_PAGE: Final = 100


@dataclass(frozen=True, slots=True)
class Desks:
    """Where owners are served."""

    keys: OwnerDesk
    data_keys: DataKeyDesk
    destruction: DestructionDesk


class KeyOwnerServicer(rpc.KeyOwnerServiceServicer):
    """What owners do with their keys."""

    def __init__(self, desks: Desks) -> None:
        self._keys = desks.keys
        self._data_keys = desks.data_keys
        self._destruction = desks.destruction

    async def CreateKey(self, request: pb.CreateKeyRequest, _context: Any) -> pb.CreateKeyResponse:  # noqa: N802
        _refuse_unsigned(request.policy_yaml)
        await self._keys.create(_owner(), _new_key(request))
        return pb.CreateKeyResponse(key=await self._key(request.uri))

    async def BeginImport(self, _request: pb.BeginImportRequest, _context: Any) -> pb.BeginImportResponse:  # noqa: N802
        return pb.BeginImportResponse(
            nonce=self._keys.begin_import(_owner()),
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=self._keys.hpke_public_key,
        )

    async def ImportKey(self, request: pb.ImportKeyRequest, _context: Any) -> pb.ImportKeyResponse:  # noqa: N802
        receipt = await self._keys.import_key(_owner(), _new_key(request), sealed=request.sealed, nonce=request.nonce)
        return pb.ImportKeyResponse(key=await self._key(request.uri), receipt=wire.receipt(receipt))

    async def GetKey(self, request: pb.GetKeyRequest, _context: Any) -> pb.GetKeyResponse:  # noqa: N802
        return pb.GetKeyResponse(key=await self._key(request.uri))

    async def ListKeys(self, request: pb.ListKeysRequest, _context: Any) -> pb.ListKeysResponse:  # noqa: N802
        after = str(KeyUri.parse(request.page_token)) if request.page_token else ""
        size = wire.page(request.page_size, _KEYS_PAGE, "page_size")
        # One more than asked for says whether there is a next page.
        found = await self._keys.list(_owner(), after=after, limit=size + 1)
        token = str(found[size - 1].record.uri) if len(found) > size else ""
        keys = [wire.key(listed.record, backend=listed.backend) for listed in found[:size]]
        return pb.ListKeysResponse(keys=keys, next_page_token=token)

    async def EnableKey(self, request: pb.EnableKeyRequest, _context: Any) -> pb.EnableKeyResponse:  # noqa: N802
        await self._keys.set_state(_owner(), KeyUri.parse(request.uri), KeyState.ENABLED)
        return pb.EnableKeyResponse(key=await self._key(request.uri))

    async def DisableKey(self, request: pb.DisableKeyRequest, _context: Any) -> pb.DisableKeyResponse:  # noqa: N802
        await self._keys.set_state(_owner(), KeyUri.parse(request.uri), KeyState.DISABLED)
        return pb.DisableKeyResponse(key=await self._key(request.uri))

    async def RotateKey(self, request: pb.RotateKeyRequest, _context: Any) -> pb.RotateKeyResponse:  # noqa: N802
        await self._keys.rotate(_owner(), KeyUri.parse(request.uri))
        return pb.RotateKeyResponse(key=await self._key(request.uri))

    async def RetireVersions(  # noqa: N802
        self, request: pb.RetireVersionsRequest, _context: Any
    ) -> pb.RetireVersionsResponse:
        await self._keys.retire(_owner(), KeyUri.parse(request.uri), request.min_version)
        return pb.RetireVersionsResponse(key=await self._key(request.uri))

    async def ScheduleDestruction(  # noqa: N802
        self, request: pb.ScheduleDestructionRequest, _context: Any
    ) -> pb.ScheduleDestructionResponse:
        waiting = timedelta(seconds=request.waiting_period_s)
        await self._destruction.schedule(_owner(), KeyUri.parse(request.uri), waiting)
        return pb.ScheduleDestructionResponse(key=await self._key(request.uri))

    async def CancelDestruction(  # noqa: N802
        self, request: pb.CancelDestructionRequest, _context: Any
    ) -> pb.CancelDestructionResponse:
        await self._destruction.cancel(_owner(), KeyUri.parse(request.uri))
        return pb.CancelDestructionResponse(key=await self._key(request.uri))

    async def PutReleasePolicy(  # noqa: N802
        self, request: pb.PutReleasePolicyRequest, _context: Any
    ) -> pb.PutReleasePolicyResponse:
        _refuse_unsigned(request.policy_yaml)
        await self._keys.put_policy(_owner(), KeyUri.parse(request.uri), request.policy_envelope)
        return pb.PutReleasePolicyResponse(key=await self._key(request.uri))

    async def WithdrawReleasePolicy(  # noqa: N802
        self, request: pb.WithdrawReleasePolicyRequest, _context: Any
    ) -> pb.WithdrawReleasePolicyResponse:
        await self._keys.withdraw_policy(_owner(), KeyUri.parse(request.uri))
        return pb.WithdrawReleasePolicyResponse(key=await self._key(request.uri))

    async def GetReleasePolicy(  # noqa: N802
        self, request: pb.GetReleasePolicyRequest, _context: Any
    ) -> pb.GetReleasePolicyResponse:
        """Answer with the newest policy, also when it is withdrawn: its successor has to name its digest."""
        stored = await self._keys.get(_owner(), KeyUri.parse(request.uri))
        return pb.GetReleasePolicyResponse(
            policy_yaml=stored.policy.yaml if stored.policy else b"",
            version=stored.record.policy_version,
            digest=stored.record.policy_digest,
            policy_envelope=stored.policy.envelope if stored.policy else b"",
        )

    async def GenerateDataKey(  # noqa: N802
        self, request: pb.GenerateDataKeyRequest, _context: Any
    ) -> pb.GenerateDataKeyResponse:
        answer = await self._data_keys.generate(_owner(), KeyUri.parse(request.key_uri), _recipient(request))
        return pb.GenerateDataKeyResponse(data_key=wire.data_key(answer), receipt=wire.receipt(answer.receipt))

    async def OpenDataKey(self, request: pb.OpenDataKeyRequest, _context: Any) -> pb.OpenDataKeyResponse:  # noqa: N802
        if request.resume_sealing:
            resumed = await self._data_keys.resume(
                _owner(), _wrapped(request), _recipient(request), authorization=request.authorization
            )
            return pb.OpenDataKeyResponse(data_key=wire.data_key(resumed), receipt=wire.receipt(resumed.receipt))
        answer = await self._data_keys.open(
            _owner(),
            _wrapped(request),
            _recipient(request),
            manifest_digest=request.manifest_digest,
            authorization=request.authorization,
        )
        return pb.OpenDataKeyResponse(data_key=wire.data_key(answer), receipt=wire.receipt(answer.receipt))

    async def RewrapDataKey(  # noqa: N802
        self, request: pb.RewrapDataKeyRequest, _context: Any
    ) -> pb.RewrapDataKeyResponse:
        answer = await self._data_keys.rewrap(_owner(), _wrapped(request))
        return pb.RewrapDataKeyResponse(wrapped=answer.wrapped, key_version=answer.version)

    async def PublishManifest(  # noqa: N802
        self, request: pb.PublishManifestRequest, _context: Any
    ) -> pb.PublishManifestResponse:
        publication = Publication(request.dataset_id, request.version, request.manifest_digest)
        await self._data_keys.publish(_owner(), _wrapped(request), publication, request.parent_digest)
        return pb.PublishManifestResponse()

    async def GetPublishedManifest(  # noqa: N802
        self, request: pb.GetPublishedManifestRequest, _context: Any
    ) -> pb.GetPublishedManifestResponse:
        found = await self._data_keys.published(_owner(), KeyUri.parse(request.key_uri), request.dataset_id)
        if found is None:
            return pb.GetPublishedManifestResponse()
        return pb.GetPublishedManifestResponse(version=found.version, manifest_digest=found.manifest_digest)

    async def _key(self, uri: str) -> pb.Key:
        stored = await self._keys.get(_owner(), KeyUri.parse(uri))
        return wire.key(stored.record, backend=stored.backend)


def _owner() -> Owner:
    caller = current_caller()
    channel = f"{caller.tls_version}, {caller.key_exchange_group}"
    return Owner(caller.spiffe_id, caller.certificate_der, channel, current_request_id())


def _new_key(request: pb.CreateKeyRequest | pb.ImportKeyRequest) -> NewKey:
    purposes = frozenset(wire.purpose(purpose) for purpose in request.purposes)
    return NewKey(KeyUri.parse(request.uri), purposes, request.policy_envelope, request.provisioning)


def _wrapped(request: pb.OpenDataKeyRequest | pb.RewrapDataKeyRequest | pb.PublishManifestRequest) -> WrappedKey:
    return WrappedKey(KeyUri.parse(request.key_uri), request.key_version, request.wrapped)


def _recipient(request: pb.GenerateDataKeyRequest | pb.OpenDataKeyRequest) -> Recipient:
    return Recipient(request.client_nonce, request.hpke_kem_id, request.hpke_public_key)


def _refuse_unsigned(policy_yaml: bytes) -> None:
    if policy_yaml:
        raise CloisterError(
            Code.SIGNATURE_INVALID,
            what="a release policy is put in force with its owner's signature only",
            why="it came as plain YAML, in policy_yaml",
            todo="sign it and send the envelope in policy_envelope: cloister key create and cloister key policy do",
        )
