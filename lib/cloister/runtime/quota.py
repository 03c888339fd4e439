# SPDX-License-Identifier: Apache-2.0
"""What one identity may ask of a server: calls a second, and calls at once. Neighbours do not wait for a greedy one."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Code

_MAX_IDLE: Final = 4096  # identities that have nothing in flight; the longest unseen is forgotten first


@dataclass(slots=True)
class _Account:
    left: float  # calls that may be made now
    since_s: float
    inside: int = 0


class IdentityQuota:
    """Each identity may make `burst` calls at once, earns `per_s` a second, and has `at_once` in flight at most.

    For one thread (the event loop).
    """

    def __init__(
        self, *, per_s: float, burst: int, at_once: int, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._at_once = at_once
        self._clock_s = clock_s
        self._accounts: OrderedDict[str, _Account] = OrderedDict()

    @contextmanager
    def admitted(self, identity: str) -> Iterator[None]:
        """Count a call of this identity for the time of the block; raise CloisterError(RATE_LIMITED)."""
        account = self._account(identity)
        if account.left < 1.0:
            raise _refused(f"{identity} may make {self._per_s:g} calls a second, and {self._burst:g} at a time")
        if account.inside >= self._at_once:
            raise _refused(f"{identity} has {account.inside} calls in flight, and no more are taken")
        account.left -= 1.0
        account.inside += 1
        try:
            yield
        finally:
            account.inside -= 1

    def __len__(self) -> int:
        return len(self._accounts)

    def _account(self, identity: str) -> _Account:
        now = self._clock_s()
        account = self._accounts.pop(identity, None) or _Account(self._burst, now)
        account.left = min(self._burst, account.left + (now - account.since_s) * self._per_s)
        account.since_s = now
        self._accounts[identity] = account
        if len(self._accounts) > _MAX_IDLE:
            idle = next((name for name, found in self._accounts.items() if not found.inside), None)
            if idle is not None:
                del self._accounts[idle]
        return account


def _refused(why: str) -> CloisterError:
    return CloisterError(Code.RATE_LIMITED, what="too many calls", why=why, todo="wait a moment and try again")
