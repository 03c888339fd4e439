# SPDX-License-Identifier: Apache-2.0
"""The embedded back end: KEKs wrapped under the root key, in the handle itself. AES-256-GCM throughout.

handle  = 0x01 || nonce (12) || GCM(root wrap key, KEK; AAD = TLV("cloister-kek-v1", tenant, uri, version, state))
wrapped = 0x01 || nonce (12) || GCM(KEK, DEK; AAD = SHA-384(TLV("cloister-dek-v1", tenant, uri, version)))

Nonces are random: 2**32 wraps under one key are the bound (NIST SP 800-38D, 8.3), far from what a key version sees.
Since the state is bound, editing `disabled` to `enabled` in the database gives a handle that does not open.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.secret import SecretBytes
from cloister.tlv import tlv
from cloister_keybroker.backends import DEK_SIZE, FreshDataKey, KeyRef, wrapped_key_invalid
from cloister_keybroker.rootkey import RootKey

_FORMAT: Final = b"\x01"
_NONCE_SIZE: Final = 12
_KEK_SIZE: Final = 32
WRAPPED_SIZE: Final = 1 + _NONCE_SIZE + DEK_SIZE + 16


class EmbeddedBackend:
    """Keep nothing but the root key; every call is a few microseconds of AES."""

    name = "embedded"

    def __init__(self, root_key: RootKey) -> None:
        self._root = AESGCM(root_key.kek_wrap.reveal())

    async def create(self, key: KeyRef) -> bytes:
        return self._wrap_kek(key, SecretBytes(os.urandom(_KEK_SIZE)))

    async def generate(self, key: KeyRef, handle: bytes) -> FreshDataKey:
        secret = SecretBytes(os.urandom(DEK_SIZE))
        return FreshDataKey(secret, _seal(AESGCM(self._kek(key, handle).reveal()), secret, key.dek_aad()))

    async def unwrap(self, key: KeyRef, handle: bytes, wrapped: bytes) -> SecretBytes:
        kek = AESGCM(self._kek(key, handle).reveal())
        if len(wrapped) != WRAPPED_SIZE:
            raise wrapped_key_invalid(key)
        try:
            return _open(kek, wrapped, key.dek_aad())
        except InvalidTag:
            raise wrapped_key_invalid(key) from None

    async def restate(self, key: KeyRef, handle: bytes, state: KeyState) -> bytes:
        return self._wrap_kek(KeyRef(key.uri, key.version, state), self._kek(key, handle))

    async def check(self) -> None:
        key = KeyRef(KeyUri("cloister", "canary"), 1, KeyState.ENABLED)
        handle = await self.create(key)
        fresh = await self.generate(key, handle)
        if await self.unwrap(key, handle, fresh.wrapped) != fresh.secret:
            raise CloisterError(Code.STORE_DAMAGED, what="the embedded back end does not open what it wrapped")

    def _wrap_kek(self, key: KeyRef, kek: SecretBytes) -> bytes:
        return _seal(self._root, kek, _kek_aad(key))

    def _kek(self, key: KeyRef, handle: bytes) -> SecretBytes:
        try:
            return _open(self._root, handle, _kek_aad(key))
        except InvalidTag:
            raise CloisterError(
                Code.STORE_DAMAGED,
                what=f"the stored key {key.uri}, version {key.version}, does not open",
                why="the store was edited or damaged, or is under another root key",
                todo="restore the store and its root key from the same backup",
            ) from None


def _kek_aad(key: KeyRef) -> bytes:
    return tlv("cloister-kek-v1", key.uri.tenant, str(key.uri), key.version, key.state.value)


def _seal(cipher: AESGCM, secret: SecretBytes, aad: bytes) -> bytes:
    nonce = os.urandom(_NONCE_SIZE)
    return _FORMAT + nonce + cipher.encrypt(nonce, secret.reveal(), aad)


def _open(cipher: AESGCM, sealed: bytes, aad: bytes) -> SecretBytes:
    """Return the secret; raise InvalidTag for anything that `_seal` did not make."""
    if sealed[:1] != _FORMAT or len(sealed) <= 1 + _NONCE_SIZE:
        raise InvalidTag
    return SecretBytes(cipher.decrypt(sealed[1 : 1 + _NONCE_SIZE], sealed[1 + _NONCE_SIZE :], aad))
