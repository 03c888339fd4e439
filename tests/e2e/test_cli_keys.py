# SPDX-License-Identifier: Apache-2.0
"""An owner's keys at a running stack: signed, imported, rotated, withdrawn, ended and called off from a shell."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cloister.cli.policyfile import PolicyDraft
from cloister.didkey import did_key
from cloister.dsse import RELEASE_POLICY, sign
from cloister.errors import Code
from fakes.signing import signing_key

from .conftest import Shell

pytestmark = pytest.mark.slow

OWNER = "spiffe://cloister.test/ns/demo/user/owner"


def a_policy(path: Path, uri: str, *, version: int = 1, previous: str = "") -> Path:
    draft = PolicyDraft(
        name="keys",
        owner=OWNER,
        key_uri=uri,
        purposes=["train"],
        scripts=["sha384:" + "00" * 48],
        identities=["spiffe://cloister.test/ns/demo/job/*/rank/*"],
        version=version,
        previous=previous,
    )
    path.write_text(draft.to_yaml())
    return path


def test_a_key_answers_to_its_owners_signing_key(running: Shell, tmp_path: Path) -> None:
    uri = "cloister-key://demo/keys/signed"
    signer = running.json("key", "signer")["signer"]
    created = running.json("key", "create", uri, "--policy", a_policy(tmp_path / "1.yaml", uri))
    assert (created["signer"], created["policy_version"], created["backend"]) == (signer, 1, "embedded")
    path = running.state / "user" / "signing-key.pem"
    assert path.stat().st_mode & 0o777 == 0o600

    # An envelope that was signed elsewhere is put in force with the owner's signature added to it.
    elsewhere = signing_key("a colleague")
    successor = a_policy(tmp_path / "2.yaml", uri, version=2, previous=created["policy_digest"])
    envelope = tmp_path / "2.json"
    envelope.write_bytes(sign(RELEASE_POLICY, successor.read_bytes(), elsewhere).to_bytes())
    assert running.json("key", "policy", uri, "--put", envelope)["policy_version"] == 2
    withdrawn = running.json("key", "policy", uri, "--withdraw")
    assert (withdrawn["policy_version"], withdrawn["policy_withdrawn"]) == (2, True)
    assert running.json("key", "policy", uri)["policy"] == successor.read_text()

    # With another signing key nothing of that key changes any more, and nothing is sealed with it.
    kept = path.rename(tmp_path / "kept.pem")
    try:
        third = a_policy(tmp_path / "3.yaml", uri, version=3, previous=withdrawn["policy_digest"])
        refused = running.run("key", "policy", uri, "--put", third, expect=3).err
        assert (Code.SIGNATURE_INVALID.text in refused, did_key(elsewhere) in refused) == (True, False)
        data = tmp_path / "data"
        data.mkdir()
        (data / "file").write_bytes(b"plain")
        refused = running.run("seal", data, "-o", tmp_path / "sealed", "--key", uri, expect=3).err
        assert "was not created with your signing key" in refused
        assert not (tmp_path / "sealed").exists()
    finally:
        kept.replace(path)
    assert running.json("key", "policy", uri, "--put", third)["policy_withdrawn"] is False


def test_the_life_of_a_key(running: Shell) -> None:
    uri = "cloister-key://demo/keys/life"
    running.run("key", "create", uri, "--purpose", "train")
    assert running.json("key", "rotate", uri)["version"] == 2
    assert running.json("key", "retire", uri, "--before", "2")["min_version"] == 2
    ending = running.json("key", "destroy", uri, "--days", "1")
    assert (ending["state"], bool(ending["destroy_at"])) == ("destruction-scheduled", True)
    assert Code.KEY_STATE.text in running.run("key", "enable", uri, expect=6).err
    assert running.json("key", "restore", uri)["state"] == "disabled"
    assert running.json("key", "enable", uri)["state"] == "enabled"
    assert uri in {key["uri"] for key in running.json("key", "list")["keys"]}


def test_a_key_is_imported_from_a_file_that_nobody_else_reads(running: Shell, tmp_path: Path) -> None:
    uri = "cloister-key://demo/keys/imported"
    material = tmp_path / "material"
    material.write_text(os.urandom(32).hex() + "\n")
    material.chmod(0o644)
    arguments = ("key", "import", uri, "--from", material, "--purpose", "train")
    assert "others may read it" in running.run(*arguments, expect=2).err
    material.chmod(0o600)
    assert running.json(*arguments)["imported"] is True
    material.write_text("not hexadecimal")
    assert "32 bytes" in running.run(*arguments, expect=2).err
