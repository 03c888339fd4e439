# SPDX-License-Identifier: Apache-2.0
"""Pins are read back from the kernel, thread by thread."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from cloister.errors import CloisterError, Code
from cloister_serving.pinning import check_pinned, cores_of_threads, parse_core_list

# Two threads on the first core, then, when told, one of them leaves it.
_TWO_THREADS = """
import os, sys, threading
os.sched_setaffinity(0, {0})
leave = threading.Event()
def other():
    print("up", flush=True)
    leave.wait()
    os.sched_setaffinity(0, range(os.cpu_count()))
    print("left", flush=True)
    threading.Event().wait()
threading.Thread(target=other, daemon=True).start()
sys.stdin.readline()
leave.set()
sys.stdin.readline()
"""


@pytest.fixture
def two_threads() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", _TWO_THREADS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
        process.kill()


def test_the_kernels_lists_are_read() -> None:
    assert parse_core_list("0-3,8") == {0, 1, 2, 3, 8}
    assert parse_core_list("5") == {5}


def test_all_threads_on_their_core_pass(two_threads: subprocess.Popen[str]) -> None:
    assert check_pinned(two_threads.pid, [0], what="the child") == 2


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_one_thread_that_left_its_core_is_an_error(two_threads: subprocess.Popen[str]) -> None:
    assert two_threads.stdin is not None
    assert two_threads.stdout is not None
    two_threads.stdin.write("leave\n")
    two_threads.stdin.flush()
    assert two_threads.stdout.readline() == "left\n"
    assert len(cores_of_threads(two_threads.pid)) == 2
    with pytest.raises(CloisterError, match="not pinned to core 0") as caught:
        check_pinned(two_threads.pid, [0], what="the child")
    assert caught.value.code is Code.PIN_FAILED


def test_a_process_that_is_gone_is_not_pinned() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with pytest.raises(CloisterError, match="is gone") as caught:
        check_pinned(process.pid, [0], what="the child")
    assert caught.value.code is Code.PIN_FAILED
