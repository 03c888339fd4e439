# SPDX-License-Identifier: Apache-2.0
"""The whole path with its keys behind EHSM, and the development server by itself."""

from __future__ import annotations

import os
import signal
import time

import apsw
import pytest

from .conftest import TINY, Shell, wait_for_line


@pytest.mark.slow
@pytest.mark.timeout(400)  # the whole demo, and a second stack
def test_the_demo_runs_with_its_keys_behind_ehsm_and_later_stacks_still_open_them(shell: Shell) -> None:
    document = shell.json("demo", "--kms", "ehsm", "--rows", "240", "--keep", "--", *TINY, timeout_s=200)
    assert 0 <= document["results"]["test_accuracy"] <= 1
    status = shell.json("broker", "status")
    assert (status["backend"], status["healthy"], status["versions"]) == ("ehsm", True, ["ehsm: 2"])
    assert "split" in status["capabilities"]
    shell.run("dev", "down")
    assert shell.processes() == []
    database = apsw.Connection(str(shell.state / "ehsm" / "server" / "ehsm.sqlite"))
    assert database.execute("SELECT count(*) FROM keys WHERE enabled").get == 3  # two keys and the canary
    database.close()

    # Another stack keeps new keys in its own store and has EHSM for the old ones: the model still opens.
    shell.run("dev", "up", "--detach")
    assert shell.json("broker", "status")["backend"] == "embedded"
    wait_until_ready(shell)
    predicted = shell.json("predict", "--model", "reviews", document["predictions"][0]["text"])["predictions"][0]
    assert predicted["probability"] == pytest.approx(document["predictions"][0]["probability"])
    shell.run("dev", "down")
    assert shell.processes() == []


@pytest.mark.slow
def test_the_development_server_says_how_to_use_it_and_ends_with_its_command(shell: Shell) -> None:
    process = shell.start("dev", "ehsm", "--listen", "127.0.0.1:0")
    backend = wait_for_line(process, ["backend"]).split()[1]
    wait_for_line(process, ["Ctrl-C stops"])
    assert backend.startswith("ehsm:https://127.0.0.1:")
    for name in ("appid", "apikey", "ca.pem"):
        file = shell.state / "ehsm" / "client" / name
        assert str(file) in backend
        assert file.stat().st_mode & 0o777 == 0o600
    # A second one would be a second truth over the same keys.
    again = shell.run("dev", "ehsm", "--listen", "127.0.0.1:0", "--json", expect=1)
    assert "in use" in again.err
    assert len(shell.processes()) == 2
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert shell.processes() == []


@pytest.mark.slow
def test_a_killed_command_takes_the_development_server_with_it(shell: Shell) -> None:
    process = shell.start("dev", "ehsm", "--listen", "127.0.0.1:0")
    wait_for_line(process, ["Ctrl-C stops"])
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 15
    while shell.processes() and time.monotonic() < deadline:
        time.sleep(0.05)  # they are nobody's children here, so there is no event to wait for
    assert shell.processes() == []


def wait_until_ready(shell: Shell) -> None:
    deadline = time.monotonic() + 60
    while [model["state"] for model in shell.json("model", "list")["models"]] != ["ready"]:
        assert time.monotonic() < deadline, shell.json("model", "list")
