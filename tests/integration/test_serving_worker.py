# SPDX-License-Identifier: Apache-2.0
"""The stock TorchServe worker, driven directly: what it answers, and how it fails."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister_serving.worker import WorkerLimits
from fakes.serving_harness import StartedWorker, running_worker


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[StartedWorker]:
    async with running_worker(tmp_path / "run") as started:
        yield started


async def predict(started: StartedWorker, *, within_s: float = 30, request_id: str = "r", **request: Any) -> Any:
    deadline = asyncio.get_running_loop().time() + within_s
    return json.loads(
        await started.worker.predict(json.dumps(request).encode(), request_id=request_id, deadline=deadline)
    )


def hold(directory: Path) -> tuple[Path, dict[str, str]]:
    """A request that stays in the handler until the returned FIFO was opened for writing."""
    fifo = directory / "held"
    os.mkfifo(fifo)
    return fifo, {"wait_for": str(fifo)}


async def has_started(fifo: Path) -> None:
    while not Path(f"{fifo}.started").exists():
        await asyncio.sleep(0.01)


def let_go(fifo: Path) -> None:
    fifo.write_text("")


async def test_a_loaded_worker_answers(started: StartedWorker) -> None:
    assert await predict(started, echo="很好") == {"calls": 1, "pid": started.process.pid, "echo": "很好"}


async def test_requests_at_the_same_time_get_their_own_answers(started: StartedWorker) -> None:
    answers = await asyncio.gather(*(predict(started, request_id=f"r{i}", echo=i) for i in range(30)))
    assert [answer["echo"] for answer in answers] == list(range(30))


async def test_an_exception_in_the_handler_is_its_own_and_the_next_request_is_answered(started: StartedWorker) -> None:
    with pytest.raises(CloisterError) as caught:
        await predict(started, fail=True)
    assert caught.value.code is Code.PREDICTION_FAILED
    assert "secret" not in str(caught.value)
    assert (await predict(started))["calls"] == 2


async def test_what_a_handler_prints_controls_nothing(started: StartedWorker) -> None:
    assert (await predict(started, lie=True))["pid"] == started.process.pid
    assert (await predict(started))["calls"] == 2


async def test_a_killed_worker_fails_the_request_in_flight_and_all_that_wait(started: StartedWorker) -> None:
    fifo, request = hold(started.directory)
    running = asyncio.create_task(predict(started, **request))
    queued = asyncio.create_task(predict(started))
    await has_started(fifo)
    os.kill(started.process.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        for outcome in await asyncio.gather(running, queued, return_exceptions=True):
            assert isinstance(outcome, CloisterError)
            assert outcome.code is Code.BACKEND_DOWN
        await started.down.wait()
    with pytest.raises(CloisterError) as caught:
        await predict(started)
    assert caught.value.code is Code.BACKEND_DOWN


async def test_an_idle_workers_death_is_noticed_without_a_request(started: StartedWorker) -> None:
    os.kill(started.process.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        await started.down.wait()
    assert started.worker.down_reason == "the worker ended"


async def test_a_request_that_expires_in_the_queue_is_never_run(started: StartedWorker) -> None:
    fifo, request = hold(started.directory)
    running = asyncio.create_task(predict(started, **request))
    await has_started(fifo)
    with pytest.raises(CloisterError) as caught:
        await predict(started, within_s=0.05)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert "was not run" in caught.value.why
    let_go(fifo)
    assert (await running)["calls"] == 1
    assert (await predict(started))["calls"] == 2


async def test_a_request_that_expires_while_running_leaves_the_worker_usable(started: StartedWorker) -> None:
    fifo, request = hold(started.directory)
    with pytest.raises(CloisterError) as caught:
        await predict(started, within_s=0.05, **request)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await has_started(fifo)
    waiting = asyncio.create_task(predict(started, request_id="next", echo="next"))
    let_go(fifo)
    assert (await waiting)["echo"] == "next"


async def test_a_cancelled_caller_does_not_let_a_second_batch_in(started: StartedWorker) -> None:
    fifo, request = hold(started.directory)
    leaving = asyncio.create_task(predict(started, **request))
    await has_started(fifo)
    leaving.cancel()
    await asyncio.wait({leaving})
    after = asyncio.create_task(predict(started, request_id="after", echo="after"))
    let_go(fifo)
    assert await after == {"calls": 2, "pid": started.process.pid, "echo": "after"}


async def test_the_queue_has_an_end(tmp_path: Path) -> None:
    async with running_worker(tmp_path / "run", limits=WorkerLimits(waiting=1)) as started:
        fifo, request = hold(started.directory)
        admitted = [asyncio.create_task(predict(started, **request)), asyncio.create_task(predict(started))]
        await has_started(fifo)
        with pytest.raises(CloisterError) as caught:
            await predict(started)
        assert caught.value.code is Code.RATE_LIMITED
        let_go(fifo)
        await asyncio.gather(*admitted)


async def test_a_handler_that_hangs_is_given_up(tmp_path: Path) -> None:
    async with running_worker(tmp_path / "run", limits=WorkerLimits(hang_s=0.1)) as started:
        _, request = hold(started.directory)
        with pytest.raises(CloisterError) as caught:
            await predict(started, **request)
        assert caught.value.code is Code.BACKEND_DOWN
        assert "ran for 0.1 s" in caught.value.why


async def test_a_handler_that_cannot_load_says_why(tmp_path: Path) -> None:
    broken = (
        b"class H:\n  def initialize(self, c): raise ValueError('no such vocabulary')\n  def handle(self, d, c): pass\n"
    )
    async with running_worker(tmp_path / "run", broken, loaded=False) as started:
        with pytest.raises(CloisterError) as caught:
            await started.worker.load(name="m", path=".", handler="handler_under_test.py", timeout_s=60)
        assert caught.value.code is Code.MODEL_LOAD_FAILED
        await started.process.wait()
        async with asyncio.timeout(5):
            while not started.tail.last_exception():
                await asyncio.sleep(0.01)
        assert started.tail.last_exception() == "ValueError: no such vocabulary"


async def test_a_worker_has_no_environment_but_the_listed_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "marker-3f1c")
    async with running_worker(tmp_path / "run") as started:
        environ = Path(f"/proc/{started.process.pid}/environ").read_bytes()
    assert b"marker-3f1c" not in environ
    assert b"TS_DECODE_INPUT_REQUEST=false" in environ
