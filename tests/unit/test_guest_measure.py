# SPDX-License-Identifier: Apache-2.0
"""Claims about what a TD measures of itself: every package of ours, by name and content."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cloister
from cloister.errors import CloisterError, Code
from cloister.guest.measure import digest_of_sources, read_measured

PACKAGES = ["cloister", "cloister_attest", "cloister_keybroker", "cloister_serving", "cloister_trainer"]
MEASURE = (
    "from cloister.guest.measure import digest_of_environment, image_digest;"
    "print(digest_of_environment().hex(), image_digest().hex())"
)


def environment_of_a_fresh_process(first_on_path: Path) -> list[str]:
    env = {**os.environ, "PYTHONPATH": str(first_on_path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", MEASURE], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return environment_of_a_fresh_process(tmp_path_factory.mktemp("empty"))


def test_two_processes_measure_the_same_environment(unchanged: list[str], tmp_path: Path) -> None:
    assert environment_of_a_fresh_process(tmp_path) == unchanged


@pytest.mark.parametrize("package", PACKAGES)
def test_changed_code_of_any_package_of_ours_is_another_environment(
    package: str, unchanged: list[str], tmp_path: Path
) -> None:
    if package == "cloister":
        # The measuring code must run: a copy with one more file.
        shutil.copytree(Path(cloister.__file__).parent, tmp_path / package)
        (tmp_path / package / "planted.py").write_text("")
    else:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("# another one\n")
    changed = environment_of_a_fresh_process(tmp_path)
    assert changed[0] != unchanged[0]
    assert changed[1] != unchanged[1]


def package_of(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = tmp_path / name / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {"__init__.py": "", "a.py": "x = 2"},
        {"__init__.py": "", "b.py": "x = 1"},
        {"__init__.py": "", "a.py": "x = 1", "sub/c.py": ""},
        {"__init__.py": "x = 1", "a.py": ""},
    ],
    ids=["content", "name", "added", "moved"],
)
def test_sources_differ_by_content_name_and_place(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_of(tmp_path / "1", "measured", {"__init__.py": "", "a.py": "x = 1"})
    package_of(tmp_path / "2", "measured", {"__init__.py": "", "a.py": "x = 1"})
    package_of(tmp_path / "3", "measured", files)
    digests = []
    for place in ("1", "2", "3"):
        monkeypatch.syspath_prepend(tmp_path / place)
        digests.append(digest_of_sources("measured"))
    assert digests[0] == digests[1]
    assert digests[1] != digests[2]


def test_a_package_that_is_not_installed_cannot_be_measured() -> None:
    with pytest.raises(CloisterError) as caught:
        digest_of_sources("cloister_nothing_of_this_name")
    assert caught.value.code is Code.PREREQUISITE_MISSING


def test_a_file_is_read_once_and_too_large_ones_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_bytes(b"print(1)\n")
    measured = read_measured(script)
    script.write_bytes(b"print(2)\n")
    assert measured.data == b"print(1)\n"
    script.write_bytes(bytes(16 * 1024 * 1024 + 1))
    with pytest.raises(CloisterError) as caught:
        read_measured(script)
    assert caught.value.code is Code.ARGUMENT_INVALID
