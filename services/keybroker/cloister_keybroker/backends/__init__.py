# SPDX-License-Identifier: Apache-2.0
"""Where key-encryption keys (KEKs) live: one small interface, one module per back end.

A back end keeps or wraps KEKs and never knows tenants, policies or logs. What it needs to find a KEK again is an
opaque `handle` that the store keeps beside the key's version: an embedded back end puts the wrapped KEK there, one in
front of a hardware module puts a name there. It keeps no state of its own in the broker's database.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.secret import SecretBytes
from cloister.tlv import sha384, tlv

DEK_SIZE = 32


@dataclass(frozen=True, slots=True)
class KeyRef:
    """One version of a key, in one state: what a handle is bound to."""

    uri: KeyUri
    version: int
    state: KeyState

    def dek_aad(self) -> bytes:
        """Return what a wrapped data key is bound to (48 bytes).

        The state is not in it: a key that is disabled and enabled again still opens its data.
        """
        return sha384(tlv("cloister-dek-v1", self.uri.tenant, str(self.uri), self.version))


@dataclass(frozen=True, slots=True)
class FreshDataKey:
    """A new data-encryption key (DEK, 32 bytes) and its wrapped form, for the header of a sealed object."""

    secret: SecretBytes
    wrapped: bytes


class KeyBackend(Protocol):
    """What the broker asks of a back end. All calls may take a network round trip."""

    @property
    def name(self) -> str:
        """How health and logs call it, such as "embedded"."""

    async def create(self, key: KeyRef) -> bytes:
        """Make the KEK of a new key version; return its handle (at most 1 KiB)."""

    async def generate(self, key: KeyRef, handle: bytes) -> FreshDataKey:
        """Make a data key under this KEK."""

    async def unwrap(self, key: KeyRef, handle: bytes, wrapped: bytes) -> SecretBytes:
        """Return the data key; raise WRAPPED_KEY_INVALID when it is not of this key version."""

    async def restate(self, key: KeyRef, handle: bytes, state: KeyState) -> bytes:
        """Bring the KEK into another state; return its new handle."""

    async def check(self) -> None:
        """Make and unwrap a data key of no key of anyone; raise CloisterError when that fails."""


def wrapped_key_invalid(key: KeyRef) -> CloisterError:
    """Say that a wrapped data key does not open; never why, there is one reason for a caller."""
    return CloisterError(
        Code.WRAPPED_KEY_INVALID,
        what=f"the wrapped data key is not one of {key.uri}, version {key.version}",
        why="it is damaged, or it was wrapped under another key or version",
        todo="use the wrapped key, key URI and version from the header of the sealed object",
    )
