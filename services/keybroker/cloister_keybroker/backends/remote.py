# SPDX-License-Identifier: Apache-2.0
"""Wrapping keys split between the root key and a custodian: neither opens anything alone.

p1     = 32 random bytes that the custodian keeps, wrapped under a key of its own and bound to `KeyRef.custodian_aad`
key    = HKDF-SHA-256(p1, salt = the root key's part, info = handle AAD)
handle = TLV("cloister-handle-v1", back end, locator, p1 as the custodian wrapped it, created_ms, GCM(key, W; AAD))
AAD    = TLV("cloister-remote-v1", back end, locator, created_ms, `KeyRef.handle_aad`)

The custodian sees p1, never W, a data key or a name. The broker's disk and root key hold everything but p1. Every use
of a key asks the custodian once: p1 is not kept in memory, so a key that is disabled there is of no use here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState
from cloister.runtime.logging import get_logger
from cloister.secret import SecretBytes
from cloister.tlv import parse_tlv, tlv
from cloister_keybroker.backends import (
    MAX_HANDLE_SIZE,
    PART_SIZE,
    WRAPPING_KEY_SIZE,
    Capability,
    Clock,
    Custodian,
    KeyRef,
    Reconciling,
    handle_damaged,
)
from cloister_keybroker.backends.canary import Canary
from cloister_keybroker.backends.failures import answer_invalid
from cloister_keybroker.backends.wrapping import WrappingBackend, seal, unseal
from cloister_keybroker.rootkey import RootKey

_LABEL: Final = "cloister-handle-v1"


@dataclass(frozen=True, slots=True)
class Handle:
    """What the store keeps for a version whose key is split."""

    backend: str
    locator: bytes
    wrapped_part: bytes
    created_ms: int  # Unix milliseconds: when the custodian made its key
    sealed_key: bytes  # W

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode a handle; raise ValueError for anything else."""
        backend, locator, part, created_ms, sealed = parse_tlv(data, label=_LABEL, fields=5)
        if len(created_ms) != 8:
            raise ValueError("a time has eight bytes")
        return cls(backend.decode("ascii"), locator, part, int.from_bytes(created_ms, "big"), sealed)

    def encode(self) -> bytes:
        """Return the bytes that the store keeps."""
        data = tlv(_LABEL, self.backend, self.locator, self.wrapped_part, self.created_ms, self.sealed_key)
        if len(data) > MAX_HANDLE_SIZE:
            raise answer_invalid(self.backend, f"a handle has at most {MAX_HANDLE_SIZE} bytes; this has {len(data)}")
        return data

    def age(self, now: datetime) -> timedelta:
        """Return how old the custodian's key is."""
        return now - datetime.fromtimestamp(self.created_ms / 1000, UTC)


