# SPDX-License-Identifier: Apache-2.0
"""When to ask a server again: after success, after failure, after "not here". Pure: times go in, times come out.

Expiry is a matter of wall-clock time, because documents say it so. Waiting is a matter of elapsed time: a clock that
is set back by a year must not make us wait for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cloister.collateral.failures import Failure, FetchFailed

# A fleet that fetched together must not refresh together, so the moment is drawn from this part of what is left.
REFRESH_FROM: Final = 0.50
REFRESH_TO: Final = 0.75
# Near its end a document would be asked for ever more often; not more often than this.
MIN_REFRESH: Final = timedelta(minutes=5)
WARNING: Final = timedelta(days=7)  # before a document expires: time enough to fill a PCCS by hand

NOT_FOUND_S: Final = 600.0  # "404" is believed this long: a new platform should work soon after its PCCS was filled
FIRST_RETRY_S: Final = 2.0
LAST_RETRY_S: Final = 900.0


def refresh_at(fetched_at: datetime, expires: datetime, jitter: float) -> datetime:
    """Return when to refresh a document; `jitter` is from 0 to 1."""
    fraction = REFRESH_FROM + (REFRESH_TO - REFRESH_FROM) * jitter
    return fetched_at + max((expires - fetched_at) * fraction, MIN_REFRESH)


@dataclass(frozen=True, slots=True)
class Hold:
    """No request before `until` (seconds of the monotonic clock); until then the failure is the answer."""

    failed: FetchFailed
    failures: int  # in a row
    until: float

    def active(self, now_s: float) -> bool:
        return now_s < self.until


def hold_after(failed: FetchFailed, previous: Hold | None, now_s: float, jitter: float) -> Hold:
    """Return how long to leave a URL alone after this failure; `jitter` is from 0 to 1."""
    failures = 1 if previous is None else previous.failures + 1
    # A copy: the exception itself would keep every frame that it went through, and what was received there.
    failed = FetchFailed(failed.failure, failed.reason, retry_after=failed.retry_after)
    if failed.failure is Failure.NOT_FOUND:
        return Hold(failed, failures, now_s + NOT_FOUND_S)
    # Exponential, and at least half of it, so that a fleet comes back spread out.
    longest = min(FIRST_RETRY_S * 2 ** min(failures - 1, 16), LAST_RETRY_S)
    wait_s = longest * (0.5 + 0.5 * jitter)
    if failed.retry_after is not None:
        wait_s = max(wait_s, failed.retry_after.total_seconds())
    return Hold(failed, failures, now_s + wait_s)
