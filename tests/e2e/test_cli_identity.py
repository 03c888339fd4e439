# SPDX-License-Identifier: Apache-2.0
"""An operator at a shell: users come and go, epochs change, and the stack goes on."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
from cryptography import x509

from .conftest import Shell

pytestmark = pytest.mark.slow

BOB = "spiffe://cloister.test/ns/demo/user/bob"


def test_a_user_is_registered_gets_a_certificate_and_is_revoked(running: Shell, tmp_path: Path) -> None:
    made = running.json("identity", "key", tmp_path / "bob.pem")
    assert (tmp_path / "bob.pem").stat().st_mode & 0o777 == 0o600
    issued = running.json("identity", "issue", "bob", "--key", made["request"], "--out", tmp_path / "bob.chain.pem")
    assert issued["spiffe_id"] == BOB
    leaf = x509.load_pem_x509_certificates((tmp_path / "bob.chain.pem").read_bytes())[0]
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [BOB]

    (bob,) = [row for row in running.json("identity", "list")["identities"] if row["spiffe_id"] == BOB]
    assert (bob["standing"], bob["revoked"], bob["spki_sha256"]) == ("user", False, issued["spki_sha256"])
    assert bob["added_by"] == "spiffe://cloister.test/ns/demo/user/owner"
    assert "user/bob" in running.run("identity", "list").out

    revoked = running.json("identity", "revoke", "identity", BOB, "--reason", "left")
    assert revoked["certificates"] == 1
    (row,) = running.json("identity", "list", "--revoked")["revoked"]
    assert (row["value"], row["reason"]) == (BOB, "left")
    assert "CLO-1216" in running.run("identity", "issue", "bob", "--key", made["request"], "--replace", expect=3).err
    running.json("identity", "readmit", "identity", BOB)
    assert running.json("identity", "remove", "bob")["removed"] == BOB
    assert all(row["spiffe_id"] != BOB for row in running.json("identity", "list")["identities"])


def test_mistakes_of_an_operator_are_named(running: Shell, tmp_path: Path) -> None:
    running.run("identity", "key", tmp_path / "eve.pem")
    assert "CLO-1004" in running.run("identity", "key", tmp_path / "eve.pem", expect=6).err
    csr, private = tmp_path / "eve.pem.csr", tmp_path / "eve.pem"
    for arguments, code, exit_code in (
        (("identity", "issue", "spiffe://cloister.test/ns/other/user/eve", "--key", csr), "CLO-1104", 3),
        (("identity", "issue", "Eve", "--key", csr), "CLO-1103", 3),
        (("identity", "issue", "eve", "--key", private), "CLO-1002", 2),
        (("identity", "issue", "owner", "--key", csr), "CLO-1243", 6),
        (("identity", "remove", "nobody"), "CLO-1244", 5),
        (("identity", "remove", "owner"), "CLO-1002", 2),
        (("attest", "retire-epoch", "never"), "CLO-1219", 5),
        (("attest", "close", "a/b"), "CLO-1002", 2),
        (("attest", "close", "none"), "CLO-1501", 5),
    ):
        assert code in running.run(*arguments, expect=exit_code).err


def test_epochs_change_and_end_beneath_a_running_stack(running: Shell) -> None:
    (first,) = running.json("attest", "epochs")["epochs"]
    assert first["state"] == "issuing"
    second = running.json("attest", "new-epoch")["epoch"]
    assert "CLO-1218" in running.run("attest", "new-epoch", expect=6).err
    states = {row["epoch"]: row["state"] for row in running.json("attest", "epochs")["epochs"]}
    assert states == {second: "announced", first["epoch"]: "issuing"}
    assert second in running.run("attest", "epochs").out
    retired = running.json("attest", "retire-epoch", first["epoch"])
    assert retired == {"retired": first["epoch"], "issuing": second}
    # Everybody enrols anew, within the time that services take to hear of it.
    deadline = time.monotonic() + 60
    while not _all_answer(running):
        assert time.monotonic() < deadline
    document = running.json("attest", "epochs")
    assert [row["epoch"] for row in document["epochs"]] == [second]
    running.run("key", "list")
    running.run("train", "list")
    running.run("model", "list")


def _all_answer(running: Shell) -> bool:
    command = running.argv("dev", "status")
    return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_workloads_are_listed(running: Shell) -> None:
    assert "workloads" in running.json("attest", "workloads", "--closed")