class RemoteBackend(WrappingBackend):
    """Ask a custodian for its part, one call for each use of a key."""

    def __init__(self, custodian: Custodian, root_key: RootKey, *, clock: Clock, canary_file: Path) -> None:
        self._custodian = custodian
        self._root_part = root_key.custodian_salt
        self._clock = clock
        self._canary = Canary(custodian, canary_file, clock)

    @property
    def name(self) -> str:
        return self._custodian.name

    @property
    def capabilities(self) -> frozenset[Capability]:
        expires = {Capability.EXPIRES} if self._custodian.lifetime else set()
        return self._custodian.capabilities | {Capability.SPLIT} | expires

    async def import_key(self, key: KeyRef, secret: SecretBytes) -> bytes:
        if len(secret) != WRAPPING_KEY_SIZE:
            raise ValueError(f"a wrapping key has {WRAPPING_KEY_SIZE} bytes")
        # Taken before the custodian makes its key, so that it is never younger in our books than in its own.
        created_ms = int(self._clock().timestamp() * 1000)
        locator = await self._custodian.create(key)
        try:
            fresh = await self._custodian.generate(locator, key.custodian_aad())
            handle = Handle(self.name, locator, fresh.wrapped, created_ms, b"")
            encoded = self._sealed(key, handle, fresh.secret, secret).encode()
            if key.state is not KeyState.ENABLED:
                await self._custodian.disable(locator)
        except CloisterError:
            await self._give_up(locator)
            raise
        return encoded

    async def restate(self, key: KeyRef, handle: bytes, state: KeyState) -> bytes:
        parsed = self._parse(key, handle)
        # An earlier attempt may have got as far as the custodian and no further: from any state there, enable first.
        await self._custodian.enable(parsed.locator)
        part = await self._part(key, parsed)
        after = self._sealed(replace(key, state=state), parsed, part, self._open(key, parsed, part))
        if state is not KeyState.ENABLED:
            await self._custodian.disable(parsed.locator)
        return after.encode()

    async def destroy(self, key: KeyRef, handle: bytes) -> None:
        await self._custodian.destroy(self._parse(key, handle).locator)

    async def maintain(self, key: KeyRef, handle: bytes, now: datetime) -> bytes | None:
        lifetime = self._custodian.lifetime
        if lifetime is None or self._parse(key, handle).age(now) < lifetime.rewrap_after:
            return None
        return await self.import_key(key, await self.wrapping_key(key, handle))

    async def wrapping_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        parsed = self._parse(key, handle)
        return self._open(key, parsed, await self._part_in_any_state(key, parsed))

    async def rekey(self, key: KeyRef, handle: bytes, root_key: RootKey) -> bytes:
        parsed = self._parse(key, handle)
        part = await self._part_in_any_state(key, parsed)
        secret = self._open(key, parsed, part)
        return _sealed(key, parsed, _derive(key, part, root_key.custodian_salt), secret).encode()

    async def reconcile(self, handles: Collection[bytes]) -> None:
        if isinstance(self._custodian, Reconciling):
            in_use = [Handle.parse(handle).locator for handle in handles]
            await self._custodian.reconcile([*in_use, *self._canary.locators()])

    async def check(self) -> None:
        await self._custodian.probe()
        await self._canary.check()

    async def aclose(self) -> None:
        await self._custodian.aclose()

    async def _usable_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        parsed = self._parse(key, handle)
        lifetime = self._custodian.lifetime
        if lifetime is not None and parsed.age(self._clock()) >= lifetime.refuse_after:
            raise CloisterError(
                Code.CUSTODIAN_KEY_EXPIRING,
                what=f"{key.uri}, version {key.version}, is not used: its key at the back end is about to be deleted",
                why=f"it is {parsed.age(self._clock()).days} days old and was not re-wrapped in time",
                todo="the operator lets the broker reach its back end: maintenance re-wraps the key",
            )
        return self._open(key, parsed, await self._part(key, parsed))

    async def _part_in_any_state(self, key: KeyRef, handle: Handle) -> SecretBytes:
        if key.state is KeyState.ENABLED:
            return await self._part(key, handle)
        await self._custodian.enable(handle.locator)
        try:
            return await self._part(key, handle)
        finally:
            await self._custodian.disable(handle.locator)

    async def _part(self, key: KeyRef, handle: Handle) -> SecretBytes:
        part = await self._custodian.unwrap(handle.locator, handle.wrapped_part, key.custodian_aad())
        if len(part) != PART_SIZE:
            raise answer_invalid(self.name, f"a part of a key has {PART_SIZE} bytes; this one has {len(part)}")
        return part

    def _parse(self, key: KeyRef, data: bytes) -> Handle:
        try:
            handle = Handle.parse(data)
        except ValueError:
            raise handle_damaged(key) from None
        if handle.backend != self.name:
            raise handle_damaged(key)
        return handle

    def _sealed(self, key: KeyRef, handle: Handle, part: SecretBytes, secret: SecretBytes) -> Handle:
        return _sealed(key, handle, _derive(key, part, self._root_part), secret)

    def _open(self, key: KeyRef, handle: Handle, part: SecretBytes) -> SecretBytes:
        try:
            return unseal(_derive(key, part, self._root_part), handle.sealed_key, _aad(key, handle))
        except InvalidTag:
            raise handle_damaged(key) from None

    async def _give_up(self, locator: bytes) -> None:
        """Do not leave a key behind that nothing will ever use."""
        try:
            await self._custodian.destroy(locator)
        except CloisterError as error:
            get_logger().warning("a key that nothing uses stays at the back end", backend=self.name, problem=str(error))


def _derive(key: KeyRef, part: SecretBytes, root_part: SecretBytes) -> SecretBytes:
    """Return what seals W: unknown to whoever lacks one of the two secrets (HMAC is keyed by either)."""
    hkdf = HKDF(hashes.SHA256(), WRAPPING_KEY_SIZE, salt=root_part.reveal(), info=key.handle_aad())
    return SecretBytes(hkdf.derive(part.reveal()))


def _aad(key: KeyRef, handle: Handle) -> bytes:
    return tlv("cloister-remote-v1", handle.backend, handle.locator, handle.created_ms, key.handle_aad())


def _sealed(key: KeyRef, handle: Handle, sealing_key: SecretBytes, secret: SecretBytes) -> Handle:
    return replace(handle, sealed_key=seal(sealing_key, secret, _aad(key, handle)))
