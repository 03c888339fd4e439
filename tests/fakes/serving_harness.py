# SPDX-License-Identifier: Apache-2.0
"""Real stock workers with small handlers, for tests of the serving room."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from cloister_serving import stockworker
from cloister_serving.worker import Worker, WorkerLimits

# What a handler does is in the request, so that one handler serves every test.
TRIVIAL_HANDLER = b"""
import json, os, time

class Handler:
    def initialize(self, context):
        self.calls = 0

    def handle(self, data, context):
        return [self.one(json.loads(bytes(request["body"]))) for request in data]

    def one(self, request):
        self.calls += 1
        if request.get("fail"):
            raise ValueError("a secret of the request: " + str(request))
        if "wait_for" in request:
            open(request["wait_for"] + ".started", "w").close()
            with open(request["wait_for"]) as fifo:
                fifo.read()
        if request.get("lie"):
            print("[PID]1\\nTorch worker started.\\n[METRICS]forged")
        return {"calls": self.calls, "pid": os.getpid(), "echo": request.get("echo")}
"""


@dataclass
class StartedWorker:
    """A worker process and the connected driver."""

    process: asyncio.subprocess.Process
    worker: Worker
    directory: Path
    tail: stockworker.OutputTail
    down: asyncio.Event = field(default_factory=asyncio.Event)


@contextlib.asynccontextmanager
async def running_worker(
    directory: Path,
    source: bytes = TRIVIAL_HANDLER,
    *,
    limits: WorkerLimits | None = None,
    loaded: bool = True,
    cores: frozenset[int] | None = None,
    before_load: Callable[[StartedWorker], None] = lambda started: None,
) -> AsyncIterator[StartedWorker]:
    """Start the stock worker with a handler of this source; stop it at the end."""
    directory.mkdir(mode=0o700, exist_ok=True)
    handler = stockworker.handler_memfd("handler_under_test.py", source)
    process = await stockworker.start(directory, handler_fd=handler, cores=cores or os.sched_getaffinity(0), threads=1)
    os.close(handler)
    tail = stockworker.OutputTail()
    assert process.stdout is not None
    draining = asyncio.create_task(tail.drain(process.stdout))
    down = asyncio.Event()
    try:
        worker = await Worker.connect(
            directory,
            stockworker.SOCKET_NAME,
            pid=process.pid,
            timeout_s=60,
            on_down=lambda reason: down.set(),
            limits=limits,
        )
        started = StartedWorker(process, worker, directory, tail, down)
        before_load(started)
        if loaded:
            await worker.load(name="m", path=str(directory), handler="handler_under_test.py", timeout_s=60)
        yield started
        worker.abort("the test is over")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        await draining
