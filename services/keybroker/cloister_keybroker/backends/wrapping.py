# SPDX-License-Identifier: Apache-2.0
"""What all back ends do alike once they have the wrapping key W of a key version. AES-256-GCM throughout.

wrapped = 0x01 || nonce (12) || GCM(W, DEK; AAD = SHA-384(TLV("cloister-dek-v1", tenant, uri, version)))

Nonces are random: 2**32 wraps under one key are the bound (NIST SP 800-38D, 8.3), far from what a key version sees.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.secret import SecretBytes
from cloister_keybroker.backends import DEK_SIZE, WRAPPING_KEY_SIZE, FreshDataKey, KeyRef, wrapped_key_invalid

FORMAT: Final = b"\x01"
_NONCE_SIZE: Final = 12
_OVERHEAD: Final = 1 + _NONCE_SIZE + 16
WRAPPED_SIZE: Final = _OVERHEAD + DEK_SIZE


def seal(key: SecretBytes, secret: SecretBytes, aad: bytes) -> bytes:
    """Return 0x01 || nonce || ciphertext and tag: 29 bytes more than the secret."""
    nonce = os.urandom(_NONCE_SIZE)
    return FORMAT + nonce + AESGCM(key.reveal()).encrypt(nonce, secret.reveal(), aad)


def unseal(key: SecretBytes, sealed: bytes, aad: bytes) -> SecretBytes:
    """Return the secret; raise InvalidTag for anything that `seal` did not make."""
    if sealed[:1] != FORMAT or len(sealed) < _OVERHEAD:
        raise InvalidTag
    nonce, ciphertext = sealed[1 : 1 + _NONCE_SIZE], sealed[1 + _NONCE_SIZE :]
    return SecretBytes(AESGCM(key.reveal()).decrypt(nonce, ciphertext, aad))


class WrappingBackend(ABC):
    """Make, wrap and unwrap data keys; a subclass keeps wrapping keys."""

    @abstractmethod
    async def import_key(self, key: KeyRef, secret: SecretBytes) -> bytes:
        """Keep a wrapping key; return its handle."""

    @abstractmethod
    async def _usable_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        """Return the wrapping key for use."""

    async def create(self, key: KeyRef) -> bytes:
        return await self.import_key(key, SecretBytes(os.urandom(WRAPPING_KEY_SIZE)))

    async def generate(self, key: KeyRef, handle: bytes) -> FreshDataKey:
        secret = SecretBytes(os.urandom(DEK_SIZE))
        return FreshDataKey(secret, await self.wrap(key, handle, secret))

    async def wrap(self, key: KeyRef, handle: bytes, secret: SecretBytes) -> bytes:
        if len(secret) != DEK_SIZE:
            raise ValueError(f"a data key has {DEK_SIZE} bytes")
        return seal(await self._usable_key(key, handle), secret, key.dek_aad())

    async def unwrap(self, key: KeyRef, handle: bytes, wrapped: bytes) -> SecretBytes:
        if len(wrapped) != WRAPPED_SIZE or wrapped[:1] != FORMAT:
            raise wrapped_key_invalid(key)  # before anybody is asked over the network
        try:
            return unseal(await self._usable_key(key, handle), wrapped, key.dek_aad())
        except InvalidTag:
            raise wrapped_key_invalid(key) from None
