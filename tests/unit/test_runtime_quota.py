# SPDX-License-Identifier: Apache-2.0
"""What one identity may ask of a server, and that another's greed is not its business."""

from __future__ import annotations

import pytest

from cloister.errors import CloisterError, Code
from cloister.runtime.quota import IdentityQuota


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def call(quota: IdentityQuota, identity: str = "ada") -> bool:
    try:
        with quota.admitted(identity):
            return True
    except CloisterError as error:
        return error.code is not Code.RATE_LIMITED


def test_an_identity_may_make_its_burst_and_then_what_it_earns() -> None:
    clock = Clock()
    quota = IdentityQuota(per_s=2, burst=5, at_once=10, clock_s=clock)
    assert [call(quota) for _ in range(7)] == [True] * 5 + [False] * 2
    clock.now_s += 0.4
    assert not call(quota)
    clock.now_s += 0.1
    assert [call(quota), call(quota)] == [True, False]
    clock.now_s += 3600
    assert [call(quota) for _ in range(6)] == [True] * 5 + [False]


def test_a_refused_call_costs_nothing() -> None:
    clock = Clock()
    quota = IdentityQuota(per_s=1, burst=1, at_once=10, clock_s=clock)
    assert call(quota)
    for _ in range(100):
        assert not call(quota)
    clock.now_s += 1
    assert call(quota)


def test_another_identity_does_not_wait_for_a_greedy_one() -> None:
    quota = IdentityQuota(per_s=1, burst=2, at_once=1, clock_s=Clock())
    assert [call(quota, "eve") for _ in range(5)] == [True, True, False, False, False]
    assert call(quota, "ada")


def test_calls_in_flight_are_counted_until_they_end_however_they_end() -> None:
    quota = IdentityQuota(per_s=1, burst=100, at_once=2, clock_s=Clock())
    with quota.admitted("ada"), quota.admitted("ada"):
        assert not call(quota)
        assert call(quota, "grace")
    with pytest.raises(KeyError), quota.admitted("ada"):
        raise KeyError
    with quota.admitted("ada"), quota.admitted("ada"):
        assert not call(quota)


def test_what_is_remembered_is_bounded_and_whoever_is_inside_stays() -> None:
    quota = IdentityQuota(per_s=1, burst=2, at_once=1, clock_s=Clock())
    with quota.admitted("ada"):
        for number in range(10_000):
            assert call(quota, f"rank-{number}")
        assert len(quota) <= 4097
        assert not call(quota, "ada")
