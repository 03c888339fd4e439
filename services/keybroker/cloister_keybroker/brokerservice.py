# SPDX-License-Identifier: Apache-2.0
"""BrokerService on the wire: what operators do with the root key and the store. It is the one that is never shut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any, Final

from cloister import hpke
from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.hpke import KEM_MLKEM768_X25519, HpkeError
from cloister.identity import Role
from cloister.protocol import share_info, unseal_info
from cloister.release.blocks import Block
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister.secret import SecretBytes
from cloister.transparency.entry import Entry
from cloister_keybroker.answers import argument_error
from cloister_keybroker.backup import backup
from cloister_keybroker.gate import BROKER_SERVICE
from cloister_keybroker.moving import Mover
from cloister_keybroker.operators import Operator, current_operator
from cloister_keybroker.sealrecord import Source
from cloister_keybroker.unsealing import NewRoot, new_root_from_passphrase, new_root_from_shares
from cloister_keybroker.vault import State, Status, Vault

_USERS: Final = frozenset({Role.USER})
CALLERS: Final[CallerTable] = {
    f"/{BROKER_SERVICE}/{method}": _USERS
    for method in (
        "GetSealStatus",
        "InitializeStore",
        "Unseal",
        "Seal",
        "Rekey",
        "Backup",
        "MigrateKeys",
        "GetBackendStatus",
    )
}
MAX_SEALED: Final = 4096  # bytes of a sealed share or passphrase: HPKE adds 1,136

_MIGRATED: Final = 100  # key versions of one call
_MAX_MIGRATED: Final = 1000  # each may take two calls of a store far away, and a call has ten minutes
_WIRE_STATES: Final = {
    State.UNINITIALIZED: pb.SEAL_STATE_UNINITIALIZED,
    State.SEALED: pb.SEAL_STATE_SEALED,
    State.UNSEALED: pb.SEAL_STATE_UNSEALED,
}


class BrokerServicer(rpc.BrokerServiceServicer):
    """For operators only; who else asks is told so and nothing more."""

    def __init__(self, vault: Vault, identity: Identity, operators: Collection[str]) -> None:
        self._vault = vault
        self._identity = identity
        self._operators = frozenset(operators)

    async def GetSealStatus(  # noqa: N802
        self, _request: pb.GetSealStatusRequest, _context: Any
    ) -> pb.GetSealStatusResponse:
        self._operator()
        return self._status()

    async def InitializeStore(  # noqa: N802
        self, request: pb.InitializeStoreRequest, _context: Any
    ) -> pb.InitializeStoreResponse:
        """Make the store; it has to be unsealed with the shares that are the answer before it is of any use."""
        self._operator()
        new = await self._new_root(request, "initialize")
        sealed = self._sealed_shares(new, request.holder_public_keys)
        await self._vault.initialize(new)
        return pb.InitializeStoreResponse(sealed_shares=sealed)

    async def Unseal(self, request: pb.UnsealRequest, _context: Any) -> pb.UnsealResponse:  # noqa: N802
        operator = self._operator()
        # What shows the present root key says so: a share that was meant to unseal lets nobody replace it.
        action = "replace" if self._vault.awaits_permission else "unseal"
        secret = self._opened(request.sealed, action) if request.sealed else SecretBytes(b"")
        await self._vault.hand_in(secret, operator)
        return pb.UnsealResponse(status=self._status())

    async def Seal(self, _request: pb.SealRequest, _context: Any) -> pb.SealResponse:  # noqa: N802
        await self._vault.seal(self._operator())
        return pb.SealResponse()

    async def Rekey(self, request: pb.RekeyRequest, _context: Any) -> pb.RekeyResponse:  # noqa: N802
        """Make another root key; it takes effect when the present one was shown and it was handed in itself.

        But for one in a file, of which nothing leaves the broker.
        """
        operator = self._operator()
        if not (request.holder_public_keys or request.sealed_passphrase):
            await self._vault.rekey_file(operator)
            return pb.RekeyResponse()
        new = await self._new_root(request, "rekey")
        sealed = self._sealed_shares(new, request.holder_public_keys)
        return pb.RekeyResponse(sealed_shares=sealed, nonce=await self._vault.begin_rekey(new))

    async def Backup(  # noqa: N802
        self, _request: pb.BackupRequest, _context: Any
    ) -> AsyncIterator[pb.BackupResponse]:
        """Stream a backup; that there was one stands in the log before it, and so in the backup itself."""
        operator, opened = self._operator(), self._vault.opened
        await self._log(operator.entry("backup"))
        chunks = backup(opened.database, opened.root_key, broker_id=self._broker_id, created_ms=_now_ms())
        async with aclosing(chunks):  # also when the caller goes away: others wait for their turn
            async for chunk in chunks:
                yield pb.BackupResponse(chunk=chunk)

    async def MigrateKeys(  # noqa: N802
        self, request: pb.MigrateKeysRequest, _context: Any
    ) -> pb.MigrateKeysResponse:
        operator, opened = self._operator(), self._vault.opened
        limit = request.limit or _MIGRATED
        if limit > _MAX_MIGRATED:
            raise argument_error("limit", f"{limit}", f"at most {_MAX_MIGRATED}")
        mover = Mover(opened.store, opened.backends, caller=str(operator.spiffe_id), clock=_now)
        done = await mover.migrate(limit=limit)
        if done.moved:
            await self._log(operator.entry("migrate", [Block("moved", True, opened.backends.name, str(done.moved))]))
        elif done.problem is not None:
            raise done.problem
        return pb.MigrateKeysResponse(migrated=done.moved, left=done.left)

    async def GetBackendStatus(  # noqa: N802
        self, _request: pb.GetBackendStatusRequest, _context: Any
    ) -> pb.GetBackendStatusResponse:
        """Look at every back end now, and say what is wrong with the first that is not well."""
        self._operator()
        opened = self._vault.opened
        problem = ""
        try:
            await opened.backends.check()
        except CloisterError as error:
            problem = str(error)
        counts = await opened.store.read(lambda transaction: transaction.versions_by_backend())
        left = await opened.store.read(lambda transaction: transaction.retired.by_backend())
        return pb.GetBackendStatusResponse(
            name=opened.backends.name,
            healthy=not problem,
            problem=problem,
            capabilities=sorted(opened.backends.capabilities),
            versions=[
                *(f"{name}: {count}" for name, count in sorted(counts.items())),
                *(f"old places at {name}: {count}" for name, count in sorted(left.items())),
            ],
        )

    async def _log(self, entry: Entry) -> None:
        await self._vault.opened.store.write(lambda transaction: transaction.append(entry, time_ms=_now_ms()))

    def _operator(self) -> Operator:
        return current_operator(self._operators)

    def _status(self) -> pb.GetSealStatusResponse:
        status: Status = self._vault.status()
        return pb.GetSealStatusResponse(
            state=_WIRE_STATES[status.state],
            source=status.source.value,
            have=status.have,
            need=status.need,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=self._identity.guest.keys.hpke.public_bytes,
            nonce=status.nonce,
        )

    def _opened(self, sealed: bytes, action: str) -> SecretBytes:
        """Open what an operator sealed to this broker, for this action and the present nonce."""
        if len(sealed) > MAX_SEALED:
            raise argument_error("sealed", f"{len(sealed)} bytes", f"at most {MAX_SEALED} bytes")
        info = unseal_info(action=action, broker_id=self._broker_id, nonce=self._vault.status().nonce)
        try:
            return self._identity.guest.keys.hpke.open(sealed, info=info)
        except HpkeError:
            raise CloisterError(
                Code.UNSEAL_REFUSED,
                what="this was not sealed for what this broker waits for now",
                why="it is for another broker, another action, or for the time before the broker was sealed last",
                todo="ask for the status and seal anew; for another root key: cloister broker unseal --rekey NAME",
            ) from None

    async def _new_root(self, request: pb.InitializeStoreRequest | pb.RekeyRequest, action: str) -> NewRoot:
        if request.sealed_passphrase:
            if request.threshold or request.holder_public_keys:
                raise argument_error("sealed_passphrase", "a passphrase and shares", "the one or the other")
            passphrase = self._opened(request.sealed_passphrase, action)
            return await asyncio.to_thread(new_root_from_passphrase, passphrase)
        if request.hpke_kem_id != KEM_MLKEM768_X25519:
            raise argument_error("hpke_kem_id", f"{request.hpke_kem_id:#x}", f"{KEM_MLKEM768_X25519:#x}")
        holders = request.holder_public_keys
        if len(set(holders)) != len(holders):
            raise argument_error("holder_public_keys", "one key twice", "a key of his own for each holder")
        return new_root_from_shares(threshold=request.threshold, count=len(holders))

    def _sealed_shares(self, new: NewRoot, holders: Sequence[bytes]) -> list[bytes]:
        if new.record.source is not Source.SHARES:
            return []
        count, threshold = len(holders), new.record.shares.threshold if new.record.shares else 0
        sealed = []
        for number, (holder, share) in enumerate(zip(holders, new.shares, strict=True), start=1):
            info = share_info(broker_id=self._broker_id, number=number, count=count, threshold=threshold)
            try:
                sealed.append(hpke.seal(holder, share, info=info))
            except HpkeError as error:
                raise argument_error("holder_public_keys", f"key {number}: {error}", "keys of this KEM") from None
        return sealed

    @property
    def _broker_id(self) -> str:
        return str(self._identity.spiffe_id)


def mounted_operations(vault: Vault, *, identity: Identity, operators: Collection[str]) -> Mounted:
    """Return BrokerService, ready for GrpcServer with CALLERS."""
    servicer = BrokerServicer(vault, identity, operators)
    return Mounted(BROKER_SERVICE, rpc.add_BrokerServiceServicer_to_server, servicer)


def _now() -> datetime:
    return datetime.now(UTC)


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)
