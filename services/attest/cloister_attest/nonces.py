# SPDX-License-Identifier: Apache-2.0
"""Nonces of enrolments: given out once, taken once, forgotten soon. In memory: after a restart none is valid.

Their life is measured by elapsed time: a clock that is set back does not bring one back.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.protocol import NONCE_SIZE

_MAX_OUTSTANDING: Final = 20_000  # 2 MB; what the rate limit lets a few addresses draw within a minute


@dataclass(frozen=True, slots=True)
class Taken:
    """A nonce that was outstanding until now."""

    role: str
    age_s: float


class Nonces:
    """Outstanding nonces, oldest first. Safe from several threads."""

    def __init__(
        self, life: timedelta, elapsed_s: Callable[[], float] = time.monotonic, *, limit: int = _MAX_OUTSTANDING
    ) -> None:
        self._life_s = life.total_seconds()
        self._elapsed_s = elapsed_s
        self._limit = limit
        self._lock = threading.Lock()
        self._outstanding: dict[bytes, tuple[str, float]] = {}  # role, and when it was given

    def give(self, *, role: str) -> bytes:
        """Draw a nonce (32 bytes) for an enrolment in this role; raise CloisterError(RATE_LIMITED) at the limit."""
        nonce = secrets.token_bytes(NONCE_SIZE)
        with self._lock:
            now_s = self._elapsed_s()
            self._forget(now_s)
            if len(self._outstanding) >= self._limit:
                raise CloisterError(
                    Code.RATE_LIMITED,
                    what="too many enrolments have begun",
                    why=f"{self._limit} nonces are outstanding",
                    todo="try again in a minute",
                )
            self._outstanding[nonce] = (role, now_s)
        return nonce

    def take(self, nonce: bytes) -> Taken | None:
        """Take a nonce for good, whatever comes of the attempt; None when it is not outstanding."""
        with self._lock:
            found = self._outstanding.pop(nonce, None)
            return None if found is None else Taken(found[0], self._elapsed_s() - found[1])

    def _forget(self, now_s: float) -> None:
        while self._outstanding:
            oldest = next(iter(self._outstanding))
            if now_s - self._outstanding[oldest][1] < self._life_s:
                return
            del self._outstanding[oldest]
