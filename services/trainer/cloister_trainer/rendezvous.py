# SPDX-License-Identifier: Apache-2.0
"""The key space in which the ranks of one job find each other."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Code


@dataclass(frozen=True, slots=True)
class RendezvousLimits:
    """Bounds of one job's key space. torch sets one key of about 200 bytes a rank and group."""

    max_key_bytes: int = 1024
    max_value_bytes: int = 64 * 1024
    max_keys: int = 10_000
    max_total_bytes: int = 16 * 1024 * 1024
    max_keys_per_call: int = 256  # four times the largest job
    max_waiting: int = 256  # calls that block at the same time


_DEFAULT: Final = RendezvousLimits()
_INT64: Final = 2**63


class KeySpace:
    """Keys and values of one job; lives as long as the job. Raises CloisterError for what exceeds the limits."""

    def __init__(self, limits: RendezvousLimits = _DEFAULT) -> None:
        self._limits = limits
        self._values: dict[str, bytes] = {}
        self._total = 0
        self._changed = asyncio.Condition()
        self._waiting = 0
        self._closed = False

    async def set(self, key: str, value: bytes) -> None:
        self._put(key, value)
        await self._notify()

    async def get(self, key: str) -> bytes:
        """Return the value, as soon as there is one; the caller's deadline ends the wait."""
        await self.wait([key])
        return self._values[key]

    async def wait(self, keys: Sequence[str]) -> None:
        """Return when all of the keys are there."""
        self._check_keys(keys)
        if self._waiting >= self._limits.max_waiting:
            raise _exceeded("too many calls wait", self._limits.max_waiting)
        self._waiting += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._closed or all(key in self._values for key in keys))
        finally:
            self._waiting -= 1
        if self._closed:
            raise CloisterError(
                Code.JOB_ENDED, what="the job has ended", why="its ranks meet no more", todo="submit it again"
            )

    async def add(self, key: str, amount: int) -> int:
        """Add to a number (absent counts as 0) and return it; numbers are decimal text, as torch reads them."""
        try:
            number = int(self._values.get(key, b"0")) + amount
        except ValueError:
            number = _INT64
        if not -_INT64 <= number < _INT64:
            raise CloisterError(Code.ARGUMENT_INVALID, what="this key does not hold a number of 64 bits")
        await self.set(key, str(number).encode())
        return number

    async def check(self, keys: Sequence[str]) -> bool:
        """Say whether all of the keys are there."""
        self._check_keys(keys)
        return all(key in self._values for key in keys)

    async def compare_set(self, key: str, expected: bytes, desired: bytes) -> bytes:
        """Set when the value is `expected` (empty: when there is none); return what then stands, or `expected`."""
        current = self._values.get(key)
        if current is None and expected:
            self._check_keys([key])
            return expected
        if current is None or current == expected:
            await self.set(key, desired)
            return desired
        return current

    async def delete(self, key: str) -> bool:
        """Remove a key; say whether it was there."""
        value = self._values.pop(key, None)
        self._total -= len(key.encode()) + len(value) if value is not None else 0
        return value is not None

    async def close(self) -> None:
        """End every wait: the job is over."""
        self._closed = True
        await self._notify()

    def _put(self, key: str, value: bytes) -> None:
        self._check_keys([key])
        if len(value) > self._limits.max_value_bytes:
            raise _exceeded(f"a value of {len(value):,} bytes", self._limits.max_value_bytes)
        old = self._values.get(key)
        grown = len(value) - len(old) if old is not None else len(value) + len(key.encode())
        if old is None and len(self._values) >= self._limits.max_keys:
            raise _exceeded("too many keys", self._limits.max_keys)
        if self._total + grown > self._limits.max_total_bytes:
            raise _exceeded("too many bytes in all", self._limits.max_total_bytes)
        self._values[key] = value
        self._total += grown

    def _check_keys(self, keys: Sequence[str]) -> None:
        if not 0 < len(keys) <= self._limits.max_keys_per_call:
            raise _exceeded(f"{len(keys)} keys in one call", self._limits.max_keys_per_call)
        longest = max(len(key.encode()) for key in keys)
        if longest > self._limits.max_key_bytes or not all(keys):
            raise _exceeded(f"a key of {longest:,} bytes, or an empty one", self._limits.max_key_bytes)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _exceeded(what: str, limit: int) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"the rendezvous does not take this: {what}",
        why=f"the limit is {limit:,}",
        todo="keep the rendezvous for addresses; send data with collectives or through sealed files",
    )
