# SPDX-License-Identifier: Apache-2.0
"""Processes that do not outlive us: started in sessions of their own, watched, and ended with all they started.

Four nets, each for what slips through the one before: SIGTERM and a grace period; SIGKILL for every descendant found
in /proc, the ones that ignore SIGTERM or left their session included; and when the supervisor itself is killed, the
lifeline pipe, on which programs of ours end themselves and their process group, or PR_SET_PDEATHSIG, which ends a
foreign program (but not what that has started: let a program of ours stand between).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.runtime.descendants import MARK, family
from cloister.runtime.logging import get_logger
from cloister.runtime.process import adopt_orphans

_LAUNCH: Final = Path(__file__).with_name("launch.py")
_KILL_ROUNDS: Final = 50
_KILL_PAUSE_S: Final = 0.02
_TAIL_BYTES: Final = 64 * 1024


class Child:
    """A process that a supervisor started."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log_path: Path, mark: str) -> None:
        self.name = name
        self.mark = mark
        self.pid = process.pid
        self.log_path = log_path
        self.expected_to_end = False
        self._process = process
        self._ended = asyncio.Event()

    @property
    def returncode(self) -> int | None:
        """Exit code, minus the signal for one that was killed, or None while it runs."""
        return self._process.returncode

    async def wait(self) -> int:
        """Wait until the process has ended; return its exit code."""
        await self._ended.wait()
        return self._process.returncode or 0

    def log_tail(self, lines: int = 20) -> list[str]:
        """Return the last lines of the log file."""
        with self.log_path.open("rb") as file:
            file.seek(max(0, self.log_path.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-lines:]

    def describe_end(self) -> str:
        """Say in words how it ended."""
        code = self.returncode
        if code is None:
            return "is running"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def reap(self) -> None:
        """Take the exit status and wake who waits."""
        self._process.wait()
        self._ended.set()


class Supervisor:
    """Starts processes and ends them. Use it from one event loop, whose thread must outlive the processes."""

    def __init__(self) -> None:
        adopt_orphans()
        self._mark = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._orphans: set[int] = set()
        # Nothing is ever written. Children hold the read end; the write end is only here (O_CLOEXEC).
        self._lifeline_read, self._lifeline_write = os.pipe()
        self._children: list[Child] = []
        self._deaths: asyncio.Queue[Child] = asyncio.Queue()
        self._stopped = False

    @property
    def children(self) -> tuple[Child, ...]:
        """Return those that run, in the order they were started."""
        return tuple(child for child in self._children if child.returncode is None)

    async def start(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        log_path: Path,
        cores: Collection[int] | None = None,
        lifeline: bool = True,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
    ) -> Child:
        """Start a program with exactly this environment; its output is appended to `log_path`.

        Programs of ours get `--lifeline-fd N` at the end of their arguments; say `lifeline=False` for others.
        A program that is not there ends the child with exit code 1 and a line in its log.
        """
        if self._stopped:
            raise CloisterError(Code.INTERRUPTED, what=f"{name} is not started", why="everything is being stopped")
        command = [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), _spell(cores), *argv]
        if lifeline and "--lifeline-fd" not in argv:
            command += ["--lifeline-fd", str(self._lifeline_read)]
        mark = f"{self._mark}.{len(self._children)}"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - the fork takes a millisecond; the exit is awaited
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**env, MARK: ";".join(filter(None, [os.environ.get(MARK), mark]))},
                cwd=cwd,
                start_new_session=True,
                pass_fds=[*([self._lifeline_read] if lifeline else []), *pass_fds],
            )
        finally:
            os.close(log)
        child = Child(name, process, log_path, mark)
        self._children.append(child)
        self._watch(child)
        get_logger().info("process started", name=name, pid=child.pid)
        return child

    async def wait_any(self) -> Child:
        """Wait for the next process that ends without having been stopped; return it."""
        return await self._deaths.get()

    async def stop(self, child: Child, grace_s: float) -> None:
        """End one process and everything it started: SIGTERM, at most `grace_s`, SIGKILL."""
        child.expected_to_end = True
        self._orphans |= {info.pid for info in family({child.pid}, child.mark)}
        _signal(child.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(child.wait(), grace_s)
        except TimeoutError:
            get_logger().warning("process did not stop in time and is killed", name=child.name, pid=child.pid)
        await self._kill_family([child], mark=child.mark)

    async def stop_all(self, grace_s: float) -> None:
        """End every process and everything any of them started, the youngest told first; then close the lifeline."""
        self._stopped = True
        running = list(reversed(self.children))
        self._orphans |= {info.pid for info in family({child.pid for child in running}, self._mark)}
        for child in running:
            child.expected_to_end = True
            _signal(child.pid, signal.SIGTERM)
        if running:
            await asyncio.wait([asyncio.ensure_future(child.wait()) for child in running], timeout=grace_s)
        await self._kill_family(self._children, mark=self._mark)
        for descriptor in (self._lifeline_write, self._lifeline_read):
            if descriptor >= 0:
                os.close(descriptor)
        self._lifeline_write = self._lifeline_read = -1

    def _watch(self, child: Child) -> None:
        # A pidfd becomes readable when the process ends; it works with any event loop and needs no SIGCHLD.
        loop = asyncio.get_running_loop()
        descriptor = os.pidfd_open(child.pid)

        def ended() -> None:
            loop.remove_reader(descriptor)
            os.close(descriptor)
            child.reap()
            get_logger().info("process ended", name=child.name, pid=child.pid, how=child.describe_end())
            if not child.expected_to_end:
                # What it leaves behind has nobody who would end it later.
                for info in family({child.pid}, child.mark):
                    self._orphans.add(info.pid)
                    _signal(info.pid, signal.SIGKILL)
                self._deaths.put_nowait(child)

        loop.add_reader(descriptor, ended)

    async def _kill_family(self, children: Sequence[Child], *, mark: str) -> None:
        """SIGKILL every member until there is none: one that forks while it is being killed is met again."""
        roots = {child.pid for child in children}
        started = time.monotonic()
        for _ in range(_KILL_ROUNDS):
            members = family(roots, mark)
            if not members:
                break
            for info in members:
                self._orphans.add(info.pid)
                _signal(info.pid, signal.SIGKILL)
            await asyncio.sleep(_KILL_PAUSE_S)
        else:
            left = [info.pid for info in family(roots, mark)]
            get_logger().error("processes cannot be killed", pids=left, seconds=time.monotonic() - started)
        for child in children:
            if child.returncode is None:
                await child.wait()
        self._reap_orphans()

    def _reap_orphans(self) -> None:
        """Take the exit status of adopted descendants that have ended, so that they leave the process table."""
        for pid in tuple(self._orphans - {child.pid for child in self._children}):
            try:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    self._orphans.discard(pid)
            except ChildProcessError:  # its own parent lives, and has it
                self._orphans.discard(pid)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _spell(cores: Collection[int] | None) -> str:
    return ",".join(map(str, sorted(cores))) if cores else "-"
