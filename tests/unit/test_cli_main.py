# SPDX-License-Identifier: Apache-2.0
"""The command line as a whole: help, usage errors, failures, exit codes, Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cloister.cli.main import execute
from cloister.cli.output import clean, print_error
from cloister.errors import EXIT_CODE, CloisterError, Code

COMMANDS = [
    ["dev", "up"], ["dev", "down"], ["dev", "status"], ["dev", "logs"], ["identity", "login"], ["identity", "show"],
    ["key", "create"], ["key", "list"], ["key", "show"], ["key", "enable"], ["key", "disable"], ["key", "policy"],
    ["key", "decisions"], ["seal"], ["open"], ["measure"], ["train", "submit"], ["train", "list"], ["train", "show"],
    ["train", "watch"], ["train", "logs"], ["train", "cancel"], ["model", "deploy"], ["model", "list"],
    ["model", "remove"], ["predict"], ["quote", "show"], ["attest", "verdicts"],
    ["references", "sign"], ["references", "show"], ["doctor"], ["demo"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert execute([*command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_help_loads_no_heavy_package() -> None:
    program = "import sys; sys.argv = ['cloister', '--help']\nfrom cloister.cli.main import run\n"
    program += "try:\n run()\nexcept SystemExit: pass\n"
    program += "heavy = {'torch', 'transformers', 'grpc', 'pydantic', 'apsw', 'jinja2', 'numpy'} & set(sys.modules)\n"
    program += "sys.exit(','.join(heavy) or 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_command_is_named_with_what_is_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["key", "lst"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    first, second, third = captured.err.splitlines()
    assert first.startswith("error CLO-1002: cloister key")
    assert "list" in second
    assert "cloister key --help" in third


def test_a_usage_error_is_json_when_json_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", "submit", "--json", "--nodes", "many"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["error"]["code"] == "CLO-1002"
    assert document["exit_code"] == 2


def test_json_behind_the_separator_is_the_jobs_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["train", "submit", "--state", str(tmp_path), "--", "--json"]) == 4
    assert capsys.readouterr().out == ""


def test_without_a_stack_a_command_says_how_to_start_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute(["--state", str(tmp_path / "none"), "key", "list"]) == 4
    assert "cloister dev up" in capsys.readouterr().err


@pytest.mark.parametrize("code", list(Code), ids=lambda code: code.name)
def test_every_code_ends_with_the_exit_code_of_its_kind(code: Code, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_error(CloisterError(code, what="w", why="y", todo="t"), as_json=False) == EXIT_CODE[code.kind]
    assert capsys.readouterr().err == f"error {code.text}: w\n  why: y\n  do:  t\n"


def test_an_error_without_reason_has_no_empty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(CloisterError(Code.INTERNAL, what="w"), as_json=False)
    assert capsys.readouterr().err == "error CLO-1199: w\n"


def test_an_error_is_three_lines_however_many_its_reason_has(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(CloisterError(Code.JOB_FAILED, what="w", why="a\nb\r\nc", todo="t"), as_json=False)
    assert capsys.readouterr().err == "error CLO-1503: w\n  why: a | b | c\n  do:  t\n"


def test_text_from_elsewhere_cannot_drive_the_terminal() -> None:
    assert clean("a\x1b[2J\u202eb\x07\n\tc") == "a\ufffd[2J\ufffdb\ufffd\n\tc"
    assert clean("房间很干净") == "房间很干净"


def test_an_unforeseen_failure_is_one_line_and_a_private_file(tmp_path: Path) -> None:
    # A state directory whose lock is a directory: nothing foresees that.
    (tmp_path / "stack.lock").mkdir()
    (tmp_path / "stack.lock").chmod(0o700)
    tmp_path.chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-m", "cloister.cli.main", "key", "list", "--state", str(tmp_path)],
        capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error CLO-1199: unexpected IsADirectoryError")
    log = Path(line.rpartition(" ")[2])
    assert "Traceback" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0


def test_a_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m cloister.cli.main measure --json | true",
        shell=True, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""


def test_the_error_catalogue_is_what_the_codes_say() -> None:
    script = Path(__file__).parents[2] / "scripts" / "generate_error_docs.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


def test_every_command_and_exit_code_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    missing = [" ".join(command) for command in COMMANDS if f"cloister {' '.join(command)}" not in text]
    assert missing == []
    assert all(f"| {code} |" in text for code in {0, *EXIT_CODE.values(), 130})
