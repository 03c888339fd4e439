# SPDX-License-Identifier: Apache-2.0
"""A circuit breaker: after some failures in a row nobody is sent to wait any more, until a probe gets through.

    closed --(THRESHOLD failures in a row)--> open --(pause over)--> probing --(probe good)--> closed
                                                ^---(probe failed, the pause doubles)---'

Pure: time is an argument, in seconds of a clock that only goes forward.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

THRESHOLD: Final = 5  # failures in a row
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0


@dataclass(slots=True)
class Breaker:
    """Say who may call."""

    threshold: int = THRESHOLD
    first_pause_s: float = FIRST_PAUSE_S
    longest_pause_s: float = LONGEST_PAUSE_S
    _failures: int = 0
    _pause_s: float = field(default=0.0)  # 0: closed
    _until_s: float = 0.0
    _probing: bool = False

    @property
    def is_open(self) -> bool:
        """Nobody but a probe may call."""
        return self._pause_s > 0

    def wait_s(self, now_s: float) -> float:
        """Return how long to the next probe."""
        return max(0.0, self._until_s - now_s) if self.is_open else 0.0

    def may_probe(self, now_s: float) -> bool:
        """Say whether it is time for a probe, and take that place: the probe must end in `succeeded` or `failed`."""
        if not self.is_open or self._probing or now_s < self._until_s:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """Record an answer, whatever it said."""
        self._failures = 0
        self._pause_s = 0.0
        self._probing = False

    def failed(self, now_s: float) -> bool:
        """Record that there was no answer; return True when this opened the circuit."""
        self._failures += 1
        if self.is_open:
            if self._probing:
                self._pause_s = min(2 * self._pause_s, self.longest_pause_s)
                self._until_s = now_s + self._pause_s
                self._probing = False
            return False
        if self._failures < self.threshold:
            return False
        self._pause_s = self.first_pause_s
        self._until_s = now_s + self._pause_s
        return True

    def gave_up_probe(self) -> None:
        """Record that a probe was broken off by its caller: the next one may probe at once."""
        self._probing = False
