# SPDX-License-Identifier: Apache-2.0
"""The key space of a job: waits end when keys come or the job ends, and nothing grows without bound."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from cloister.errors import CloisterError, Code
from cloister_trainer.rendezvous import KeySpace, RendezvousLimits

SMALL = RendezvousLimits(
    max_key_bytes=8, max_value_bytes=16, max_keys=3, max_total_bytes=40, max_keys_per_call=2, max_waiting=2
)


async def test_a_get_returns_when_the_key_comes() -> None:
    space = KeySpace()
    waiting = asyncio.create_task(space.get("addr/0"))
    await asyncio.sleep(0)
    await space.set("other", b"x")
    assert not waiting.done()
    await space.set("addr/0", b"127.0.0.1")
    assert await waiting == b"127.0.0.1"


async def test_the_end_of_the_job_ends_every_wait() -> None:
    space = KeySpace()
    waiting = asyncio.create_task(space.wait(["never"]))
    await asyncio.sleep(0)
    await space.close()
    with pytest.raises(CloisterError) as caught:
        await waiting
    assert caught.value.code is Code.JOB_ENDED


async def test_numbers_add_up_and_text_is_no_number() -> None:
    space = KeySpace()
    assert await space.add("n", 5) == 5
    assert await space.add("n", -7) == -2
    await space.set("text", b"abc")
    for key, amount in (("text", 1), ("n", -(2**63))):
        with pytest.raises(CloisterError, match="number of 64 bits"):
            await space.add(key, amount)


async def test_compare_set_changes_only_what_is_expected() -> None:
    space = KeySpace()
    assert await space.compare_set("k", b"old", b"new") == b"old"
    assert not await space.check(["k"])
    assert await space.compare_set("k", b"", b"first") == b"first"
    assert await space.compare_set("k", b"wrong", b"x") == b"first"
    assert await space.compare_set("k", b"first", b"second") == b"second"


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.set("", b"x"),
        lambda s: s.set("k" * 9, b"x"),
        lambda s: s.set("k", b"x" * 17),
        lambda s: s.wait(["a", "b", "c"]),
        lambda s: s.wait([]),
        lambda s: s.check(["k" * 9]),
        lambda s: s.compare_set("k" * 9, b"x", b"y"),
    ],
)
async def test_what_is_too_large_is_refused(call: Callable[[KeySpace], Awaitable[object]]) -> None:
    with pytest.raises(CloisterError) as caught:
        await call(KeySpace(SMALL))
    assert caught.value.code is Code.ARGUMENT_INVALID


async def test_the_number_of_keys_and_bytes_is_bounded_and_deleting_makes_room() -> None:
    space = KeySpace(SMALL)
    for key in "ab":
        await space.set(key, b"x" * 16)
    with pytest.raises(CloisterError, match="too many bytes"):
        await space.set("c", b"x" * 16)
    await space.set("c", b"")
    with pytest.raises(CloisterError, match="too many keys"):
        await space.set("d", b"")
    assert await space.delete("a")
    await space.set("d", b"x" * 16)
    # Writing a key again counts once.
    for _ in range(5):
        await space.set("d", b"y" * 16)


async def test_no_more_calls_wait_than_the_limit() -> None:
    space = KeySpace(SMALL)
    waiting = [asyncio.create_task(space.get("k")) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(CloisterError, match="too many calls wait"):
        await space.get("k")
    await space.set("k", b"v")
    assert await asyncio.gather(*waiting) == [b"v", b"v"]
    assert await space.get("k") == b"v"
