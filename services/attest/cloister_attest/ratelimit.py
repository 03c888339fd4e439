# SPDX-License-Identifier: Apache-2.0
"""A token bucket per address with a short queue, for callers that have no identity yet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from cloister.errors import CloisterError, Code

_MAX_ADDRESSES: Final = 4096  # the longest unseen is forgotten first
_MAX_WAIT_S: Final = 1.0  # bounds how many calls of an address wait: what it earns in that time


class RateLimit:
    """Each address may spend `burst` calls at once and earns `per_s` a second; a few calls ahead of that wait."""

    def __init__(self, *, per_s: float, burst: int, clock_s: Callable[[], float]) -> None:
        self._per_s = per_s
        self._burst = float(burst)
        self._clock_s = clock_s
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: (calls left, at time)

    def spend(self, address: str) -> float:
        """Count a call of this address; raise CloisterError(RATE_LIMITED).

        Return the seconds after which it may be answered. Whoever calls again as soon as it is answered is slowed down
        by that to what it earns, at no cost; refusing it as often as it calls would cost more than serving it.
        """
        now = self._clock_s()
        left, since = self._buckets.pop(address, (self._burst, now))
        left = min(self._burst, left + (now - since) * self._per_s)
        wait_s = max(0.0, 1.0 - left) / self._per_s
        allowed = wait_s <= _MAX_WAIT_S
        self._buckets[address] = (left - 1.0 if allowed else left, now)
        if len(self._buckets) > _MAX_ADDRESSES:
            self._buckets.popitem(last=False)
        if not allowed:
            raise CloisterError(
                Code.RATE_LIMITED,
                what="too many calls from this address",
                why=f"an address may make {self._per_s:g} calls a second before it has an identity",
                todo="wait a moment and try again",
            )
        return wait_s
