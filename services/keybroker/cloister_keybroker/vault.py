# SPDX-License-Identifier: Apache-2.0
"""The store with or without its root key: what opens the gate, and what shuts it.

A store is made, sealed. Shares, a passphrase or a file give its root key; then it is verified, and what needs it is
assembled behind the gate. A root key that is to replace another is made first, and takes effect when the present one
was shown and the next one handed back: no operator alone replaces it by his own, and shares that nobody can read never
become the only way in.
"""

from __future__ import annotations

import asyncio
import enum
import hmac
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

from cloister.errors import CloisterError, Code
from cloister.protocol import NONCE_SIZE
from cloister.release.blocks import Block
from cloister.runtime.database import Database
from cloister.runtime.logging import get_logger
from cloister.runtime.server import Mounted
from cloister.secret import SecretBytes
from cloister.transparency.entry import Entry
from cloister_keybroker import mark, rekey
from cloister_keybroker.backends.factory import Backends
from cloister_keybroker.config import RootKeyPlace
from cloister_keybroker.gate import Gate
from cloister_keybroker.operators import Operator
from cloister_keybroker.restore import judged, settled
from cloister_keybroker.rootkey import RootKey, adopt_root_key, read_root_key, stage_root_key, staged_root_key
from cloister_keybroker.sealrecord import SealRecord, Source
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import Transaction
from cloister_keybroker.unsealing import NewRoot, Replacement, Unsealing

OnChange: TypeAlias = Callable[[bool], Awaitable[None]]
OpenBackends: TypeAlias = Callable[[RootKey], AbstractAsyncContextManager[Backends]]
Assemble: TypeAlias = Callable[[KeyStore, Backends], AbstractAsyncContextManager[Sequence[Mounted]]]

_WAITING: Final = "the broker is sealed: its root key was not given to it since it started"
_NO_STORE: Final = "the broker has no store yet"
_REKEYING: Final = "its root key is being replaced, which takes a moment"


class State(enum.Enum):
    """What a vault can be."""

    UNINITIALIZED = enum.auto()
    SEALED = enum.auto()
    UNSEALED = enum.auto()


@dataclass(frozen=True, slots=True)
class Status:
    """What operators see. `have` and `need` are of what is handed in now: to unseal, or to replace the root key."""

    state: State
    source: Source
    have: int
    need: int
    nonce: bytes  # 32 bytes, for what is handed in


@dataclass(frozen=True, slots=True)
class Opened:
    """What there is while the root key is known."""

    store: KeyStore
    root_key: RootKey
    database: Database
    backends: Backends


