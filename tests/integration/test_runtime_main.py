# SPDX-License-Identifier: Apache-2.0
"""How a service begins and ends: arguments, logs, signals, lifeline, exit codes, hardening, cores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.errors import EXIT_CODE, CloisterError, Code, Kind
from cloister.runtime.process import pin_to_cores

PROGRAM = Path(__file__).resolve().parents[1] / "fakes" / "crashing_service.py"


def start(tmp_path: Path, how: str, *argv: str, **options: object) -> subprocess.Popen[str]:
    config = tmp_path / "config"
    config.write_text(how)
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        [sys.executable, str(PROGRAM), "--config", str(config), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(tmp_path: Path, how: str) -> tuple[int, str, str]:
    with start(tmp_path, how) as process:
        out, errors = process.communicate(timeout=30)
    return process.returncode, out, errors


def until_up(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    assert json.loads(process.stderr.readline())["event"] == "up"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_gracefully(tmp_path: Path, number: signal.Signals) -> None:
    with start(tmp_path, "run") as process:
        until_up(process)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert [json.loads(line)["event"] for line in errors.splitlines()] == ["stopping", "drained"]


def test_an_error_of_ours_ends_it_in_three_lines_and_with_its_exit_code(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, "denied")
    assert code == EXIT_CODE[Kind.DENIED] == 3
    assert errors.splitlines()[-3:] == ["CLO-1303: what it is", "why it is", "what to do"]


def test_any_other_error_is_logged_without_local_variables(tmp_path: Path) -> None:
    code, _, errors = run(tmp_path, "crash")
    assert code == 1
    line = json.loads(errors.splitlines()[-1])
    assert "RuntimeError: it failed with 13" in line["exception"]
    assert "correct-horse" not in errors


def test_it_leaves_no_core_and_its_memory_to_nobody(tmp_path: Path) -> None:
    code, out, _ = run(tmp_path, "core")
    assert code == 0
    assert out.split() == ["core", "0", "0"]


def test_missing_arguments_are_a_usage_error() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_it_ends_when_the_lifeline_is_cut_with_its_group(tmp_path: Path) -> None:
    read, write = os.pipe()
    with start(tmp_path, "run", "--lifeline-fd", str(read), pass_fds=[read], start_new_session=True) as process:
        os.close(read)
        until_up(process)
        os.close(write)
        assert process.wait(timeout=5) == -signal.SIGKILL


def test_every_thread_is_pinned_and_read_back() -> None:
    program = """
import os, threading
from cloister.runtime.process import pin_to_cores
stop = threading.Event()
threads = [threading.Thread(target=stop.wait) for _ in range(3)]
[t.start() for t in threads]
core = min(os.sched_getaffinity(0))
pin_to_cores([core])
assert {frozenset(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")} == {frozenset({core})}
stop.set()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@pytest.mark.parametrize("cores", [[], [100_000], [0, 100_000]])
def test_cores_that_are_not_there_are_an_error_that_names_those_that_are(cores: list[int]) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(CloisterError) as caught:
        pin_to_cores(cores)
    assert caught.value.code is Code.PIN_FAILED
    assert "this machine has cores 0" in caught.value.why
    assert os.sched_getaffinity(0) == before
