# SPDX-License-Identifier: Apache-2.0
"""The store with or without its root key: what opens the gate, and what shuts it.

A store is made, sealed. Shares, a passphrase or a file give its root key; then it is verified, and what needs it is
assembled behind the gate. A root key that is to replace another is made first, and takes effect when it was handed
back: shares that nobody can read never become the only way in.
"""

from __future__ import annotations

import asyncio
import enum
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

from cloister.errors import CloisterError, Code
from cloister.protocol import NONCE_SIZE
from cloister.release.blocks import Block
from cloister.runtime.database import Database
from cloister.runtime.logging import get_logger
from cloister.secret import SecretBytes
from cloister_keybroker import mark, rekey
from cloister_keybroker.assembly import Assembled
from cloister_keybroker.config import RootKeyPlace
from cloister_keybroker.gate import Gate
from cloister_keybroker.operators import Operator
from cloister_keybroker.rootfile import adopt_root_key, read_root_key, stage_root_key
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import SealRecord, Source
from cloister_keybroker.store import KeyStore
from cloister_keybroker.unsealing import NewRoot, Unsealing

Assemble: TypeAlias = Callable[[KeyStore, RootKey], AbstractAsyncContextManager[Assembled]]

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
class _Open:
    store: KeyStore
    root_key: RootKey


