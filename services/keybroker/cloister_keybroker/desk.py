# SPDX-License-Identifier: Apache-2.0
"""What the desks of owners share: who asks, whose key it is, and the entries of the log.

Users of the same tenant may see a key; only its owner changes or uses it. A key of another tenant is not looked up at
all, so it cannot be told from one that does not exist.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final, TypeVar

from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block
from cloister.release.keys import KeyState
from cloister.runtime.logging import get_logger
from cloister.tlv import sha384
from cloister.transparency.entry import Entry
from cloister_keybroker.answers import ReceiptSigner, key_not_found
from cloister_keybroker.backends import KeyBackend, KeyRef
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import StoredKey, Transaction

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Owner:
    """The authenticated user behind a call."""

    spiffe_id: SpiffeId
    certificate_der: bytes
    channel: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Office:
    """What every desk works with."""

    store: KeyStore
    backend: KeyBackend
    signer: ReceiptSigner
    broker_id: SpiffeId
    clock: Callable[[], datetime]

    def changing(self, uri: KeyUri) -> AbstractAsyncContextManager[None]:
        """Wait for one's turn with a key: see turns.py."""
        return self.store.turns.changing(uri)

    def now_ms(self) -> int:
        """Return the time (Unix milliseconds)."""
        return int(self.clock().timestamp() * 1000)


class Desk:
    """Find keys for their owners, and say in the log what was asked."""

    def __init__(self, office: Office) -> None:
        self._office = office
        self._store = office.store
        self._backend = office.backend

    async def get(self, owner: Owner, uri: KeyUri, *, version: int = 0) -> StoredKey:
        """Return a key of the caller's tenant with one of its versions (0: the newest)."""
        stored = None
        if uri.tenant == owner.spiffe_id.tenant:
            stored = await self._store.read(lambda transaction: transaction.key(uri, version=version))
        if stored is None:
            raise key_not_found(str(uri))
        return stored

    async def _owned(self, owner: Owner, uri: KeyUri, action: str, *, version: int = 0) -> StoredKey:
        """Return a key that the caller owns; log and refuse otherwise."""
        try:
            stored = await self.get(owner, uri, version=version)
        except CloisterError as error:
            if error.code is Code.KEY_NOT_FOUND:
                await self._deny(owner, action, uri, Block("key", False, "a key of this tenant", "none"))
            raise
        if stored.record.owner != str(owner.spiffe_id):
            block = Block("key.owner", False, stored.record.owner, str(owner.spiffe_id))
            await self._deny(owner, action, uri, block)
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what=f"{uri} is not yours to use or change",
                why=f"it belongs to {stored.record.owner}",
                todo="ask its owner",
            )
        return stored

    async def _changeable(self, owner: Owner, uri: KeyUri, action: str, *states: KeyState) -> KeyRecord:
        """Return the record of an owned key that is in one of these states; log and refuse otherwise."""
        record = (await self._owned(owner, uri, action)).record
        if record.state not in states:
            wanted = " or ".join(states)
            await self._deny(owner, action, uri, Block("key.state", False, wanted, record.state.value))
            raise CloisterError(
                Code.KEY_STATE,
                what=f"{uri} cannot be changed like this now",
                why=f"its state is {record.state.value}; {action} needs {wanted}",
                todo=_STATE_ADVICE[record.state],
            )
        return record

    async def _restate(self, owner: Owner, action: str, before: KeyRecord, record: KeyRecord) -> None:
        """Bring a key, and each of its versions at the back end, into the record's state."""
        versions = [
            replace(
                version,
                handle=await self._backend.restate(KeyRef.of(before, version.number), version.handle, record.state),
            )
            for version in await self._store.read(lambda transaction: transaction.versions(before))
        ]
        await self._change(owner, action, record, *versions)

    async def _change(self, owner: Owner, action: str, record: KeyRecord, *versions: KeyVersion) -> None:
        """Make a change of a key durable, with its entry in the log."""

        def work(transaction: Transaction) -> None:
            transaction.update_key(record)
            for version in versions:
                transaction.put_version(record.uri, version)
            transaction.append(self._entry(owner, action, record), time_ms=self._office.now_ms())

        await self._store.write(work)

    async def _made(self, record: KeyRecord, handle: bytes, write: Awaitable[_T]) -> _T:
        """Write what the back end has just made into the store; when that fails it is destroyed again."""
        try:
            return await write
        except CloisterError:
            try:
                await self._backend.destroy(KeyRef.of(record, record.newest), handle)
            except CloisterError as problem:
                get_logger().warning("an unused key stays at its back end", problem=str(problem))
            raise

    def _entry(self, owner: Owner, action: str, record: KeyRecord) -> Entry:
        """Return the log entry of a change after which the record is this."""
        return Entry(
            action=action,
            tenant=owner.spiffe_id.tenant,
            key_uri=str(record.uri),
            caller=str(owner.spiffe_id),
            granted=True,
            blocks=(Block("key.owner", True, record.owner, str(owner.spiffe_id)),),
            key_version=record.newest,
            channel=owner.channel,
            policy_digest=record.policy_digest,
            evidence_digest=sha384(owner.certificate_der),
            record_digest=record.digest(),
            request_id=owner.request_id,
        )

    async def _deny(self, owner: Owner, action: str, uri: KeyUri, *blocks: Block) -> None:
        """Make a denial durable."""
        entry = Entry(
            action=action,
            tenant=owner.spiffe_id.tenant,
            key_uri=str(uri),
            caller=str(owner.spiffe_id),
            granted=False,
            blocks=blocks,
            channel=owner.channel,
            evidence_digest=sha384(owner.certificate_der),
            request_id=owner.request_id,
        )
        await self._store.write(lambda transaction: transaction.append(entry, time_ms=self._office.now_ms()))


_STATE_ADVICE: Final = {
    KeyState.ENABLED: "disable it first, if that is what you want",
    KeyState.DISABLED: "enable it: cloister key enable",
    KeyState.DESTRUCTION_SCHEDULED: "call its destruction off first: cloister key restore",
    KeyState.DESTROYED: "create another key: a destroyed one never comes back",
}
