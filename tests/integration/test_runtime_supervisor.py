# SPDX-License-Identifier: Apache-2.0
"""Nothing that was started is left behind, however the end comes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.runtime.descendants import all_processes
from cloister.runtime.supervisor import Child, Supervisor

ENV = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}

# Writes its pid and its grandchild's; both ignore SIGTERM. "daemon" makes the grandchild flee: own session, no parent.
STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
directory, how = sys.argv[1], sys.argv[2]
def note(name):
    with open(os.path.join(directory, name + ".new"), "w") as file:
        file.write(str(os.getpid()))
    os.rename(os.path.join(directory, name + ".new"), os.path.join(directory, name))
if os.fork() == 0:
    if how == "daemon":
        os.setsid()
        if os.fork():
            os._exit(0)
    note("grandchild")
    time.sleep(600)
note("child")
if how == "crash":
    while not os.path.exists(os.path.join(directory, "grandchild")):
        time.sleep(0.01)
    os._exit(3)
time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    found = all_processes().get(pid)
    return found is not None and not found.zombie


async def pid_in(path: Path) -> int:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come up"
        await asyncio.sleep(0.02)
    return int(path.read_text())


async def gone(pids: list[int], within_s: float) -> float:
    """Wait until none of the processes lives; return how long it took."""
    started = time.monotonic()
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < started + within_s, [pid for pid in pids if is_alive(pid)]
        await asyncio.sleep(0.01)
    return time.monotonic() - started


@pytest.fixture
async def supervisor() -> AsyncIterator[Supervisor]:
    found = Supervisor()
    yield found
    await found.stop_all(0.1)


async def start(supervisor: Supervisor, directory: Path, *argv: str, name: str = "child", **options: object) -> Child:
    options.setdefault("lifeline", False)
    return await supervisor.start(
        name, [sys.executable, *argv], env=ENV, log_path=directory / "logs" / f"{name}.log", **options  # type: ignore[arg-type]
    )  # fmt: skip


async def stubborn(supervisor: Supervisor, directory: Path, how: str) -> tuple[Child, list[int]]:
    child = await start(supervisor, directory, "-c", STUBBORN, str(directory), how)
    return child, [await pid_in(directory / "child"), await pid_in(directory / "grandchild")]


@pytest.mark.parametrize("how", ["stay", "daemon"])
async def test_stop_ends_descendants_that_ignore_sigterm_or_fled(tmp_path: Path, how: str) -> None:
    supervisor = Supervisor()
    child, pids = await stubborn(supervisor, tmp_path, how)
    assert pids[0] == child.pid, "the launcher becomes the program"
    started = time.monotonic()
    await supervisor.stop_all(0.2)
    assert not any(is_alive(pid) for pid in pids)
    assert not any(pid in all_processes() for pid in pids), "no zombie stays either"
    assert time.monotonic() - started < 3
    assert child.returncode == -signal.SIGKILL


async def test_one_child_is_stopped_with_its_family_and_the_others_run_on(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    other = await start(supervisor, tmp_path, "-c", "import time; time.sleep(600)", name="other")
    child, pids = await stubborn(supervisor, tmp_path, "daemon")
    await supervisor.stop(child, 0.1)
    assert not any(is_alive(pid) for pid in pids)
    assert supervisor.children == (other,)


async def test_a_process_that_heeds_sigterm_is_not_killed(tmp_path: Path, supervisor: Supervisor) -> None:
    program = (
        "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); print('up', flush=True); time.sleep(600)"
    )
    child = await start(supervisor, tmp_path, "-c", program)
    while "up" not in child.log_tail():
        await asyncio.sleep(0.02)
    await supervisor.stop(child, 10)
    assert child.returncode == 7


async def test_an_unexpected_death_is_reported_and_its_children_ended(tmp_path: Path, supervisor: Supervisor) -> None:
    child, pids = await stubborn(supervisor, tmp_path, "crash")
    assert await asyncio.wait_for(supervisor.wait_any(), 10) is child
    assert child.describe_end() == "ended with exit code 3"
    await gone(pids, 5)


async def test_an_expected_end_is_not_reported(tmp_path: Path, supervisor: Supervisor) -> None:
    child = await start(supervisor, tmp_path, "-c", "import time; time.sleep(600)")
    await supervisor.stop(child, 5)
    crashed = await start(supervisor, tmp_path, "-c", "raise SystemExit(1)", name="second")
    assert await asyncio.wait_for(supervisor.wait_any(), 10) is crashed


SUPERVISING = """
import asyncio, os, sys
from pathlib import Path
from cloister.runtime.supervisor import Supervisor
async def main():
    supervisor = Supervisor()
    directory = Path(sys.argv[1])
    env = {"PATH": os.environ["PATH"]}
    # One that knows the lifeline and has a child in its group, and one that does not.
    await supervisor.start("ours", [sys.executable, "-c", sys.argv[2], str(directory / "ours")], env=env,
                           log_path=directory / "ours.log")
    await supervisor.start("foreign", [sys.executable, "-c", sys.argv[3], str(directory / "foreign")], env=env,
                           log_path=directory / "foreign.log", lifeline=False)
    await asyncio.sleep(600)
