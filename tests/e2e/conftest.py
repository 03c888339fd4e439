# SPDX-License-Identifier: Apache-2.0
"""A user at a shell: the `cloister` command as a process, with a state directory of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 90.0
TINY = ("--epochs", "2", "--layers", "1", "--hidden", "16", "--heads", "2", "--log-steps", "2")


@dataclass(frozen=True)
class Ended:
    """What a command left: exit code and both streams."""

    code: int
    out: str
    err: str

    def document(self) -> Any:
        return json.loads(self.out)


class Shell:
    """Runs commands with one state directory."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self._started: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End what a failed test left running."""
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for line in self.processes():  # a stack that was to stay
            with suppress(ProcessLookupError):
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "cloister.cli.main", "--state", str(self.state), *map(str, arguments)]

    def run(self, *arguments: str | Path, expect: int = 0, timeout_s: float = TIMEOUT_S) -> Ended:
        done = subprocess.run(
            self.argv(*arguments), capture_output=True, text=True, timeout=timeout_s, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        ended = Ended(done.returncode, done.stdout, done.stderr)
        assert ended.code == expect, f"{arguments} ended with {ended.code}\n{ended.out}\n{ended.err}"
        assert "Traceback" not in ended.err
        return ended

    def json(self, *arguments: str | Path, expect: int = 0, timeout_s: float = TIMEOUT_S) -> Any:
        # Before the command's own end: what stands behind `--` is a job's.
        at = arguments.index("--") if "--" in arguments else len(arguments)
        return self.run(*arguments[:at], "--json", *arguments[at:], expect=expect, timeout_s=timeout_s).document()

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        """Start a command in the foreground; its stderr comes along with its stdout."""
        process = subprocess.Popen(
            self.argv(*arguments), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, bufsize=1,
        )  # fmt: skip
        self._started.append(process)
        return process

    def processes(self) -> list[str]:
        """Return the command lines of every process that has to do with this state directory."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(self.state) in command:
                found.append(f"{entry.name}: {command}")
        return found


def wait_for_line(process: subprocess.Popen[str], wanted: Sequence[str]) -> str:
    """Read a process's output until a line holds one of the texts; return that line."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if any(text in line for text in wanted):
            return line
    pytest.fail(f"ended without {wanted}:\n{''.join(seen)}")


@pytest.fixture
def shell() -> Iterator[Shell]:
    """A shell without a stack. The path is short: Unix sockets lie below it."""
    directory = Path(tempfile.mkdtemp(prefix="cli-"))
    shell = Shell(directory / "state")
    yield shell
    shell.close()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def running() -> Iterator[Shell]:
    """A shell beside a stack that runs for all tests of a module."""
    directory = Path(tempfile.mkdtemp(prefix="cli-"))
    shell = Shell(directory / "state")
    shell.run("dev", "up", "--detach")
    yield shell
    shell.run("dev", "down")
    assert shell.processes() == []
    shutil.rmtree(directory)
