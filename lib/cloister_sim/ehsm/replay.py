# SPDX-License-Identifier: Apache-2.0
"""Requests seen in the last twenty minutes, so that none counts twice. Pure: storage is somebody else's."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from cloister import ehsm
from cloister_sim.ehsm.wire import bad_request


@dataclass(frozen=True, slots=True)
class Seen:
    """What is remembered of an authentic request."""

    appid: str
    timestamp: str
    nonce: str  # "" when there was none
    sign: str
    arrived_ms: int


class ReplayWindow:
    """EHSM's rule, and one more.

    EHSM refuses a request when some earlier one had its nonce and some, not necessarily the same, had its timestamp;
    version 0.3.2 knows no nonces, and there the timestamp alone counts. And beyond EHSM: no signature counts twice.
    """

    def __init__(self, *, nonce_counts: bool = True) -> None:
        self._nonce_counts = nonce_counts
        self._order: deque[Seen] = deque()
        self._timestamps: Counter[tuple[str, str]] = Counter()
        self._nonces: Counter[tuple[str, str]] = Counter()
        self._signs: Counter[tuple[str, str]] = Counter()
        self._unsaved: list[Seen] = []

    def load(self, seen: Iterable[Seen]) -> None:
        """Remember requests of before, in the order in which they came."""
        for request in seen:
            self._add(request)

    def remember(self, request: Seen) -> None:
        """Remember an authentic request; raise Refused for one that cannot be told from one seen before."""
        self._forget(request.arrived_ms - ehsm.REPLAY_WINDOW_MS)
        known_time = self._timestamps[request.appid, request.timestamp]
        known_nonce = self._nonces[request.appid, request.nonce] or not self._nonce_counts
        if (known_time and known_nonce) or self._signs[request.appid, request.sign]:
            raise bad_request("Timestamp can't be repeated in 20 minutes")
        self._add(request)
        self._unsaved.append(request)

    def take_unsaved(self) -> list[Seen]:
        """Return what was remembered since the last call, for storage."""
        taken, self._unsaved = self._unsaved, []
        return taken

    def _add(self, request: Seen) -> None:
        self._order.append(request)
        for counter, key in self._keys(request):
            counter[key] += 1

    def _forget(self, before_ms: int) -> None:
        while self._order and self._order[0].arrived_ms < before_ms:
            for counter, key in self._keys(self._order.popleft()):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]

    def _keys(self, request: Seen) -> Iterable[tuple[Counter[tuple[str, str]], tuple[str, str]]]:
        yield self._timestamps, (request.appid, request.timestamp)
        yield self._nonces, (request.appid, request.nonce)
        yield self._signs, (request.appid, request.sign)
