# SPDX-License-Identifier: Apache-2.0
"""An owner audits the broker of a running stack; an operator then puts an older store in its place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .conftest import Shell

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "cloister-key://demo/datasets/audited"


def test_an_owner_reads_keeps_and_verifies_the_log_and_notices_a_rolled_back_store(
    shell: Shell, tmp_path: Path
) -> None:
    snapshot = tmp_path / "snapshot"
    shell.run("dev", "up", "--detach")
    try:
        shell.run("audit", "checkpoint")
        shutil.copytree(shell.state / "keybroker", snapshot)  # nothing is written meanwhile
        an_owner_reads_keeps_and_verifies_the_log(shell, tmp_path)
        shell.run("dev", "down")
        shutil.rmtree(shell.state / "keybroker")
        shutil.copytree(snapshot, shell.state / "keybroker")
        shell.run("dev", "up", "--detach")
        a_rolled_back_store_is_noticed(shell)
    finally:
        shell.run("dev", "down")


def an_owner_reads_keeps_and_verifies_the_log(shell: Shell, tmp_path: Path) -> None:
    old, new, growth, log = (tmp_path / name for name in ("old", "new", "growth", "log"))
    before = shell.json("audit", "checkpoint", "-o", old)
    shell.run("key", "create", KEY, "--purpose", "train")
    shell.run("key", "disable", KEY)
    after = shell.json("audit", "checkpoint", "-o", new)
    assert after["log_key"] == before["log_key"]
    assert after["size"] == before["size"] + 2

    plain, sealed, receipt = (tmp_path / name for name in ("plain", "sealed", "receipt"))
    plain.mkdir()
    (plain / "note.txt").write_text("kept")
    shell.run("key", "enable", KEY)
    shell.run("seal", plain, "-o", sealed, "--key", KEY, "--receipt", receipt)
    (kept,) = shell.json("audit", "verify", receipt)["verified"]
    assert (kept["what"], kept["action"], kept["key_uri"]) == ("receipt", "generate", KEY)
    after = shell.json("audit", "checkpoint", "-o", new)

    tail = shell.run("audit", "tail", "--key", KEY, "--json").out.splitlines()
    assert [json.loads(line)["action"] for line in tail][:4] == ["create-key", "disable", "enable", "generate"]
    newest = json.loads(tail[-1])
    shown = shell.run("audit", "show", str(newest["index"]))
    assert f"proven: entry {newest['index']}" in shown.err
    assert "key.owner" in shown.out
    assert "CLO-1380" in shell.run("audit", "show", "999", expect=5).err

    shell.run("audit", "prove", old, new, "-o", growth)
    exported = shell.json("audit", "export", log)
    assert (exported["log_size"], exported["readable"]) == (after["size"], after["size"])
    verified = shell.json("audit", "verify", old, new, growth, log)["verified"]
    assert verified[-1]["what"] == "one log that only grew"
    assert shell.json("audit", "verify")["verified"][0]["log_size"] == after["size"]


def a_rolled_back_store_is_noticed(shell: Shell) -> None:
    for command in (("audit", "checkpoint"), ("key", "create", f"{KEY}-2", "--purpose", "train")):
        error = shell.run(*command, expect=3).err
        assert "CLO-1382" in error
        assert "cloister audit forget" in error
    assert shell.json("audit", "forget")["forgotten"]
    shell.run("audit", "checkpoint")
