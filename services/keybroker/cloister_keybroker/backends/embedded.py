# SPDX-License-Identifier: Apache-2.0
"""The embedded back end: wrapping keys wrapped under the root key, in the handle itself.

handle = 0x01 || nonce (12) || GCM(root wrap key, W; AAD = TLV("cloister-kek-v1", tenant, uri, version, state))

Since the state is bound, editing `disabled` to `enabled` in the database gives a handle that does not open.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from datetime import datetime
from typing import Final

from cryptography.exceptions import InvalidTag

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.secret import SecretBytes
from cloister_keybroker.backends import WRAPPING_KEY_SIZE, Capability, KeyRef, handle_damaged
from cloister_keybroker.backends.wrapping import WrappingBackend, seal, unseal
from cloister_keybroker.rootkey import RootKey

NAME: Final = "embedded"


class EmbeddedBackend(WrappingBackend):
    """Keep nothing but the root key; every call is a few microseconds of AES."""

    name = NAME
    capabilities: frozenset[Capability] = frozenset()

    def __init__(self, root_key: RootKey) -> None:
        self._root = root_key.kek_wrap

    async def import_key(self, key: KeyRef, secret: SecretBytes) -> bytes:
        if len(secret) != WRAPPING_KEY_SIZE:
            raise ValueError(f"a wrapping key has {WRAPPING_KEY_SIZE} bytes")
        return seal(self._root, secret, key.handle_aad())

    async def restate(self, key: KeyRef, handle: bytes, state: KeyState) -> bytes:
        return await self.import_key(replace(key, state=state), await self.wrapping_key(key, handle))

    async def destroy(self, key: KeyRef, handle: bytes) -> None:
        """Do nothing: there is nothing outside the handle, and the store forgets that."""

    async def maintain(self, key: KeyRef, handle: bytes, now: datetime) -> bytes | None:
        """Return None: the root key does not age."""

    async def wrapping_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        try:
            return unseal(self._root, handle, key.handle_aad())
        except InvalidTag:
            raise handle_damaged(key) from None

    async def rekey(self, key: KeyRef, handle: bytes, root_key: RootKey) -> bytes:
        return await EmbeddedBackend(root_key).import_key(key, await self.wrapping_key(key, handle))

    async def reconcile(self, handles: Collection[bytes]) -> None:
        """Do nothing: there is nothing but the handles."""

    async def check(self) -> None:
        key = KeyRef(KeyUri("cloister", "canary"), 1, KeyState.ENABLED, frozenset())
        handle = await self.create(key)
        fresh = await self.generate(key, handle)
        if await self.unwrap(key, handle, fresh.wrapped) != fresh.secret:
            raise CloisterError(Code.STORE_DAMAGED, what="the embedded back end does not open what it wrapped")

    async def aclose(self) -> None:
        """Do nothing: nothing is open."""

    async def _usable_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        return await self.wrapping_key(key, handle)
