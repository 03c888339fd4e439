# SPDX-License-Identifier: Apache-2.0
"""An owner seals, goes on after an interruption, re-wraps, pipes, and brings old data over: at a shell."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from cloister.sealed.directory import SealedDirectory
from cloister.sealed.format import Header
from cloister.sealed.journal import MARKER_NAME
from cloister.sealed.manifest import MANIFEST_NAME

from .conftest import Shell

KEY = "cloister-key://demo/datasets/sealing"
CLOSED = "cloister-key://demo/datasets/closed"


@pytest.fixture(scope="module")
def owner(running: Shell) -> Shell:
    """A running stack with a key that opens here, and one that does not."""
    running.run("key", "create", KEY, "--purpose", "export")
    running.run("key", "create", CLOSED, "--purpose", "train")
    return running


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain"
    (path / "sub").mkdir(parents=True)
    for number in range(20):
        (path / "sub" / f"{number}.jsonl").write_text(f'{{"text": "confidential {number}"}}\n' * 100)
    return path


def same(one: Path, other: Path) -> bool:
    return {p.relative_to(one): p.read_bytes() for p in one.rglob("*") if p.is_file()} == {
        p.relative_to(other): p.read_bytes() for p in other.rglob("*") if p.is_file()
    }


def test_a_directory_is_sealed_signed_looked_at_and_opened(owner: Shell, plain: Path, tmp_path: Path) -> None:
    sealed = owner.json("seal", plain, "-o", tmp_path / "sealed", "--key", KEY, "--name", "first")
    signer = owner.json("key", "signer")["signer"]
    assert (sealed["version"], sealed["signer"]) == (1, signer)
    info = owner.json("sealed", "info", tmp_path / "sealed")
    assert (info["manifest_digest"], info["signature"]) == (sealed["manifest_digest"], f"signed by {signer}")
    assert len(owner.json("sealed", "ls", tmp_path / "sealed")["files"]) == 20
    owner.run("sealed", "verify", tmp_path / "sealed", "--signer", signer)
    owner.run("sealed", "verify", tmp_path / "sealed", "--signer", signer, "--without-key")
    other = "did:key:z6MkhaXgBZDvotDkL5257faiztiGiC2QtKLGpbnnEGta2doK"
    owner.run("sealed", "verify", tmp_path / "sealed", "--signer", other, expect=3)
    owner.run("open", tmp_path / "sealed", "-o", tmp_path / "opened", "--signer", signer)
    assert same(plain, tmp_path / "opened")


def test_an_older_version_of_a_data_set_opens_no_more(owner: Shell, plain: Path, tmp_path: Path) -> None:
    owner.run("seal", plain, "-o", tmp_path / "v1", "--key", KEY, "--name", "versions")
    (plain / "more.jsonl").write_text("{}\n")
    second = owner.json("seal", plain, "-o", tmp_path / "v2", "--key", KEY, "--name", "versions")
    assert second["version"] == 2
    owner.run("open", tmp_path / "v2", "-o", tmp_path / "opened")
    assert "dataset.version" in owner.run("open", tmp_path / "v1", "-o", tmp_path / "old", expect=3).err


def test_interrupted_sealing_goes_on_with_the_same_key(owner: Shell, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "sealed"
    for number in range(400):
        (plain / f"{number}.bin").write_bytes(os.urandom(20_000))
    running = owner.start("seal", plain, "-o", out, "--key", CLOSED, "--name", "resumed")
    while running.poll() is None and not list(out.glob("*.sealed")):
        pass
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (out / MANIFEST_NAME).exists()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("*.sealed")}
    assert done
    ended = owner.run("seal", plain, "-o", out, "--key", CLOSED, "--name", "resumed")
    assert "going on" in ended.err
    kept = [name for name, when in done.items() if (out / name).stat().st_mtime_ns == when]
    assert len(kept) >= len(done) - 3  # those whose line in the journal was not there yet
    assert not (out / MARKER_NAME).exists()
    owner.run("sealed", "verify", out, "--without-key")
    owner.run("open", out, "-o", tmp_path / "opened", expect=3)  # the key has no purpose export


def test_a_rotated_key_is_put_into_the_headers(owner: Shell, plain: Path, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    before = owner.json("seal", plain, "-o", sealed, "--key", KEY, "--name", "rotated")
    content = {path.name: path.read_bytes()[-200:] for path in sealed.rglob("*.sealed")}
    version = owner.json("key", "rotate", KEY)["version"]
    (done,) = owner.json("sealed", "rewrap", sealed)["rewrapped"]
    assert (done["key_version"], done["files"]) == (version, 20)
    assert SealedDirectory.peek(sealed).key_version == version
    assert {path.name: path.read_bytes()[-200:] for path in sealed.rglob("*.sealed")} == content
    assert owner.json("sealed", "info", sealed)["manifest_digest"] == before["manifest_digest"]
    owner.run("open", sealed, "-o", tmp_path / "opened")
    assert same(plain, tmp_path / "opened")


def test_pipes_carry_ciphertext_one_way_and_plaintext_the_other(owner: Shell, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    sealing = subprocess.run(owner.argv("seal", "-", "-o", "-", "--key", KEY), input=content, capture_output=True)
    assert sealing.returncode == 0, sealing.stderr
    assert sealing.stdout[:8] == b"CLOISTER"
    opening = subprocess.run(owner.argv("open", "-", "-o", "-"), input=sealing.stdout, capture_output=True)
    assert (opening.returncode, opening.stdout) == (0, content)
    cut = subprocess.run(owner.argv("open", "-", "-o", "-"), input=sealing.stdout[:-1], capture_output=True)
    assert (cut.returncode, cut.stdout) == (3, b"")
    (tmp_path / "one.sealed").write_bytes(sealing.stdout)
    owner.run("open", tmp_path / "one.sealed", "-o", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == content
    owner.run("seal", tmp_path / "one", "-o", tmp_path / "two.sealed", "--key", KEY)
    with (tmp_path / "two.sealed").open("rb") as file:
        assert Header.read(file).associated.path == "one"


def test_columns_of_a_table_are_sealed_and_opened(owner: Shell, tmp_path: Path) -> None:
    table, out, back = tmp_path / "patients.csv", tmp_path / "out.csv", tmp_path / "back.csv"
    rows = [["id", "name", "code"], ["1", "王芳", "J45"], ["2", "Jo, S.", "E11"]]
    with table.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    owner.run("seal", table, "-o", out, "--key", KEY, "--column", "name")
    text = out.read_text()
    assert "王芳" not in text
    assert "J45" in text
    assert owner.json("sealed", "info", out)["sealed_columns"] == ["name"]
    owner.run("open", out, "-o", back)
    assert back.read_bytes() == table.read_bytes()
    out.write_text("\n".join(text.splitlines()[:-1]) + "\n")
    assert "2 rows and has 1" in owner.run("open", out, "-o", tmp_path / "no.csv", expect=3).err
    assert not (tmp_path / "no.csv").exists()


def test_old_encrypted_files_are_brought_over(owner: Shell, tmp_path: Path) -> None:
    key, old = Fernet.generate_key(), tmp_path / "old"
    old.mkdir()
    (old / "train.bin").write_bytes(Fernet(key).encrypt(b"the rows"))
    (tmp_path / "key").write_bytes(key)
    arguments = ("import", "bigdl", old, "-o", tmp_path / "sealed", "--key", KEY, "--name", "imported")
    owner.run(*arguments, "--legacy-key", tmp_path / "key")
    owner.run("open", tmp_path / "sealed", "-o", tmp_path / "opened")
    assert (tmp_path / "opened" / "train.bin").read_bytes() == b"the rows"
    (tmp_path / "other").write_bytes(Fernet.generate_key())
    wrong = (*arguments[:4], tmp_path / "2", *arguments[5:], "--legacy-key", tmp_path / "other")
    assert "does not open" in owner.run(*wrong, expect=2).err


def test_what_cannot_be_meant_is_refused_before_anything_is_done(owner: Shell, tmp_path: Path) -> None:
    missing = owner.run("seal", tmp_path / "nowhere", "-o", tmp_path / "x", "--key", KEY, expect=5)
    assert "nowhere" in missing.err
    pipe = owner.run("seal", "-", "-o", tmp_path / "directory", "--key", KEY, expect=2)
    assert "standard input" in pipe.err
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys
from pathlib import Path
import cloister, cloister.data

state, sealed, out = map(Path, sys.argv[1:4])
import torch
with cloister.session(key=sys.argv[4], state=state):
    rows = cloister.data.SealedDataset(sealed)
    cloister.data.save({"rows": torch.tensor(len(rows))}, out)
    print(rows[0]["text"], int(cloister.data.load(out)["rows"]))
"""


def test_an_owners_own_script_finds_its_keys_in_a_session(owner: Shell, plain: Path, tmp_path: Path) -> None:
    import sys

    owner.run("seal", plain, "-o", tmp_path / "sealed", "--key", KEY, "--name", "scripted")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    argv = [sys.executable, str(script), str(owner.state), str(tmp_path / "sealed"), str(tmp_path / "n.pt"), KEY]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "confidential 0 2000\n"
    owner.run("seal", plain, "-o", tmp_path / "closed", "--key", CLOSED, "--name", "scripted-closed")
    argv[3] = str(tmp_path / "closed")
    refused = subprocess.run(argv, capture_output=True, text=True, timeout=110)
    assert refused.returncode != 0
    assert "CLO-" in refused.stderr
