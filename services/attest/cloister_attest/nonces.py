# SPDX-License-Identifier: Apache-2.0
"""Nonces of enrolments: given out once, taken once, forgotten soon. In memory: after a restart none is valid."""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.protocol import NONCE_SIZE

_MAX_OUTSTANDING: Final = 20_000  # 2 MB; what the rate limit lets a few addresses draw within a minute


@dataclass(frozen=True, slots=True)
class Taken:
    """A nonce that was outstanding until now."""

    role: str
    expires_at: datetime


class Nonces:
    """Outstanding nonces, oldest first. Safe from several threads."""

    def __init__(self, life: timedelta, *, limit: int = _MAX_OUTSTANDING) -> None:
        self._life = life
        self._limit = limit
        self._lock = threading.Lock()
        self._outstanding: dict[bytes, Taken] = {}

    def give(self, *, role: str, now: datetime) -> bytes:
        """Draw a nonce (32 bytes) for an enrolment in this role; raise CloisterError(RATE_LIMITED) at the limit."""
        nonce = secrets.token_bytes(NONCE_SIZE)
        with self._lock:
            self._forget(now)
            if len(self._outstanding) >= self._limit:
                raise CloisterError(
                    Code.RATE_LIMITED,
                    what="too many enrolments have begun",
                    why=f"{self._limit} nonces are outstanding",
                    todo="try again in a minute",
                )
            self._outstanding[nonce] = Taken(role, now + self._life)
        return nonce

    def take(self, nonce: bytes) -> Taken | None:
        """Take a nonce for good, whatever comes of the attempt; None when it is not outstanding."""
        with self._lock:
            return self._outstanding.pop(nonce, None)

    def _forget(self, now: datetime) -> None:
        while self._outstanding:
            oldest = next(iter(self._outstanding))
            if self._outstanding[oldest].expires_at > now:
                return
            del self._outstanding[oldest]
