# SPDX-License-Identifier: Apache-2.0
"""Where wrapping keys live: one interface for the broker, one for stores of other makes behind it.

Every version of a key has a wrapping key W of 32 bytes. Data keys are wrapped under W in one form, whatever the back
end (wrapping.py), so a version can move between back ends, and be re-wrapped in the one it is in, while sealed data
stays as it is. A back end knows how to find W again from an opaque `handle`, which the store keeps beside the key's
version; it keeps no state of its own in the broker's database.

The embedded back end needs the root key only. Every other one (remote.py) splits what protects W between the root key
and a `Custodian`: an HSM or a key management service, which never sees W, a data key, or the name of a key.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol, Self, TypeAlias, runtime_checkable

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister.tlv import sha384, tlv
from cloister_keybroker.keys import KeyRecord
from cloister_keybroker.rootkey import RootKey

Clock: TypeAlias = Callable[[], datetime]

DEK_SIZE: Final = 32
WRAPPING_KEY_SIZE: Final = 32
PART_SIZE: Final = 32  # bytes of what a custodian keeps
MAX_HANDLE_SIZE: Final = 1024  # bytes


class Capability(enum.StrEnum):
    """What a back end does beyond wrapping: shown to operators, and what tests expect of it."""

    SPLIT = "split"  # neither the broker's disk and root key nor the custodian opens data without the other
    DISABLE = "disable"  # a disabled key is refused there too, not only by the broker
    DESTROY = "destroy"  # destruction erases something there, out of reach of copies of the broker's disk
    NON_EXTRACTABLE = "non-extractable"  # its keys cannot be read out of it
    EXPIRES = "expires"  # it deletes keys of a certain age: they have to be re-wrapped in time


@dataclass(frozen=True, slots=True)
class KeyRef:
    """One version of a key, in one state: what a handle is bound to."""

    uri: KeyUri
    version: int
    state: KeyState
    purposes: frozenset[Purpose]

    @classmethod
    def of(cls, record: KeyRecord, version: int) -> Self:
        """Name a version of a key as it stands in the store."""
        return cls(record.uri, version, record.state, record.purposes)

    def dek_aad(self) -> bytes:
        """Return what a wrapped data key is bound to (48 bytes).

        The state is not in it: a key that is disabled and enabled again still opens its data.
        """
        return sha384(tlv("cloister-dek-v1", self.uri.tenant, str(self.uri), self.version))

    def handle_aad(self) -> bytes:
        """Return what a handle is bound to: the state too, so that an edited state is found out."""
        return tlv("cloister-kek-v1", self.uri.tenant, str(self.uri), self.version, self.state.value)

    def custodian_aad(self) -> bytes:
        """Return what a custodian binds its part to (48 bytes). It tells the custodian no name."""
        purposes = tlv("purposes", *sorted(purpose.value for purpose in self.purposes))
        return sha384(tlv("cloister-custodian-v1", self.uri.tenant, str(self.uri), self.version, purposes))


@dataclass(frozen=True, slots=True)
class FreshDataKey:
    """A new data-encryption key (DEK, 32 bytes) and its wrapped form, for the header of a sealed object."""

    secret: SecretBytes
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class FreshPart:
    """A custodian's part of what protects a wrapping key (32 bytes), and the form that only the custodian opens."""

    secret: SecretBytes
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long a custodian's keys last."""

    rewrap_after: timedelta  # from this age on, maintenance moves to a new key
    refuse_after: timedelta  # from this age on nothing is released: a loud stop, before the custodian's silent deletion