asyncio.run(main())
"""
OURS = """
import os, signal, sys, time
from cloister.runtime.process import lifeline
signal.signal(signal.SIGTERM, signal.SIG_IGN)
directory = sys.argv[1]
os.makedirs(directory)
child = os.fork()
if child == 0:
    time.sleep(600)
lifeline(int(sys.argv[sys.argv.index("--lifeline-fd") + 1]))
with open(directory + "/new", "w") as file:
    file.write(str(child))
os.rename(directory + "/new", directory + "/grandchild")
with open(directory + "/new", "w") as file:
    file.write(str(os.getpid()))
os.rename(directory + "/new", directory + "/child")
time.sleep(600)
"""
FOREIGN = OURS.replace("from cloister.runtime.process import lifeline", "").replace(
    'lifeline(int(sys.argv[sys.argv.index("--lifeline-fd") + 1]))', "os.kill(child, 9)"
)


async def test_kill_9_of_the_supervisor_leaves_nothing_within_a_second(tmp_path: Path) -> None:
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISING, str(tmp_path), OURS, FOREIGN, stderr=subprocess.DEVNULL
    )
    ours, foreign = tmp_path / "ours", tmp_path / "foreign"
    pids = [await pid_in(ours / "child"), await pid_in(ours / "grandchild"), await pid_in(foreign / "child")]
    assert all(is_alive(pid) for pid in pids)
    program.kill()
    await program.wait()
    assert await gone(pids, 5) < 1


async def test_a_lifeline_takes_over_from_the_parent_death_signal(tmp_path: Path, supervisor: Supervisor) -> None:
    # The kernel's signal would end a program before it could take its process group along.
    program = """
import ctypes, sys
from cloister.runtime.process import lifeline
def death_signal():
    found = ctypes.c_int()
    ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
    return found.value
print(death_signal(), end=" ")
lifeline(int(sys.argv[sys.argv.index("--lifeline-fd") + 1]))
print(death_signal())
"""
    child = await start(supervisor, tmp_path, "-c", program, lifeline=True)
    await asyncio.wait_for(child.wait(), 10)
    assert child.log_tail() == [f"{int(signal.SIGKILL)} 0"]


async def test_output_goes_to_the_log_and_the_environment_is_the_one_given(
    tmp_path: Path, supervisor: Supervisor
) -> None:
    os.environ["CLOISTER_TEST_LEAK"] = "leaked"
    try:
        child = await start(
            supervisor, tmp_path, "-c", "import os, sys; print(sorted(os.environ)); print('oops', file=sys.stderr)"
        )
    finally:
        del os.environ["CLOISTER_TEST_LEAK"]
    assert await asyncio.wait_for(child.wait(), 10) == 0
    text = "\n".join(child.log_tail())
    assert "oops" in text
    assert "LEAK" not in text
    assert "HOME" in text
    assert child.log_path.stat().st_mode & 0o777 == 0o600


async def test_a_program_that_is_not_there_says_so_in_its_log(tmp_path: Path, supervisor: Supervisor) -> None:
    child = await supervisor.start("none", ["/no/such/program"], env=ENV, log_path=tmp_path / "log")
    assert await asyncio.wait_for(child.wait(), 10) == 1
    assert "cannot start /no/such/program" in child.log_tail()[-1]


async def test_a_child_stays_on_its_cores(tmp_path: Path, supervisor: Supervisor) -> None:
    core = min(os.sched_getaffinity(0))
    program = "import os; print(os.sched_getaffinity(0))"
    child = await start(supervisor, tmp_path, "-c", program, cores=[core])
    await asyncio.wait_for(child.wait(), 10)
    assert child.log_tail() == [f"{{{core}}}"]


async def test_nothing_starts_once_everything_is_being_stopped(tmp_path: Path) -> None:
    supervisor = Supervisor()
    await supervisor.stop_all(0)
    with pytest.raises(CloisterError) as caught:
        await start(supervisor, tmp_path, "-c", "")
    assert caught.value.code is Code.INTERRUPTED
    await supervisor.stop_all(0)
