# SPDX-License-Identifier: Apache-2.0
"""Start the supervisor process of a stack and follow what it reports."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, Self

from cloister.cli.stackconfig import StackOptions
from cloister.cli.state import StateDirectory
from cloister.errors import CloisterError, Code, code_from_text

_STOP_TIMEOUT_S: Final = 20.0
RELEASE: Final = b"release\n"  # on the lifeline: its end means nothing any more

Event = dict[str, Any]


class StackProcess:
    """A supervisor process. It ends when this process does, until `release` lets it go on by itself."""

    def __init__(self, process: asyncio.subprocess.Process, reports: asyncio.StreamReader, lifeline: int) -> None:
        self._process = process
        self._reports = reports
        self._lifeline = lifeline

    @classmethod
    async def start(cls, state: StateDirectory, options: StackOptions) -> Self:
        """Start it; `ready()` waits for the stack. Raises CloisterError when one runs already, or a port is taken."""
        state.create()
        state.lock().close()
        refuse_taken_ports(options)
        report_read, report_write = os.pipe2(os.O_CLOEXEC)
        lifeline_read, lifeline = os.pipe2(os.O_CLOEXEC)
        passed = [report_write, lifeline_read]
        arguments = ["--state", str(state.root), "--options", json.dumps(asdict(options))]
        arguments += ["--report-fd", str(report_write), "--lifeline-fd", str(lifeline_read)]
        with (state.logs / "stack.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",  # nothing of the directory it is started in may stand in for a module
                "-m",
                "cloister.cli.stackd",
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=passed,
                # A session of its own: Ctrl-C at the terminal reaches this command only, which then ends it in order.
                start_new_session=True,
            )
        for descriptor in passed:
            os.close(descriptor)
        reports = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reports), os.fdopen(report_read, "rb")
        )
        return cls(process, reports, lifeline)

    async def ready(self, on_event: Callable[[Event], None]) -> float:
        """Wait until the stack is up, giving every report to `on_event`; return the seconds it took."""
        async for event in self._events():
            on_event(event)
            if event["event"] == "ready":
                return float(event["seconds"])
        raise await self._silent_end()

    async def failed(self) -> CloisterError | None:
        """Wait until the stack ends; return why, or None when it was told to."""
        try:
            async for _ in self._events():
                pass
        except CloisterError as error:
            return error
        if await self._process.wait():
            return await self._silent_end()
        return None

    def release(self) -> None:
        """Let the stack go on when this process ends; `cloister dev down` stops it then."""
        os.write(self._lifeline, RELEASE)

    async def stop(self) -> None:
        """End the stack and everything in it; returns when nothing of it is left."""
        if self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT_S)
            except TimeoutError:
                # Lifelines end its children.
                self._process.kill()
                await self._process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    async def _events(self) -> Any:
        while line := await self._reports.readline():
            event: Event = json.loads(line)
            if event["event"] == "failed":
                raise _error(event["error"])
            yield event

    async def _silent_end(self) -> CloisterError:
        code = await self._process.wait()
        return CloisterError(
            Code.PROCESS_DIED,
            what=f"the stack's supervisor ended with exit code {code}",
            why="it gave no reason",
            todo="the file logs/stack.log of the state directory tells more",
        )


def _error(document: dict[str, str]) -> CloisterError:
    code = code_from_text(document["code"]) or Code.INTERNAL
    return CloisterError(code, what=document["what"], why=document["why"], todo=document["todo"])


def refuse_taken_ports(options: StackOptions) -> None:
    """Raise CloisterError(PORT_TAKEN) when a port that the user asked for is somebody else's."""
    for option, port in (("--gateway-port", options.gateway_port), ("--https-port", options.https_port)):
        if not port:
            continue
        with socket.socket() as probe:
            # As the services listen: a port that only lingers after its last user is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise CloisterError(
                    Code.PORT_TAKEN,
                    what=f"port {port} of {option} cannot be used",
                    why=error.strerror or str(error),
                    todo="choose another port, or leave the option out and any free one is taken",
                ) from error


def stop_running(state: StateDirectory) -> int:
    """Tell the supervisor of a state directory to end, wait until it has, and return its process id.

    Raises CloisterError: STACK_NOT_RUNNING, or DEADLINE_EXCEEDED when it does not end.
    """
    pid = state.holder()
    if not pid:
        raise CloisterError(
            Code.STACK_NOT_RUNNING,
            what=f"no local stack runs in {state.root}",
            why="there is no supervisor that holds its lock",
            todo="name the state directory of the one you mean with --state",
        )
    descriptor = os.pidfd_open(pid)
    try:
        if state.holder() == pid:  # still the process that the descriptor stands for
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        if not ended.poll(_STOP_TIMEOUT_S * 1000):
            raise CloisterError(
                Code.DEADLINE_EXCEEDED,
                what=f"the stack's supervisor (process {pid}) did not end within {_STOP_TIMEOUT_S:.0f} s",
                why="a process of it may be stuck",
                todo=f"kill -9 {pid}: what it started ends with it",
            )
    finally:
        os.close(descriptor)
    deadline = time.monotonic() + 1.0
    while state.holder() == pid and time.monotonic() < deadline:
        time.sleep(0.01)
    return pid