class Vault:
    """The store of one broker. Belongs to one event loop."""

    def __init__(
        self, path: Path, place: RootKeyPlace, open_backends: OpenBackends, *, clock_s: Callable[[], float]
    ) -> None:
        """Use `open`."""
        self.path = path
        self._place = place
        self._open_backends = open_backends
        self._clock_s = clock_s
        self._lock = asyncio.Lock()  # operators act one after the other
        self._database: Database | None = None
        self._unsealing: Unsealing | None = None  # set with the database
        self._opened: Opened | None = None
        self._next: Replacement | None = None  # what waits to replace the root key
        self._nonce = secrets.token_bytes(NONCE_SIZE)
        self._gate = Gate()
        self._assemble: Assemble | None = None
        self._backends = AsyncExitStack()
        self._behind = AsyncExitStack()
        self._on_change: OnChange | None = None

    @classmethod
    async def open(
        cls,
        path: Path,
        place: RootKeyPlace,
        open_backends: OpenBackends,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> Vault:
        """Open the store; with a root key file unseal and verify it. No store is ever made here.

        Raises CloisterError: no store, another root key, a damaged store, a configuration that is not the store's.
        """
        vault = cls(path, place, open_backends, clock_s=clock_s)
        try:
            if place.source is Source.FILE:
                read_root_key(place.file)  # what is wrong with it is said before anything about the store
                await vault._open_file()
                await vault._unseal(vault._root_key_of_file())
            elif path.exists():
                await vault._open_file()
        except BaseException:
            await vault.aclose()
            raise
        return vault

    def status(self) -> Status:
        """Say where the vault stands."""
        state = State.UNSEALED if self._opened else State.SEALED if self._database else State.UNINITIALIZED
        unsealing = self._next.waits_for if self._next else None if self._opened else self._unsealing
        if unsealing is not None and (self._next or unsealing.record.source is not Source.FILE):
            return Status(state, unsealing.record.source, unsealing.have, unsealing.need, self._nonce)
        source = self._unsealing.record.source if self._unsealing else self._place.source
        return Status(state, source, 0, 0, self._nonce)

    @property
    def awaits_permission(self) -> bool:
        """Whether the present root key has to be shown next, before another may replace it."""
        return self._next is not None and not self._next.allowed

    @property
    def opened(self) -> Opened:
        """What there is while the root key is known; raises CloisterError(BROKER_SEALED)."""
        if self._opened is None:
            raise CloisterError(
                Code.BROKER_SEALED,
                what="the key broker is sealed",
                why=_WAITING if self._database else _NO_STORE,
                todo="unseal it first: cloister broker unseal",
            )
        return self._opened

    async def attach(self, gate: Gate, assemble: Assemble, on_change: OnChange) -> None:
        """Let this gate open as soon as the store is unsealed; now, if it is.

        `on_change` is awaited with whether the broker is unsealed, whenever that changes.
        """
        self._gate, self._assemble, self._on_change = gate, assemble, on_change
        if self._opened is not None:
            await self._open_gate(self._opened)
        else:
            await gate.shut(_WAITING if self._database else _NO_STORE)

    async def aclose(self) -> None:
        """Shut the gate for good, end what is behind it and close the file; a second call does nothing."""
        await self._gate.shut("the broker is stopping")
        await self._behind.aclose()
        await self._backends.aclose()
        if self._database is not None:
            self._database.close()

    async def initialize(self, new: NewRoot) -> None:
        """Make the store under a new root key; it stays sealed until the key was handed in.

        Until then nothing can be in it, so it may be made again, with other shares.
        """
        async with self._lock:
            if self._place.source is not new.record.source:
                raise _other_source(new.record, self._place)
            if self._database is not None:
                if self._opened is not None or not await self._database.read(rekey.is_unused):
                    raise _state("there is a store already", "another would lose its keys", "unseal it")
                self._database.close()
                self._database, self._unsealing = None, None
                self.path.unlink()
            (await KeyStore.create(self.path, new.root_key, new.record)).close()
            await self._open_file()
            self._renew_nonce()
            await self._gate.shut(_WAITING)
            get_logger().info("store made", source=new.record.source.value)

    async def hand_in(self, secret: SecretBytes, operator: Operator) -> None:
        """Take a share or a passphrase; unseal, or let the next root key take effect, when that is enough.

        Of a root key file nothing is handed in: an empty secret reads the file again.
        """
        async with self._lock:
            if (following := self._next) is not None:
                if await asyncio.to_thread(following.hand_in, secret, str(operator.spiffe_id)):
                    self._next = None
                    shown = tuple(Block("present_share", True, str(number), giver) for number, giver in following.given)
                    blocks = shown + _handed_in(following.present) + _handed_in(following.following)
                    await self._replace_root(following.new, operator.entry("rekey", blocks))
                return
            if self._opened is not None:
                raise _state("the broker is unsealed", "nothing is waited for", "nothing has to be done")
            if self._unsealing is None:
                raise _state(_NO_STORE, "there is nothing to unseal", "make one: cloister broker init")
            root_key = await self._root_key(self._unsealing, secret, operator)
            if root_key is not None:
                await self._unseal_now(root_key, operator, self._unsealing)
                get_logger().info("unsealed", operator=str(operator.spiffe_id))

    async def seal(self, operator: Operator) -> None:
        """Shut the gate and forget the root key; nothing happens when it is not known."""
        async with self._lock:
            if self._opened is None:
                return
            try:
                await self._opened.store.write(partial(_append, operator.entry("seal")))
            except CloisterError as error:  # an emergency stop works on a full disk, too
                get_logger().error("sealing could not be logged", operator=str(operator.spiffe_id), problem=str(error))
            await self._shut_gate("an operator sealed it")
            await self._forget()
            if self._next is not None:
                self._next.present.clear()
            self._next = None
            self._renew_nonce()
            get_logger().info("sealed", operator=str(operator.spiffe_id))

    async def begin_rekey(self, new: NewRoot) -> bytes:
        """Have another root key wait for the present one, and then for itself; of two the last counts.

        Returns the nonce of this replacement: who shows the present root key says for which one.
        """
        async with self._lock:
            _ = self.opened
            if self._unsealing is None:
                raise RuntimeError("an opened store has a record")
            self._unsealing.clear()
            following = Unsealing(new.record, new.root_key.canary(), self._clock_s)
            self._next = Replacement(new, self._unsealing, following)
            self._renew_nonce()
            return self._nonce

    async def rekey_file(self, operator: Operator) -> None:
        """Replace the root key by one in the configured file."""
        if self._place.source is not Source.FILE:
            raise _other_source(SealRecord(), self._place)
        async with self._lock:
            _ = self.opened
            self._next = None
            # The next root key is on the disk before the store is under it, and takes the file's name afterwards.
            new = NewRoot(stage_root_key(self._place.file), SealRecord())
            await self._replace_root(new, operator.entry("rekey"))
            adopt_root_key(self._place.file)

    async def _root_key(self, unsealing: Unsealing, secret: SecretBytes, operator: Operator) -> RootKey | None:
        if unsealing.record.source is not Source.FILE:
            return await asyncio.to_thread(unsealing.hand_in, secret, str(operator.spiffe_id))
        if len(secret):
            raise _state("nothing is handed in here", "the root key is in a file", "send nothing: it is read again")
        return self._root_key_of_file()

    async def _unseal_now(self, root_key: RootKey, operator: Operator, unsealing: Unsealing) -> None:
        try:
            await self._unseal(root_key, operator.entry("unseal", _handed_in(unsealing)))
            unsealing.refused.clear()
            await self._open_gate(self.opened)
        except BaseException:
            await self._forget()
            raise
        finally:
            unsealing.clear()
            self._renew_nonce()

    def _root_key_of_file(self) -> RootKey:
        """Read the file; a replacement that was interrupted behind the store's own change is finished."""
        path = self._place.file
        found, staged = read_root_key(path), staged_root_key(path)
        canary = self._unsealing.canary if self._unsealing else b""
        if staged is not None and hmac.compare_digest(staged.canary(), canary):
            adopt_root_key(path)
            return staged
        return found  # if it is another one, the store says so

    async def _open_file(self) -> None:
        self._database = KeyStore.open_file(self.path)
        found = await self._database.read(mark.read)
        if found.record.source is not self._place.source:
            raise _other_source(found.record, self._place)
        self._unsealing = Unsealing(found.record, found.canary, self._clock_s)

    async def _unseal(self, root_key: RootKey, entry: Entry | None = None) -> None:
        """Verify the store under its root key and open its back ends; the first thing that is done goes to the log."""
        if self._database is None:
            raise RuntimeError("there is no store")
        store = await KeyStore.unsealed(self._database, root_key)
        restored = await judged(self.path, root_key)
        backends = await self._backends.enter_async_context(self._open_backends(root_key))
        for first in filter(None, (restored, entry)):
            await store.write(partial(_append, first))
        settled(self.path)
        self._opened = Opened(store, root_key, self._database, backends)

    async def _forget(self) -> None:
        if self._opened is not None:
            self._opened.store.retire()
        self._opened = None
        await self._backends.aclose()

    async def _replace_root(self, new: NewRoot, entry: Entry) -> None:
        """Make every handle and MAC again under the new root key, in one transaction; old ones open nothing."""
        old = self.opened
        if self._database is None:
            raise RuntimeError("there is no store")
        # The long part, which may ask other stores, while the gate is open; what changes meanwhile is made again.
        handles = await rekey.remade_handles(old.store, old.backends, new.root_key, {})
        await self._shut_gate(_REKEYING)
        try:
            handles = await rekey.remade_handles(old.store, old.backends, new.root_key, handles)
            old.store.retire()
            await self._database.write(
                lambda connection: rekey.replace(
                    connection,
                    old=old.root_key,
                    new=new.root_key,
                    record=new.record,
                    handles=handles,
                    entry=entry,
                    time_ms=_now_ms(),
                )
            )
        except BaseException:
            await self._reopen(old.root_key)
            raise
        self._unsealing = Unsealing(new.record, new.root_key.canary(), self._clock_s)
        await self._reopen(new.root_key)
        get_logger().info("root key replaced", operator=entry.caller, source=new.record.source.value)

    async def _reopen(self, root_key: RootKey) -> None:
        await self._forget()
        self._renew_nonce()
        await self._unseal(root_key)
        await self._open_gate(self.opened)

    async def _open_gate(self, opened: Opened) -> None:
        if self._assemble is None or self._on_change is None:
            raise RuntimeError("no gate is attached")
        self._gate.open(await self._behind.enter_async_context(self._assemble(opened.store, opened.backends)))
        await self._on_change(True)

    async def _shut_gate(self, why: str) -> None:
        await self._gate.shut(why)
        if self._on_change is not None:
            await self._on_change(False)
        await self._behind.aclose()

    def _renew_nonce(self) -> None:
        self._nonce = secrets.token_bytes(NONCE_SIZE)


def _append(entry: Entry, transaction: Transaction) -> None:
    transaction.append(entry, time_ms=_now_ms())


def _handed_in(unsealing: Unsealing) -> tuple[Block, ...]:
    """Tell the log who gave what, and which tries were refused since the store was sealed."""
    given = tuple(Block("share", True, str(number), operator) for number, operator in unsealing.givers)
    return given + tuple(Block("unseal", False, refused.why, refused.operator) for refused in unsealing.refused)


def _other_source(record: SealRecord, place: RootKeyPlace) -> CloisterError:
    return CloisterError(
        Code.CONFIG_INVALID,
        what="keybroker.root_key is not what the store says about its root key",
        why=f"{place.source.value} is configured, the store's root key comes from: {record.source.value}",
        todo="correct keybroker.root_key; cloister broker rekey changes where it comes from",
    )


def _state(what: str, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.SEAL_STATE, what=what, why=why, todo=todo)


def _now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)