class Vault:
    """The store of one broker. Belongs to one event loop."""

    def __init__(self, path: Path, place: RootKeyPlace, *, clock_s: Callable[[], float] = time.monotonic) -> None:
        """Use `open`."""
        self.path = path
        self._place = place
        self._clock_s = clock_s
        self._lock = asyncio.Lock()  # operators act one after the other
        self._database: Database | None = None
        self._mark: mark.Mark | None = None
        self._unsealing: Unsealing | None = None
        self._open: _Open | None = None
        self._next: tuple[NewRoot, Unsealing] | None = None
        self._nonce = secrets.token_bytes(NONCE_SIZE)
        self._gate: Gate | None = None
        self._assemble: Assemble | None = None
        self._behind = AsyncExitStack()
        self._assembled: Assembled | None = None
        self._on_change: Callable[[bool], None] = lambda _unsealed: None

    @classmethod
    async def open(cls, path: Path, place: RootKeyPlace, *, clock_s: Callable[[], float] = time.monotonic) -> Vault:
        """Open the store; with a root key file unseal and verify it. No store is ever made here.

        Raises CloisterError: no store, another root key, a damaged store, a configuration that is not the store's.
        """
        vault = cls(path, place, clock_s=clock_s)
        try:
            if place.source is Source.FILE or path.exists():
                if place.source is Source.FILE:
                    read_root_key(place.file)  # what is wrong with it is said before anything about the store
                await vault._open_file()
            if place.source is Source.FILE:
                await vault._verify(vault._root_key_of_file())
        except BaseException:
            vault.close()
            raise
        return vault

    @property
    def sealed(self) -> bool:
        """True while the root key is not known."""
        return self._open is None

    def status(self) -> Status:
        """Say where the vault stands."""
        source = self._mark.record.source if self._mark else self._place.source
        state = State.UNSEALED if self._open else State.SEALED if self._database else State.UNINITIALIZED
        waiting = self._next[1] if self._next else None if self._open else self._unsealing
        have, need = (waiting.have, waiting.need) if waiting and source is not Source.FILE else (0, 0)
        if self._next:
            have, need, source = self._next[1].have, self._next[1].need, self._next[0].record.source
        return Status(state, source, have, need, self._nonce)

    async def attach(self, gate: Gate, assemble: Assemble) -> None:
        """Let this gate open as soon as the store is unsealed; now, if it is."""
        self._gate, self._assemble = gate, assemble
        if self._open is not None:
            await self._open_gate(self._open)
        else:
            await gate.shut(_WAITING if self._database else _NO_STORE)

    def on_change(self, callback: Callable[[bool], None]) -> None:
        """Call back with whether the broker is unsealed, whenever that changes."""
        self._on_change = callback

    async def detach(self) -> None:
        """Shut the gate for good and end what is behind it."""
        if self._gate is not None:
            await self._gate.shut("the broker is stopping")
        await self._behind.aclose()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
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
                if self._open is not None or not await self._database.read(rekey.is_unused):
                    raise _state("there is a store already", "another would lose its keys", "unseal it")
                self._database.close()
                self._database = None
                self.path.unlink()
            (await KeyStore.create(self.path, new.root_key, new.record)).close()
            await self._open_file()
            if self._gate is not None:
                await self._gate.shut(_WAITING)
            get_logger().info("store made", source=new.record.source.value)

    async def hand_in(self, secret: SecretBytes, operator: Operator) -> None:
        """Take a share or a passphrase; unseal, or let the next root key take effect, when that is enough.

        Of a root key file nothing is handed in: an empty secret reads the file again.
        """
        async with self._lock:
            if self._next is not None:
                new, unsealing = self._next
                if await asyncio.to_thread(unsealing.hand_in, secret, str(operator.spiffe_id)) is not None:
                    self._next = None
                    await self._replace_root(new, operator, unsealing)
                return
            if self._open is not None:
                raise _state("the broker is unsealed", "nothing is waited for", "nothing has to be done")
            if self._unsealing is None:
                raise _state(_NO_STORE, "there is nothing to unseal", "make one: cloister broker init")
            root_key = await self._root_key(self._unsealing, secret, operator)
            if root_key is not None:
                unsealing = self._unsealing
                await self._verify(root_key)
                await self._record("unseal", operator, _handed_in(unsealing))
                unsealing.clear()
                unsealing.refused.clear()
                self._renew_nonce()
                if self._open is not None:
                    await self._open_gate(self._open)
                get_logger().info("unsealed", operator=str(operator.spiffe_id))

    async def seal(self, operator: Operator) -> None:
        """Shut the gate and forget the root key; nothing happens when it is not known."""
        async with self._lock:
            if self._open is None:
                return
            await self._record("seal", operator, ())
            await self._shut_gate("an operator sealed it")
            self._open, self._next = None, None
            self._renew_nonce()
            get_logger().info("sealed", operator=str(operator.spiffe_id))

    async def begin_rekey(self, new: NewRoot) -> None:
        """Have another root key wait until it is handed in; of two the last counts."""
        async with self._lock:
            if self._open is None:
                raise _state("the broker is sealed", "its keys cannot be read", "unseal it first")
            self._next = (new, Unsealing(new.record, new.root_key.canary(), self._clock_s))
            self._renew_nonce()

    async def rekey_file(self, operator: Operator) -> None:
        """Replace the root key by one in the configured file."""
        if self._place.source is not Source.FILE:
            raise _other_source(SealRecord(), self._place)
        async with self._lock:
            if self._open is None:
                raise _state("the broker is sealed", "its keys cannot be read", "unseal it first")
            self._next = None
            # The file of the next root key is there before the store is under it, and takes the name afterwards.
            new = stage_root_key(self._place.file)
            await self._replace_root(NewRoot(new, SealRecord()), operator, None)
            adopt_root_key(self._place.file)

    def opened(self) -> tuple[KeyStore, Assembled]:
        """Return the store and what is behind the gate; raise CloisterError(BROKER_SEALED)."""
        if self._open is None or self._assembled is None:
            raise CloisterError(
                Code.BROKER_SEALED,
                what="the key broker is sealed",
                why=_WAITING if self._database else _NO_STORE,
                todo="unseal it first: cloister broker unseal",
            )
        return self._open.store, self._assembled

    @property
    def root_key(self) -> RootKey:
        """The root key; raises CloisterError(BROKER_SEALED)."""
        self.opened()
        return self._open.root_key  # type: ignore[union-attr]  # opened() has looked

    async def _root_key(self, unsealing: Unsealing, secret: SecretBytes, operator: Operator) -> RootKey | None:
        if unsealing.record.source is not Source.FILE:
            return await asyncio.to_thread(unsealing.hand_in, secret, str(operator.spiffe_id))
        if len(secret):
            raise _state("nothing is handed in here", "the root key is in a file", "send nothing: the file is read again")
        return self._root_key_of_file()

    def _root_key_of_file(self) -> RootKey:
        """Read the file; when a replacement was interrupted, finish it or drop it, as the store says."""
        path, found = self._place.file, read_root_key(self._place.file)
        if self._mark is None or self._mark.is_of(found):
            return found
        staged = path.with_name(f"{path.name}.next")
        if staged.exists() and self._mark.is_of(other := read_root_key(staged)):
            adopt_root_key(path)
            return other
        return found  # the store says what is wrong with it

    async def _open_file(self) -> None:
        self._database = KeyStore.open_file(self.path)
        self._mark = await self._database.read(mark.read)
        if self._mark.record.source is not self._place.source:
            raise _other_source(self._mark.record, self._place)
        self._unsealing = Unsealing(self._mark.record, self._mark.canary, self._clock_s)

    async def _verify(self, root_key: RootKey) -> None:
        if self._database is None:
            raise RuntimeError("there is no store")
        self._open = _Open(await KeyStore.unsealed(self._database, root_key), root_key)

    async def _replace_root(self, new: NewRoot, operator: Operator, unsealing: Unsealing | None) -> None:
        """Make every handle and MAC again under the new root key, in one transaction; old ones open nothing."""
        old, (_, assembled) = self._open, self.opened()
        if old is None or self._database is None:
            raise RuntimeError("a sealed vault has no root key to replace")
        entry = operator.entry("rekey", _handed_in(unsealing) if unsealing else ())
        # The long part, which may ask back ends, while the gate is still open; what changes meanwhile is made again.
        handles = await rekey.remade_handles(old.store, assembled.backend, new.root_key, {})
        await self._shut_gate(_REKEYING, keep_backend=True)
        try:
            handles = await rekey.remade_handles(old.store, assembled.backend, new.root_key, handles)
            await self._database.write(
                lambda connection: rekey.replace(connection, old.root_key, new, handles, entry, time_ms=_now_ms())
            )
            self._mark = mark.Mark(new.root_key.canary(), new.record)
            self._unsealing = Unsealing(new.record, self._mark.canary, self._clock_s)
            await self._verify(new.root_key)
        finally:
            await self._behind.aclose()
            self._renew_nonce()
            await self._open_gate(self._open or old)
        get_logger().info("root key replaced", operator=str(operator.spiffe_id), source=new.record.source.value)

    async def _open_gate(self, opened: _Open) -> None:
        if self._gate is None or self._assemble is None:
            raise RuntimeError("no gate is attached")
        self._behind = AsyncExitStack()
        self._assembled = await self._behind.enter_async_context(self._assemble(opened.store, opened.root_key))
        self._gate.open(self._assembled.services)
        self._on_change(True)

    async def _shut_gate(self, why: str, *, keep_backend: bool = False) -> None:
        if self._gate is not None:
            await self._gate.shut(why)
        self._on_change(False)
        self._assembled = None
        if not keep_backend:
            await self._behind.aclose()

    async def _record(self, action: str, operator: Operator, blocks: Sequence[Block]) -> None:
        if self._open is not None:
            entry = operator.entry(action, blocks)
            await self._open.store.write(lambda transaction: transaction.append(entry, time_ms=_now_ms()))

    def _renew_nonce(self) -> None:
        self._nonce = secrets.token_bytes(NONCE_SIZE)


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
