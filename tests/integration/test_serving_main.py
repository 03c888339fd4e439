# SPDX-License-Identifier: Apache-2.0
"""The gateway's start: a plan of cores that does not hold, or a configuration that is not one, ends it with words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.errors import EXIT_CODE, Kind

CONFIG = """
[service]
trust_domain = "cloister.test"
state_dir = "state"
endpoints_file = "endpoints.json"
[guest]
provider = "simulated:/nowhere"
attest_endpoint = "127.0.0.1:1"
trust_bundle = "bundle.json"
[serving]
attest_endpoint = "127.0.0.1:2"
keybroker_endpoint = "127.0.0.1:3"
archive_dir = "archives"
"""


def start(directory: Path, extra: str) -> subprocess.CompletedProcess[str]:
    path = directory / "gateway.toml"
    path.write_text(CONFIG + extra)
    command = [sys.executable, "-m", "cloister_serving", "--config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("gateway_cores = [0]\nbackend_cores = [4711]", "there is no core 4711 for this process"),
        ("gateway_cores = [0]\nbackend_cores = [0]", "gateway and backends share core 0"),
        ("gateway_cores = []\nbackend_cores = [0]", "need at least one core each"),
    ],
)
def test_cores_that_are_not_there_or_not_apart_end_the_start(tmp_path: Path, plan: str, words: str) -> None:
    ended = start(tmp_path, plan)
    assert ended.returncode == EXIT_CODE[Kind.EXHAUSTED]
    assert "CLO-1505" in ended.stderr
    assert words in ended.stderr
    assert not (tmp_path / "endpoints.json").exists()


def test_fewer_cores_than_the_plan_needs_end_the_start(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    first = min(before)
    os.sched_setaffinity(0, {first})
    try:
        ended = start(tmp_path, f"gateway_cores = [{first}]\nbackend_cores = [{first + 1}]")
    finally:
        os.sched_setaffinity(0, before)
    assert ended.returncode == EXIT_CODE[Kind.EXHAUSTED]
    assert f"it may use the cores {first}\n" in ended.stderr


def test_a_key_that_is_not_one_is_named_with_its_line_and_the_allowed_ones(tmp_path: Path) -> None:
    ended = start(tmp_path, "backend_core = 1")
    assert ended.returncode == EXIT_CODE[Kind.USAGE]
    assert "gateway.toml, line" in ended.stderr
    assert "backend_cores" in ended.stderr
