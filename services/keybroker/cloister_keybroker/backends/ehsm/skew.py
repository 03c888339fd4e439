# SPDX-License-Identifier: Apache-2.0
"""The difference between EHSM's clock and this machine's: an alarm long before EHSM refuses everything for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from cloister import ehsm
from cloister.runtime.logging import get_logger

_REPEAT_S: Final = 600.0


class SkewWatch:
    """Remember the last difference, and warn of a large one every ten minutes."""

    def __init__(self, backend: str, alarm_s: float, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.last_s: float | None = None
        self._backend = backend
        self._alarm_s = alarm_s
        self._monotonic = monotonic
        self._warned_at: float | None = None

    def observe(self, skew_s: float | None) -> None:
        """Take the difference that an answer showed, in seconds that EHSM is ahead; None when it showed none."""
        if skew_s is None:
            return
        self.last_s = skew_s
        if abs(skew_s) < self._alarm_s:
            self._warned_at = None
            return
        now = self._monotonic()
        if self._warned_at is not None and now - self._warned_at < _REPEAT_S:
            return
        self._warned_at = now
        get_logger().warning(
            "clocks differ",
            backend=self._backend,
            ahead_s=round(skew_s),
            refused_at_s=ehsm.TIMESTAMP_WINDOW_MS // 1000,
        )
