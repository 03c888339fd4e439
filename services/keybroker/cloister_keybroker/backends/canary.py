# SPDX-License-Identifier: Apache-2.0
"""A part of no key of anyone, kept to see whether a custodian still opens what it wrapped.

It stands in a file beside the store and opens nothing. It is made once, not at every start: making a key is the one
thing at a custodian that must not be repeated lightly.
"""

from __future__ import annotations

import asyncio
import hmac
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self

from cloister.atomicfile import file_error, write_atomically
from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.tlv import parse_tlv, sha384, tlv
from cloister_keybroker.backends import Clock, Custodian, KeyRef
from cloister_keybroker.backends.failures import answer_invalid

_LABEL: Final = "cloister-custodian-canary-v1"
CANARY_KEY: Final = KeyRef(KeyUri("cloister", "canary"), 1, KeyState.ENABLED, frozenset())


@dataclass(frozen=True, slots=True)
class Kept:
    """What the file holds."""

    backend: str
    locator: bytes
    wrapped: bytes  # the part; empty while only its key was made
    created_ms: int  # Unix milliseconds
    digest: bytes  # SHA-384 of the part

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Decode it; raise ValueError for anything else."""
        backend, locator, wrapped, created_ms, digest = parse_tlv(data, label=_LABEL, fields=5)
        if len(created_ms) != 8:
            raise ValueError("a time has eight bytes")
        return cls(backend.decode("ascii"), locator, wrapped, int.from_bytes(created_ms, "big"), digest)

    def encode(self) -> bytes:
        """Return the bytes of the file."""
        return tlv(_LABEL, self.backend, self.locator, self.wrapped, self.created_ms, self.digest)


class Canary:
    """Unwrap it; make it when there is none yet, or it is due."""

    def __init__(self, custodian: Custodian, path: Path, clock: Clock) -> None:
        self._custodian = custodian
        self._path = path
        self._clock = clock
        self._checking = asyncio.Lock()  # two checks at once must not make two

    async def check(self) -> None:
        """Raise CloisterError when the custodian does not open the canary."""
        async with self._checking:
            kept = self._read()
            if kept is None:
                kept = await self._create()
            elif self._due(kept):
                old, kept = kept, await self._create()
                await self._custodian.destroy(old.locator)
            if not kept.wrapped:
                kept = await self._wrap(kept)
            part = await self._custodian.unwrap(kept.locator, kept.wrapped, CANARY_KEY.custodian_aad())
            if not hmac.compare_digest(sha384(part.reveal()), kept.digest):
                raise answer_invalid(self._custodian.name, "it opens the canary as something else")

    def locators(self) -> list[bytes]:
        """Return where the canary is at the custodian; nothing before it was made."""
        kept = self._read()
        return [kept.locator] if kept is not None else []

    def _due(self, kept: Kept) -> bool:
        lifetime = self._custodian.lifetime
        age = self._clock() - datetime.fromtimestamp(kept.created_ms / 1000, UTC)
        return lifetime is not None and age >= lifetime.rewrap_after

    async def _create(self) -> Kept:
        """Make its key, and remember it at once: a check that fails from here on must not make another each time."""
        created_ms = int(self._clock().timestamp() * 1000)
        kept = Kept(self._custodian.name, await self._custodian.create(CANARY_KEY), b"", created_ms, b"")
        write_atomically(self._path, kept.encode())
        return kept

    async def _wrap(self, kept: Kept) -> Kept:
        fresh = await self._custodian.generate(kept.locator, CANARY_KEY.custodian_aad())
        kept = replace(kept, wrapped=fresh.wrapped, digest=sha384(fresh.secret.reveal()))
        write_atomically(self._path, kept.encode())
        return kept

    def _read(self) -> Kept | None:
        try:
            kept = Kept.parse(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise file_error(error, what=f"the canary of the back end {self._custodian.name} cannot be read") from None
        except ValueError:
            kept = None
        if kept is None or kept.backend != self._custodian.name:
            raise CloisterError(
                Code.STORE_DAMAGED,
                what=f"the canary of the back end {self._custodian.name} is damaged",
                why=f"{self._path.name} in the state directory is not what the broker wrote",
                todo="remove it: the broker makes another at its next check",
            )
        return kept
