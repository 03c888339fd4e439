# SPDX-License-Identifier: Apache-2.0
"""The whole path, as `make demo` runs it, on a tiny sample and model; and what is left when it is cut short."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from cloister.data.sample import sample_rows

from .conftest import TINY, Shell, wait_for_line

ROWS = 240


@pytest.mark.slow
def test_the_demo_seals_trains_serves_and_leaves_nothing_running(shell: Shell) -> None:
    began = time.monotonic()
    document = shell.json("demo", "--rows", str(ROWS), "--", *TINY)
    assert time.monotonic() - began < 90
    assert shell.processes() == []

    assert 0 <= document["results"]["test_accuracy"] <= 1
    assert {prediction["over"] for prediction in document["predictions"]} == {"gRPC", "HTTPS"}
    assert {prediction["label"] for prediction in document["predictions"]} <= {"positive", "negative"}
    by_grpc = [p["probability"] for p in document["predictions"] if p["over"] == "gRPC"]
    by_https = [p["probability"] for p in document["predictions"] if p["over"] == "HTTPS"]
    assert by_grpc == pytest.approx(by_https)

    assert texts_below(shell.state) == []
    report = Path(document["report"]).read_text(encoding="utf-8")
    for who in ("/service/attest", "/service/keybroker", "/service/trainer", "/service/gateway", "/rank/0", "/rank/1"):
        assert who in report
    assert "/model/reviews/backend/" in report
    assert not re.search(r"<script|<[^>]*(?:src|href)=", report)

    # Again in the same place, and this time the stack stays for its user.
    again = shell.json("demo", "--rows", str(ROWS), "--keep", "--", *TINY)
    assert again["results"] == document["results"], "the same seed gives the same model"
    predicted = shell.json("predict", "--model", "reviews", again["predictions"][0]["text"])["predictions"][0]
    assert predicted["probability"] == pytest.approx(again["predictions"][0]["probability"])
    shell.run("dev", "down")
    assert shell.processes() == []


def texts_below(directory: Path) -> list[Path]:
    """Return the files that hold any text of the sample; reports show what was predicted, not what was trained on."""
    texts = [text.encode() for _, text in sample_rows(rows=ROWS)]
    return [
        path
        for path in directory.rglob("*")
        if path.is_file() and any(text in content for content in [path.read_bytes()] for text in texts)
    ]


@pytest.mark.slow
def test_ctrl_c_during_training_leaves_no_process_and_no_plaintext(shell: Shell) -> None:
    process = shell.start("demo", "--rows", str(ROWS), "--", *TINY, "--epochs", "5000")
    wait_for_line(process, ["/5000  step"])
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped by you" in rest
    assert "Traceback" not in rest
    assert shell.processes() == []
    assert texts_below(shell.state) == []


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["platform", "attest", "keybroker"])
def test_ctrl_c_while_the_stack_starts_leaves_no_process(shell: Shell, moment: str) -> None:
    process = shell.start("dev", "up", "--detach")
    wait_for_line(process, [moment])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert shell.processes() == []


@pytest.mark.slow
def test_a_killed_command_takes_its_stack_with_it(shell: Shell) -> None:
    process = shell.start("dev", "up")
    wait_for_line(process, ["Ctrl-C stops"])
    assert len(shell.processes()) >= 6
    process.kill()
    process.communicate()
    assert wait_until_gone(shell)


@pytest.mark.slow
def test_a_dead_service_ends_the_stack_with_its_name(shell: Shell) -> None:
    process = shell.start("dev", "up")
    wait_for_line(process, ["Ctrl-C stops"])
    victim = next(line for line in shell.processes() if "cloister_keybroker" in line)
    os.kill(int(victim.partition(":")[0]), signal.SIGKILL)
    rest, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "CLO-1010: keybroker ended unexpectedly by signal 9" in rest
    assert "keybroker.log" in rest
    assert shell.processes() == []


def wait_until_gone(shell: Shell) -> bool:
    deadline = time.monotonic() + 15
    while shell.processes():
        if time.monotonic() > deadline:
            return False
        # They are nobody's children here, so there is no event to wait for.
        time.sleep(0.05)
    return True
