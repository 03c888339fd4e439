# SPDX-License-Identifier: Apache-2.0
"""The state directory: private, one stack at a time, nothing stale believed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.cli import options
from cloister.cli.state import Stack, StateDirectory, read_stack
from cloister.errors import CloisterError, Code

STACK = Stack(
    supervisor_pid=1,
    started_unix_s=0.0,
    trust_domain="cloister.test",
    tenant="demo",
    user="spiffe://cloister.test/ns/demo/user/owner",
    endpoints={"attest": {"grpc": "127.0.0.1:1", "enrolment": "127.0.0.1:2"}},
    process_ids={"attest": 2},
    root_certificate="/root.pem",
    collateral="",
    simulated=True,
    timings_s={"attest": 1.0},
)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "state").create()


def test_everything_below_is_for_its_owner_only(state: StateDirectory) -> None:
    assert all(path.stat().st_mode & 0o077 == 0 for path in [state.root, *state.root.rglob("*")])


def test_a_directory_open_to_others_is_refused(state: StateDirectory) -> None:
    state.root.chmod(0o750)
    with pytest.raises(CloisterError, match="not private") as caught:
        state.create()
    assert "chmod 700" in caught.value.todo


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CloisterError, match="cannot be made"):
        StateDirectory(tmp_path / "file" / "state").create()


def test_the_lock_admits_one_supervisor_and_names_it(state: StateDirectory) -> None:
    assert state.holder() is None
    with state.lock():
        assert state.holder() == os.getpid()
        with pytest.raises(CloisterError) as caught:
            state.lock()
        assert caught.value.code is Code.STACK_RUNNING
    assert state.holder() is None


def test_a_killed_supervisor_leaves_no_stack_behind(state: StateDirectory) -> None:
    state.stack_file.write_bytes(STACK.to_json())
    program = "import sys; from pathlib import Path; from cloister.cli.state import StateDirectory\n"
    program += "held = StateDirectory(Path(sys.argv[1])).lock(); print('held', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(state.root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    assert read_stack(state) == STACK
    process.kill()
    process.communicate()
    with pytest.raises(CloisterError) as caught:
        read_stack(state)
    assert caught.value.code is Code.STACK_NOT_RUNNING


@pytest.mark.parametrize("content", [b"", b"{}", b'{"version": 2}', b'{"version": 1, "surprise": 1}', b"[]"])
def test_a_damaged_stack_file_is_named(state: StateDirectory, content: bytes) -> None:
    state.stack_file.write_bytes(content)
    with state.lock(), pytest.raises(CloisterError) as caught:
        read_stack(state)
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_stack_that_is_still_starting_says_so(state: StateDirectory) -> None:
    with state.lock(), pytest.raises(CloisterError, match="not ready"):
        read_stack(state)


def test_an_endpoint_that_a_service_lacks_is_an_error() -> None:
    assert STACK.endpoint("attest", "enrolment") == "127.0.0.1:2"
    with pytest.raises(CloisterError):
        STACK.endpoint("attest", "https")


def test_the_state_option_of_a_command_wins_over_the_one_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    options.remember_state(None)
    assert options.state_directory(None).root == tmp_path / "cloister"
    options.remember_state(Path("/before"))
    assert options.state_directory(None).root == Path("/before")
    assert options.state_directory(Path("/own")).root == Path("/own")
    options.remember_state(None)