class KeyBackend(Protocol):
    """What the broker asks of a back end. All calls may take a network round trip.

    Where a call returns a handle, the store makes it durable in place of the one it was called with; when `maintain`
    or a move to another back end made it, the old handle is given to `destroy` after that.
    """

    @property
    def name(self) -> str:
        """How handles, health and logs call it, such as "embedded"."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it does."""

    async def create(self, key: KeyRef) -> bytes:
        """Make the wrapping key of a new key version; return its handle (at most 1 KiB)."""

    async def import_key(self, key: KeyRef, secret: SecretBytes) -> bytes:
        """Take in a wrapping key (32 bytes) of the owner's, or of another back end; return its handle."""

    async def generate(self, key: KeyRef, handle: bytes) -> FreshDataKey:
        """Make a data key."""

    async def unwrap(self, key: KeyRef, handle: bytes, wrapped: bytes) -> SecretBytes:
        """Return the data key; raise WRAPPED_KEY_INVALID when it is not of this key version."""

    async def wrap(self, key: KeyRef, handle: bytes, secret: SecretBytes) -> bytes:
        """Wrap a data key (32 bytes), such as one that another version had wrapped."""

    async def restate(self, key: KeyRef, handle: bytes, state: KeyState) -> bytes:
        """Bring the key version into another state; return its new handle. May be repeated after a failure."""

    async def destroy(self, key: KeyRef, handle: bytes) -> None:
        """Destroy what is kept for this handle outside it; nothing happens when it is already gone."""

    async def maintain(self, key: KeyRef, handle: bytes, now: datetime) -> bytes | None:
        """Return a new handle when this one is due to be made again, else None."""

    async def wrapping_key(self, key: KeyRef, handle: bytes) -> SecretBytes:
        """Return the wrapping key itself, in any state: for a move to another back end."""

    async def rekey(self, key: KeyRef, handle: bytes, root_key: RootKey) -> bytes:
        """Return the handle as it has to be under another root key."""

    async def reconcile(self, handles: Collection[bytes]) -> None:
        """Look for keys that were made there and that nothing uses. `handles` are all that the store has of it."""

    async def check(self) -> None:
        """Unwrap a canary, of no key of anyone; raise CloisterError when that fails."""

    async def aclose(self) -> None:
        """Close what is open."""


class Custodian(Protocol):
    """What remote.py asks of a store of another make. It sees parts only: 32 random bytes that open nothing alone.

    Failures are CloisterErrors of the CUSTODIAN_* codes, or KEY_DISABLED; none has a name of a key in it.
    """

    @property
    def name(self) -> str:
        """How its back end is called; it stands in every handle, so it never changes while handles of it are left."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it does; SPLIT goes without saying."""

    @property
    def lifetime(self) -> Lifetime | None:
        """How long its keys last; None when they stay."""

    async def create(self, key: KeyRef) -> bytes:
        """Make a key of the custodian's own for this key version, enabled; return where it is (at most 256 bytes)."""

    async def generate(self, locator: bytes, aad: bytes) -> FreshPart:
        """Make a part, wrapped under the key at `locator` (at most 512 bytes) and bound to `aad` (48 bytes)."""

    async def unwrap(self, locator: bytes, wrapped: bytes, aad: bytes) -> SecretBytes:
        """Return the part; raise CUSTODIAN_KEY_LOST when there is no such key, KEY_DISABLED when it is disabled."""

    async def enable(self, locator: bytes) -> None:
        """Let the key be used; nothing happens when it already can be, or the custodian cannot disable."""

    async def disable(self, locator: bytes) -> None:
        """Refuse all use of the key; nothing happens when it is refused already, or the custodian cannot disable."""

    async def destroy(self, locator: bytes) -> None:
        """Erase the key for good; nothing happens when it is gone."""

    async def probe(self) -> None:
        """Check what can go wrong without a key: reachability, credentials, clock; raise CloisterError."""

    async def aclose(self) -> None:
        """Close connections."""


@runtime_checkable
class Reconciling(Protocol):
    """A custodian that remembers which keys it was asked to make, and can find those that nothing uses."""

    async def reconcile(self, in_use: Collection[bytes]) -> None:
        """Take keys that it made and that are not at these locators for lost."""


def wrapped_key_invalid(key: KeyRef) -> CloisterError:
    """Say that a wrapped data key does not open; never why, there is one reason for a caller."""
    return CloisterError(
        Code.WRAPPED_KEY_INVALID,
        what=f"the wrapped data key is not one of {key.uri}, version {key.version}",
        why="it is damaged, or it was wrapped under another key or version",
        todo="use the wrapped key, key URI and version from the header of the sealed object",
    )


def handle_damaged(key: KeyRef) -> CloisterError:
    """Say that a handle does not open: nobody but this broker can have made or changed it."""
    return CloisterError(
        Code.STORE_DAMAGED,
        what=f"the stored key {key.uri}, version {key.version}, does not open",
        why="the store was edited or damaged, or is under another root key",
        todo="restore the store and its root key from the same backup",
    )
