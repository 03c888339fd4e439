# SPDX-License-Identifier: Apache-2.0
"""Executing a job's script: the measured bytes as __main__, and errors in its own words but without its variables."""

import subprocess
import sys
from pathlib import Path

RUNNER = """
import sys
from cloister.errors import CloisterError
from cloister_trainer.script import run_script
for path in sys.argv[1:]:
    try:
        run_script(open(path, "rb").read(), name="train.py", args=["--x", "1"])
    except CloisterError as error:
        print("ERROR", error.code.text, error.what)
"""


def run(tmp_path: Path, *scripts: str) -> subprocess.CompletedProcess[str]:
    """Run scripts one after the other, in a process of their own."""
    paths = [tmp_path / f"script-{number}" for number in range(len(scripts))]
    for path, script in zip(paths, scripts, strict=True):
        path.write_text(script)
    return subprocess.run(
        [sys.executable, "-c", RUNNER, *map(str, paths)], capture_output=True, text=True, check=False, timeout=60
    )


def test_a_script_runs_as_main_with_its_arguments(tmp_path: Path) -> None:
    done = run(tmp_path, "import sys, __main__\nX = 5\nprint(__name__, sys.argv, __main__.X)")
    assert done.stdout == "__main__ ['train.py', '--x', '1'] 5\n"
    assert done.stderr == ""


def test_a_traceback_shows_the_scripts_lines_and_no_variables(tmp_path: Path) -> None:
    done = run(
        tmp_path, "def f(key):\n    secret = 'hunter2'\n    raise ValueError('no such row')\nf(secret := 'hunter2')"
    )
    assert 'File "train.py", line 3, in f' in done.stderr
    assert "raise ValueError('no such row')" in done.stderr
    assert "script.py" not in done.stderr
    assert done.stderr.count("hunter2") == done.stderr.count("f(secret := 'hunter2')")
    assert done.stdout == "ERROR CLO-1506 the script failed at line 3: ValueError: no such row\n"


def test_a_private_key_in_a_message_does_not_reach_the_log(tmp_path: Path) -> None:
    begin = "-----BEGIN " + "PRIVATE KEY-----"
    done = run(tmp_path, f"raise ValueError('''{begin}\\nAAAA\\n-----END PRIVATE KEY-----''')")
    assert "AAAA" not in done.stdout
    assert "<redacted>" in done.stdout
    assert "AAAA" not in done.stderr.split("ValueError: ", 1)[1]


def test_a_syntax_error_is_the_scripts_and_names_the_line(tmp_path: Path) -> None:
    done = run(tmp_path, "x = 1\ny = = 2\n")
    assert done.stdout.startswith("ERROR CLO-1506 the script failed at line 2: SyntaxError")


def test_an_exit_code_is_a_failure_and_zero_is_none(tmp_path: Path) -> None:
    assert run(tmp_path, "raise SystemExit(0)").stdout == ""
    assert run(tmp_path, "import sys; sys.exit()").stdout == ""
    assert run(tmp_path, "raise SystemExit(3)").stdout == "ERROR CLO-1506 the script ended with exit code 3\n"


def test_an_error_with_a_code_of_its_own_keeps_it(tmp_path: Path) -> None:
    script = "from cloister.errors import *\nraise CloisterError(Code.DATA_INVALID, what='row 7 is broken')"
    assert run(tmp_path, script).stdout == "ERROR CLO-1011 row 7 is broken\n"


def test_a_lost_peer_is_told_apart_from_a_failure_of_the_script(tmp_path: Path) -> None:
    script = "import torch.distributed as d\nraise {}('Connection closed by peer [127.0.0.1]:1')"
    lost = ("RuntimeError", "d.DistBackendError", "d.DistStoreError")
    done = run(tmp_path, *(script.format(error) for error in (*lost, "ValueError")))
    codes = [line.split()[1] for line in done.stdout.splitlines()]
    assert codes == ["CLO-1508", "CLO-1508", "CLO-1508", "CLO-1506"]
