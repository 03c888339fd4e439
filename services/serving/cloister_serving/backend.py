# SPDX-License-Identifier: Apache-2.0
"""The gateway's side of one backend: start its agent, follow its reports, load the worker, notice its end at once."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger
from cloister_serving import reports
from cloister_serving.agent import MODEL_DIRECTORY, READY_BYTE, AgentSpec
from cloister_serving.pinning import check_pinned
from cloister_serving.reports import Failed, Milestone, Reached, WorkerStarted
from cloister_serving.stockworker import SOCKET_NAME
from cloister_serving.worker import Worker, WorkerLimits

_T = TypeVar("_T")
_STOP_S: Final = 8.0  # the agent kills its worker at once and ends itself after 5 s at the latest
# An interpreter with torch takes seconds to end on a crowded machine; only then does the agent know the reason.
_REASON_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class BackendLimits:
    """How long a deployment may take."""

    # Importing torch and transformers takes 5 s of a quiet core and ten times that of a crowded one.
    load_s: float = 120.0
    worker: WorkerLimits = field(default_factory=WorkerLimits)


class RunningBackend(Protocol):
    """What the gateway needs of a backend, however it runs."""

    @property
    def process_id(self) -> int: ...

    @property
    def timings_s(self) -> dict[str, float]: ...

    async def start(self) -> None:
        """Return when the model answers; raise CloisterError with the reason when it never will."""

    async def predict(self, body: bytes, *, request_id: str, deadline: float) -> bytes: ...

    async def stop(self) -> None:
        """End every process of it and remove its directory."""


class AgentBackend:
    """A backend under an agent of its own. `on_down` is called once, with a line, when a ready one ends unasked."""

    def __init__(
        self,
        spec: AgentSpec,
        handler_name: str,
        *,
        log_path: Path,
        on_down: Callable[[str], None],
        limits: BackendLimits | None = None,
    ) -> None:
        self._spec = spec
        self._handler_name = handler_name
        self._log_path = log_path
        self._on_down = on_down
        self._limits = limits or BackendLimits()
        self._timings: dict[str, float] = {}
        self._agent: subprocess.Popen[bytes] | None = None
        self._lifeline = -1
        self._worker: Worker | None = None
        self._ready = self._stopping = False
        loop = asyncio.get_running_loop()
        self._started_at = loop.time()
        self._pid: asyncio.Future[int] = loop.create_future()
        self._key_released = asyncio.Event()
        self._failed: asyncio.Future[CloisterError] = loop.create_future()
        self._reading: asyncio.Task[None] | None = None

    @property
    def process_id(self) -> int:
        """The worker's; 0 before it was started."""
        return self._pid.result() if self._pid.done() and not self._pid.cancelled() else 0

    @property
    def timings_s(self) -> dict[str, float]:
        return dict(self._timings)

    async def start(self) -> None:
        """Return when the model answers; raise CloisterError with the reason when it never will."""
        self._started_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._limits.load_s):
                await self._start_agent()
                await self._load()
        except TimeoutError:
            raise CloisterError(
                Code.MODEL_LOAD_FAILED,
                what=f"the model {self._spec.model} did not become ready",
                why=f"{self._limits.load_s:g} s were not enough; it reached: {', '.join(self._timings) or 'nothing'}",
                todo="deploy it again when the machine is less busy",
            ) from None
        self._ready = True
        if self._failed.done():
            raise self._failed.result()
        self._reach(Milestone.READY)
        with contextlib.suppress(BrokenPipeError):  # then the agent is ending, and its report is on the way
            os.write(self._lifeline, READY_BYTE)

    async def predict(self, body: bytes, *, request_id: str, deadline: float) -> bytes:
        """Run one request; errors are those of `Worker.predict`."""
        if self._worker is None:
            raise RuntimeError("the backend was not started")
        return await self._worker.predict(body, request_id=request_id, deadline=deadline)

    async def stop(self) -> None:
        """End every process of it and remove its directory."""
        self._stopping = True
        if self._worker is not None:
            self._worker.abort("the model was removed")
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        if self._agent is not None:
            try:
                await asyncio.wait_for(_exited(self._agent), _STOP_S)
            except TimeoutError:
                self._agent.kill()  # the worker dies with it
            await asyncio.to_thread(self._agent.wait)
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)
        await asyncio.to_thread(shutil.rmtree, self._spec.directory, ignore_errors=True)

    async def _start_agent(self) -> None:
        directory = self._spec.directory
        directory.mkdir(mode=0o700, parents=True)
        spec_path = directory / "agent.json"
        write_atomically(spec_path, self._spec.model_dump_json().encode())
        report_read, report_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["--spec", str(spec_path), "--report-fd", str(report_write), "--lifeline-fd", str(lifeline_read)]
        try:
            with self._log_path.open("ab") as log:
                # Not through the event loop: uvloop forks, and a fork runs gRPC's handlers, which may abort the child
                # while calls are in flight. This one is a vfork, which runs none.
                self._agent = subprocess.Popen(  # noqa: ASYNC220
                    [sys.executable, "-P", "-m", "cloister_serving.agent", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(report_write, lifeline_read),
                    start_new_session=True,
                )
        finally:
            os.close(report_write)
            os.close(lifeline_read)
            self._reading = asyncio.create_task(self._follow(report_read))

    async def _load(self) -> None:
        pid = await self._unless_failed(self._pid)
        worker = await self._unless_failed(
            Worker.connect(
                self._spec.directory,
                SOCKET_NAME,
                pid=pid,
                timeout_s=self._limits.load_s,
                on_down=self._worker_down,
                limits=self._limits.worker,
            )
        )
        self._worker = worker
        await self._unless_failed(self._key_released.wait())
        try:
            await worker.load(
                name=self._spec.model,
                path=str(self._spec.directory / MODEL_DIRECTORY),
                handler=self._handler_name,
                timeout_s=self._limits.load_s,
            )
        except CloisterError:
            # The worker only says that it failed; the agent saw the exception.
            await asyncio.wait({self._failed}, timeout=_REASON_S)
            if self._failed.done():
                raise self._failed.result() from None
            raise
        # Every thread there is by now, torch's included.
        check_pinned(pid, self._spec.cores, what=f"the backend of model {self._spec.model}")

    async def _unless_failed(self, awaited: Awaitable[_T]) -> _T:
        """Wait for something, or raise the agent's failure, whichever comes first."""
        task = asyncio.ensure_future(awaited)
        try:
            both: set[asyncio.Future[Any]] = {task, self._failed}
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done() and not task.done():
                raise self._failed.result()
            return await task
        finally:
            if not task.done():
                task.cancel()

    async def _follow(self, descriptor: int) -> None:
        """Read the agent's reports until its end; whatever is not a report ends the backend as well."""
        reader = asyncio.StreamReader(limit=reports.MAX_LINE)
        pipe = os.fdopen(descriptor, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), pipe
        )
        why = "its agent ended unexpectedly"
        try:
            while line := await reader.readline():
                self._take(reports.decode(line))
        except ValueError:
            why = "its agent sent a report that cannot be read"
        finally:
            transport.close()
        self._end(
            CloisterError(
                Code.MODEL_LOAD_FAILED,
                what=f"the backend of model {self._spec.model} ended",
                why=why,
                todo="look at the backend's log, and deploy the model again",
            )
        )

    def _take(self, report: reports.Report) -> None:
        match report:
            case Reached(milestone):
                self._reach(milestone)
                if milestone is Milestone.KEY_RELEASED:
                    self._key_released.set()
            case WorkerStarted(pid):
                if not self._pid.done():
                    self._pid.set_result(pid)
            case Failed(error):
                self._end(error)

    def _reach(self, milestone: Milestone) -> None:
        self._timings[milestone] = round(asyncio.get_running_loop().time() - self._started_at, 3)
        get_logger().info("backend milestone", model=self._spec.model, tenant=self._spec.tenant, milestone=milestone)

    def _worker_down(self, reason: str) -> None:
        if self._ready:
            self._down(reason)

    def _end(self, error: CloisterError) -> None:
        if not self._failed.done():
            self._failed.set_result(error)
        if self._worker is not None:
            self._worker.abort(error.why)
        if self._ready:
            self._down(error.why)

    def _down(self, reason: str) -> None:
        if not self._stopping:
            self._stopping = True
            self._on_down(reason)


async def _exited(process: subprocess.Popen[bytes]) -> None:
    """Wait until a child has ended, without reaping it."""
    if process.poll() is not None:
        return
    descriptor, ended = os.pidfd_open(process.pid), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
