# SPDX-License-Identifier: Apache-2.0
"""A custodian in this process, with real cryptography: what remote.py is tested on without any other store."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes
from cloister_keybroker.backends import PART_SIZE, Capability, FreshPart, KeyRef, Lifetime


@dataclass
class MemoryCustodian:
    """Keys in a dictionary. `away` refuses everything; `calls` counts what was asked."""

    name: str = "memory"
    lifetime: Lifetime | None = None
    capabilities: frozenset[Capability] = frozenset({Capability.DISABLE, Capability.DESTROY})
    away: bool = False
    keys: dict[bytes, bytes] = field(default_factory=dict)
    disabled: set[bytes] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    closed: bool = False

    async def create(self, key: KeyRef) -> bytes:
        self._called("create")
        locator = secrets.token_hex(16).encode()
        self.keys[locator] = os.urandom(32)
        return locator

    async def generate(self, locator: bytes, aad: bytes) -> FreshPart:
        self._called("generate")
        secret, nonce = os.urandom(PART_SIZE), os.urandom(12)
        return FreshPart(SecretBytes(secret), nonce + self._cipher(locator).encrypt(nonce, secret, aad))

    async def unwrap(self, locator: bytes, wrapped: bytes, aad: bytes) -> SecretBytes:
        self._called("unwrap")
        try:
            return SecretBytes(self._cipher(locator).decrypt(wrapped[:12], wrapped[12:], aad))
        except InvalidTag:
            raise CloisterError(Code.CUSTODIAN_REFUSED, what="the custodian does not open this") from None

    async def enable(self, locator: bytes) -> None:
        self._called("enable")
        self.disabled.discard(locator)

    async def disable(self, locator: bytes) -> None:
        self._called("disable")
        self.disabled.add(locator)

    async def destroy(self, locator: bytes) -> None:
        self._called("destroy")
        self.keys.pop(locator, None)

    async def probe(self) -> None:
        self._called("probe")

    async def aclose(self) -> None:
        self.closed = True

    def _called(self, what: str) -> None:
        if self.away:
            raise CloisterError(Code.CUSTODIAN_UNAVAILABLE, what="the custodian is away")
        self.calls.append(what)

    def _cipher(self, locator: bytes) -> AESGCM:
        if locator in self.disabled:
            raise CloisterError(Code.KEY_DISABLED, what="the custodian's key is disabled")
        if locator not in self.keys:
            raise CloisterError(Code.CUSTODIAN_KEY_LOST, what="the custodian has no such key")
        return AESGCM(self.keys[locator])


@dataclass
class Moments:
    """A clock that moves when told to."""

    now: datetime = datetime(2027, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **by: float) -> None:
        self.now += timedelta(**by)
