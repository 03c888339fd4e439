# SPDX-License-Identifier: Apache-2.0
"""Claims about the wire: linted, compatible with what was released, and generated code that matches it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = ROOT / "protos"
BUF = Path(__file__).parent / "node_modules/.bin/buf"
# What apps out there were built against; replaced only when a version is released (docs/architecture.md, "The wire").
RELEASED = PROTOS / "released.binpb"
TRAINER = "cloister/api/trainer/v1/trainer.proto"


@pytest.fixture(scope="session")
def buf() -> Path:
    if not BUF.exists():
        if os.environ.get("CI") == "true":
            pytest.fail("buf is missing: run `make node`")
        pytest.skip("buf is missing (needs node): run `make node`")
    return BUF


def run_buf(buf: Path, *args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(buf), *args], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def breaking(buf: Path, protos: Path) -> subprocess.CompletedProcess[str]:
    return run_buf(buf, "breaking", "--against", str(RELEASED), cwd=protos)


def changed(tmp_path: Path, old: str, new: str) -> Path:
    copy = tmp_path / "protos"
    shutil.copytree(PROTOS, copy)
    text = (copy / TRAINER).read_text()
    assert old in text
    (copy / TRAINER).write_text(text.replace(old, new, 1))
    return copy


def test_the_protos_are_linted(buf: Path) -> None:
    outcome = run_buf(buf, "lint", cwd=PROTOS)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_the_protos_are_compatible_with_the_released_ones(buf: Path) -> None:
    outcome = breaking(buf, PROTOS)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_adding_a_field_is_compatible(buf: Path, tmp_path: Path) -> None:
    protos = changed(tmp_path, "uint32 limit = 1;", "uint32 limit = 1;\n  string label = 2;")
    outcome = breaking(buf, protos)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("uint32 limit = 1;", ""),
        ("uint32 limit = 1;", "uint32 limit = 7;"),
        ("uint32 limit = 1;", "string limit = 1;"),
        ("rpc CancelJob(CancelJobRequest) returns (CancelJobResponse);", ""),
        ("JOB_STATE_CANCELLED = 6;", ""),
    ],
    ids=["field removed", "field renumbered", "type changed", "rpc removed", "enum value removed"],
)
def test_taking_something_away_is_noticed(buf: Path, tmp_path: Path, old: str, new: str) -> None:
    assert breaking(buf, changed(tmp_path, old, new)).returncode != 0


def test_the_generated_code_is_what_the_protos_generate() -> None:
    command = [sys.executable, str(ROOT / "scripts/generate_api.py"), "--check"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_the_floors_of_the_runtime_packages_are_those_the_generated_code_demands() -> None:
    # Generated code refuses an older runtime at import: the declared floor must not promise less.
    pyproject = (ROOT / "pyproject.toml").read_text()
    made_with = re.search(r"Protobuf Python Version: (\S+)", (ROOT / f"lib/{TRAINER[:-6]}_pb2.py").read_text())
    grpc_made_with = re.search(
        r"GRPC_GENERATED_VERSION = '(\S+)'", (ROOT / f"lib/{TRAINER[:-6]}_pb2_grpc.py").read_text()
    )
    assert made_with is not None
    assert grpc_made_with is not None
    assert f'"protobuf>={made_with[1]}"' in pyproject
    assert f'"grpcio>={grpc_made_with[1]}"' in pyproject
    assert f'"grpcio-tools=={version("grpcio-tools")}"' in pyproject
