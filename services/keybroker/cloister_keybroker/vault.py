# SPDX-License-Identifier: Apache-2.0
"""The store with or without its root key: what opens the gate, and what shuts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import TypeAlias

from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister.runtime.server import Mounted
from cloister_keybroker import mark
from cloister_keybroker.config import RootKeyPlace
from cloister_keybroker.gate import Gate
from cloister_keybroker.rootkey import RootKey, read_root_key
from cloister_keybroker.sealrecord import SealRecord, Source
from cloister_keybroker.store import KeyStore

Assemble: TypeAlias = Callable[[KeyStore, RootKey], AbstractAsyncContextManager[Sequence[Mounted]]]


class Vault:
    """The store of one broker. Belongs to one event loop."""

    def __init__(self, path: Path, place: RootKeyPlace) -> None:
        """Use `open`."""
        self._path = path
        self._place = place
        self._database: Database | None = None
        self._unsealed: tuple[KeyStore, RootKey] | None = None
        self._gate: Gate | None = None
        self._assemble: Assemble | None = None
        self._behind = AsyncExitStack()

    @classmethod
    async def open(cls, path: Path, place: RootKeyPlace) -> Vault:
        """Open the store; with a root key file unseal and verify it. No store is ever made here.

        Raises CloisterError: no store, another root key, a damaged store, a configuration that is not the store's.
        """
        vault = cls(path, place)
        try:
            if place.source is Source.FILE:
                root_key = read_root_key(place.file)
                await vault._open_file()
                await vault._verify(root_key)
            elif path.exists():
                await vault._open_file()
        except BaseException:
            vault.close()
            raise
        return vault

    @property
    def sealed(self) -> bool:
        """True while the root key is not known."""
        return self._unsealed is None

    async def attach(self, gate: Gate, assemble: Assemble) -> None:
        """Let this gate open as soon as the store is unsealed; now, if it is."""
        self._gate, self._assemble = gate, assemble
        if self._unsealed is None:
            await gate.shut("the broker is sealed: nobody has given it its root key since it started")
        else:
            await self._open_gate(*self._unsealed)

    async def detach(self) -> None:
        """Shut the gate for good and end what is behind it."""
        if self._gate is not None:
            await self._gate.shut("the broker is stopping")
        await self._behind.aclose()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._database is not None:
            self._database.close()

    async def _open_file(self) -> None:
        self._database = KeyStore.open_file(self._path)
        record = (await self._database.read(mark.read)).record
        if record.source is not self._place.source:
            raise _other_source(record, self._place)

    async def _verify(self, root_key: RootKey) -> None:
        if self._database is None:
            raise RuntimeError("there is no store")
        self._unsealed = (await KeyStore.unsealed(self._database, root_key), root_key)

    async def _open_gate(self, store: KeyStore, root_key: RootKey) -> None:
        if self._gate is None or self._assemble is None:
            raise RuntimeError("no gate is attached")
        self._gate.open(await self._behind.enter_async_context(self._assemble(store, root_key)))


def _other_source(record: SealRecord, place: RootKeyPlace) -> CloisterError:
    return CloisterError(
        Code.CONFIG_INVALID,
        what="keybroker.root_key is not what the store says about its root key",
        why=f"{place.source.value} is configured, the store's root key comes from: {record.source.value}",
        todo="correct keybroker.root_key; cloister broker rekey changes where it comes from",
    )
