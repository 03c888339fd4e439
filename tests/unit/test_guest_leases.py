# SPDX-License-Identifier: Apache-2.0
"""Leases are renewed at half of their life; a refusal ends them at once, an outage only when they are over."""

from __future__ import annotations

import asyncio

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.leases import Held, Lease, Leases

DATA = Held("cloister-key://hospital-a/datasets/reviews", "train", 1)
MODEL = Held("cloister-key://hospital-a/models/reviews", "train", 2)
LENGTH = 0.08  # seconds
AWAY = CloisterError(Code.UNREACHABLE, what="nobody answers")
DENIED = CloisterError(
    Code.RELEASE_DENIED,
    what="not released: block workload.script",
    why="wanted one script; got another",
    todo="ask the owner",
    block="workload.script",
)


class Renewals:
    """Answers to renewals, one after the other; when they run out, `lasting` is granted."""

    def __init__(self, *answers: CloisterError | float, lasting: float = 3600.0) -> None:
        self._answers = list(answers)
        self._lasting = lasting
        self.asked: list[tuple[Held, float]] = []
        self.done = asyncio.Event()

    async def __call__(self, held: Held) -> Lease:
        now = asyncio.get_running_loop().time()
        self.asked.append((held, now))
        answer = self._answers.pop(0) if self._answers else self._lasting
        if isinstance(answer, CloisterError):
            raise answer
        if not self._answers:
            self.done.set()
        return Lease(now, answer)


def a_lease(length: float = LENGTH) -> Lease:
    return Lease(asyncio.get_running_loop().time(), length)


async def keeping(leases: Leases, until: asyncio.Event) -> None:
    """Keep leases until something happened; raise what ends them before."""
    keeper, happened = asyncio.create_task(leases.keep()), asyncio.create_task(until.wait())
    try:
        await asyncio.wait({keeper, happened}, return_when=asyncio.FIRST_COMPLETED, timeout=5)
        if keeper.done():
            keeper.result()
        assert until.is_set()
    finally:
        keeper.cancel()
        happened.cancel()
        await asyncio.gather(keeper, happened, return_exceptions=True)


async def ended(leases: Leases) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await asyncio.wait_for(leases.keep(), 5)
    assert caught.value.code is Code.LEASE_ENDED
    return caught.value


async def test_a_lease_is_renewed_at_half_of_its_life() -> None:
    renewals = Renewals(LENGTH, LENGTH, 3600.0)
    leases, begun = Leases(renewals), a_lease()
    leases.begin(DATA, begun)
    await keeping(leases, renewals.done)
    assert [held for held, _ in renewals.asked] == [DATA] * 3
    for n, (_, when) in enumerate(renewals.asked, 1):
        assert when - begun.begun >= n * LENGTH / 2 - 0.001


async def test_nothing_held_is_nothing_to_renew() -> None:
    renewals = Renewals()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Leases(renewals).keep(), 0.02)
    assert renewals.asked == []


async def test_what_is_released_later_is_kept_as_well() -> None:
    renewals = Renewals(LENGTH, LENGTH)
    leases = Leases(renewals)
    asyncio.get_running_loop().call_later(0.01, lambda: leases.begin(MODEL, a_lease()))
    await keeping(leases, renewals.done)
    assert [held for held, _ in renewals.asked] == [MODEL, MODEL]


async def test_each_thing_held_is_renewed_by_itself() -> None:
    renewals = Renewals(3600.0, 3600.0)
    leases = Leases(renewals)
    leases.begin(DATA, a_lease())
    leases.begin(MODEL, a_lease(LENGTH / 2))
    await keeping(leases, renewals.done)
    assert [held for held, _ in renewals.asked] == [MODEL, DATA]


async def test_a_second_release_counts_as_a_renewal() -> None:
    renewals = Renewals()
    leases = Leases(renewals)
    leases.begin(DATA, a_lease())
    leases.begin(DATA, a_lease(3600))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(leases.keep(), LENGTH)
    assert renewals.asked == []


@pytest.mark.parametrize("code", [Code.RELEASE_DENIED, Code.KEY_DISABLED, Code.APPROVALS_MISSING, Code.KEY_NOT_FOUND])
async def test_a_refusal_ends_a_lease_at_once(code: Code) -> None:
    renewals = Renewals(CloisterError(code, what="refused"))
    leases, begun = Leases(renewals), a_lease()
    leases.begin(DATA, begun)
    assert code.text in (await ended(leases)).why
    assert asyncio.get_running_loop().time() < begun.end
    assert len(renewals.asked) == 1


async def test_the_end_carries_the_brokers_explanation() -> None:
    leases = Leases(Renewals(DENIED))
    leases.begin(DATA, a_lease())
    error = await ended(leases)
    assert DATA.key_uri in error.what
    assert error.why == "CLO-1304: not released: block workload.script; wanted one script; got another"
    assert (error.todo, error.block) == ("ask the owner", "workload.script")


async def test_an_outage_is_sat_out() -> None:
    renewals = Renewals(AWAY, AWAY, 3600.0)
    leases = Leases(renewals)
    leases.begin(DATA, a_lease())
    await keeping(leases, renewals.done)
    assert len(renewals.asked) == 3


async def test_an_outage_that_outlasts_the_lease_ends_it() -> None:
    renewals = Renewals(*[AWAY] * 100)
    leases, begun = Leases(renewals), a_lease()
    leases.begin(DATA, begun)
    assert "nobody answers" in (await ended(leases)).why
    assert begun.end <= asyncio.get_running_loop().time() < begun.end + LENGTH
    assert 2 < len(renewals.asked) <= 17


async def test_an_answer_that_never_comes_ends_the_lease() -> None:
    async def never(_held: Held) -> Lease:
        await asyncio.Event().wait()
        raise AssertionError

    leases = Leases(never)
    leases.begin(DATA, a_lease())
    assert "no answer came" in (await ended(leases)).why


async def test_a_lease_that_is_over_before_it_can_be_renewed_ends() -> None:
    renewals = Renewals(AWAY)
    leases = Leases(renewals)
    leases.begin(DATA, Lease(asyncio.get_running_loop().time() - 2, 1))
    await ended(leases)


async def test_one_lease_that_ends_ends_all() -> None:
    renewals = Renewals(DENIED)
    leases = Leases(renewals)
    leases.begin(DATA, a_lease())
    leases.begin(MODEL, a_lease(3600))
    await ended(leases)
    assert len(asyncio.all_tasks()) == 1
