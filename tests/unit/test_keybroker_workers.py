# SPDX-License-Identifier: Apache-2.0
"""Calls that block: a store that hangs costs its deadline, holds nobody else up, and lets the process end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from cloister.errors import CloisterError, Code
from cloister_keybroker.backends.workers import Threads, Workers


@pytest.fixture
def one_thread() -> Iterator[Threads]:
    threads = Threads("one", 1)
    yield threads
    threads.close()


async def test_a_call_that_hangs_ends_at_the_deadline_and_others_do_not_pile_up_behind_it(one_thread: Threads) -> None:
    release = threading.Event()
    workers = Workers("slow", one_thread, limit=2, deadline_s=0.05)
    hanging = asyncio.ensure_future(workers.run(release.wait))
    waiting = asyncio.ensure_future(workers.run(lambda: "never begun"))
    await asyncio.sleep(0)
    with pytest.raises(CloisterError) as busy:
        await workers.run(lambda: "too many")
    assert busy.value.code is Code.CUSTODIAN_BUSY
    for late in (hanging, waiting):
        with pytest.raises(CloisterError) as caught:
            await late
        assert caught.value.code is Code.CUSTODIAN_UNAVAILABLE
    release.set()
    recovered = Workers("slow", one_thread, limit=2, deadline_s=5)
    assert await recovered.run(lambda: "here again") == "here again"


async def test_what_a_call_raises_comes_back_and_the_thread_goes_on(one_thread: Threads) -> None:
    workers = Workers("one", one_thread, limit=2, deadline_s=5)
    with pytest.raises(ZeroDivisionError):
        await workers.run(lambda: 1 // 0)
    assert await workers.run(threading.get_ident) == await workers.run(threading.get_ident)


async def test_there_are_no_more_threads_than_were_asked_for() -> None:
    threads = Threads("several", 3)
    workers = Workers("several", threads, limit=100, deadline_s=5)
    assert 1 <= len(set(await asyncio.gather(*(workers.run(threading.get_ident) for _ in range(60))))) <= 3
    threads.close()


def test_a_call_that_never_returns_does_not_keep_the_process_from_ending() -> None:
    program = (
        "import threading\n"
        "from cloister_keybroker.backends.workers import Threads\n"
        "begun = threading.Event()\n"
        "Threads('stuck', 1).submit(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)
