# SPDX-License-Identifier: Apache-2.0
"""Nonces of BeginRelease and BeginImport: 32 bytes, once, for 60 seconds, for one caller and one use.

They live in memory: a restart forgets them, and callers begin again.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cloister.identity import SpiffeId
from cloister.protocol import NONCE_SIZE

LIFE: Final = timedelta(seconds=60)
MAX_PER_CALLER: Final = 64  # a rank opens a handful of directories at once; more is a broken or hostile caller
MAX_TOTAL: Final = 20_000  # about 10 MiB


@dataclass(frozen=True, slots=True)
class _Given:
    caller: SpiffeId
    use: Hashable  # what it may be used for, such as a key and a purpose
    expires: datetime


class NonceBook:
    """Give nonces out and take each back once. For one thread (the event loop)."""

    def __init__(self, random: Callable[[int], bytes] = secrets.token_bytes) -> None:
        self._random = random
        self._given: OrderedDict[bytes, _Given] = OrderedDict()  # oldest first, so expiry is at the front
        self._of_caller: dict[SpiffeId, OrderedDict[bytes, None]] = {}

    def give(self, caller: SpiffeId, use: Hashable, now: datetime) -> bytes:
        """Return a new nonce; when a caller or the book is full its oldest makes room."""
        while self._given:
            oldest = next(iter(self._given))
            if self._given[oldest].expires > now and len(self._given) < MAX_TOTAL:
                break
            self._remove(oldest)
        mine = self._of_caller.get(caller, OrderedDict())
        if len(mine) >= MAX_PER_CALLER:
            self._remove(next(iter(mine)))
        nonce = self._random(NONCE_SIZE)
        self._given[nonce] = _Given(caller, use, now + LIFE)
        self._of_caller.setdefault(caller, OrderedDict())[nonce] = None
        return nonce

    def take(self, nonce: bytes, caller: SpiffeId, use: Hashable, now: datetime) -> str:
        """Use a nonce up; return what is wrong with it, or nothing.

        Another caller's nonce is left alone, so that nobody can use up someone else's; one's own is gone after the
        first attempt, right or wrong.
        """
        given = self._given.get(nonce)
        if given is None or given.caller != caller:
            return "a nonce that was not given to this caller, or was used before"
        self._remove(nonce)
        if given.expires <= now:
            return "a nonce that has expired"
        if given.use != use:
            return "a nonce for another key or purpose"
        return ""

    def __len__(self) -> int:
        return len(self._given)

    def _remove(self, nonce: bytes) -> None:
        given = self._given.pop(nonce)
        mine = self._of_caller[given.caller]
        del mine[nonce]
        if not mine:
            del self._of_caller[given.caller]
