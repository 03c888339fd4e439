# SPDX-License-Identifier: Apache-2.0
"""`cloister audit verify` on files: offline, with the log's key and nothing else; what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.cli.state import StateDirectory
from cloister.transparency.seen import Seen
from fakes.cli_runner import Ran, run
from fakes.log_case import Case

CASE = Case()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with all that was kept of a log."""
    contents = {
        "log": CASE.log_file(),
        "receipt": CASE.document().to_bytes(),
        "old": CASE.before,
        "new": CASE.after,
        "growth": CASE.growth().to_bytes(),
        "fork": CASE.key.checkpoint(size=11, root=bytes(32)),
        "old-fork": CASE.key.checkpoint(size=6, root=bytes(32)),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def verify(files: Path, *names: str, key: str = str(CASE.key.note_key)) -> Ran:
    state = files / "state"
    return run("audit", "verify", *(files / name for name in names), "--log-key", key, "--state", state, "--json")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("log",), ["log"]),
        (("receipt",), ["receipt"]),
        (("old",), ["checkpoint"]),
        (("growth",), ["proof of growth"]),
        (("old", "new", "growth"), ["checkpoint", "checkpoint", "proof of growth", "one log that only grew"]),
        (("new", "old", "log"), ["checkpoint", "checkpoint", "log", "one log that only grew"]),
        (("old", "old"), ["checkpoint", "checkpoint", "one log that only grew"]),
    ],
)
def test_what_was_kept_of_a_log_verifies_offline(files: Path, names: tuple[str, ...], found: list[str]) -> None:
    ran = verify(files, *names)
    assert (ran.code, ran.err) == (0, "")
    assert [row["what"] for row in ran.document["verified"]] == found


@pytest.mark.parametrize(
    ("names", "code", "text"),
    [
        (("fork", "new"), 3, "CLO-1382"),
        (("old-fork", "new", "log"), 3, "is not of the log"),
        (("old", "fork", "log"), 3, "fork is not of the log"),
        (("old", "fork", "growth"), 3, "CLO-1382"),
        (("old-fork", "new", "growth"), 3, "CLO-1382"),
        (("old", "new"), 2, "cloister audit prove old new"),
    ],
)
def test_two_checkpoints_of_a_forked_or_rewritten_log_are_told(
    files: Path, names: tuple[str, ...], code: int, text: str
) -> None:
    ran = verify(files, *names)
    assert (ran.code, text in ran.err) == (code, True), ran.err


@pytest.mark.parametrize("name", ["log", "receipt", "old", "growth"])
def test_under_another_logs_key_nothing_verifies(files: Path, name: str) -> None:
    ran = verify(files, name, key=str(Case().key.note_key))
    assert ran.code == 3
    assert "CLO-1381" in ran.err


def test_a_changed_file_is_refused(files: Path) -> None:
    for name in ("log", "receipt", "growth"):
        path = files / name
        whole = path.read_bytes()
        place = len(whole) // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 3]) + whole[place + 1 :])
        assert verify(files, name).code == 3


def test_a_file_of_another_kind_and_a_missing_one_are_named(files: Path) -> None:
    (files / "other").write_bytes(b"something else\n")
    assert "nothing that can be verified" in verify(files, "other").err
    assert verify(files, "other").code == 2
    assert verify(files, "missing").code == 5


def test_the_remembered_key_is_used_and_without_one_nothing_is_verified(files: Path) -> None:
    state = StateDirectory(files / "state")
    ran = run("audit", "verify", files / "receipt", "--state", state.root)
    assert ran.code == 6
    assert "--log-key" in ran.err
    assert verify(files, "receipt", key="nonsense").code == 2
    state.user.mkdir(parents=True)
    Seen(CASE.key.note_key, CASE.after).save(state.seen_log)
    assert run("audit", "verify", files / "receipt", "--state", state.root).code == 0


def test_what_was_remembered_can_be_forgotten_even_when_it_is_damaged(files: Path) -> None:
    state = StateDirectory(files / "state")
    state.user.mkdir(parents=True)
    Seen(CASE.key.note_key, CASE.after).save(state.seen_log)
    ran = run("audit", "forget", "--state", state.root, "--json")
    assert (ran.document["forgotten"], ran.document["size"]) == (True, 11)
    assert ran.document["checkpoint"].encode() == CASE.after
    state.seen_log.write_bytes(b"damaged")
    assert run("audit", "verify", files / "receipt", "--state", state.root).code == 2
    assert run("audit", "forget", "--state", state.root, "--json").document == {"forgotten": True}
    assert run("audit", "forget", "--state", state.root, "--json").document == {"forgotten": False}
