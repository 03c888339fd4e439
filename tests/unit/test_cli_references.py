# SPDX-License-Identifier: Apache-2.0
"""`cloister references`: sets are signed here as attest wants them, and shown only when they verify."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cloister.appraisal.references import PAYLOAD_TYPE, open_reference_set
from cloister.dsse import Envelope
from fakes.cli_runner import run

HEX = "0a" * 48
SET = f"""\
apiVersion: cloister.dev/v1
kind: ReferenceSet
metadata: {{name: firmware, version: 3}}
spec: {{mr_td: ["{HEX}"]}}
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "firmware.yaml"
    path.write_text(SET)
    return path


def sign(source: Path, out: Path, state: Path) -> str:
    """Sign with the key of a state directory; return its name."""
    ran = run("references", "sign", source, "-o", out, "--state", state, "--json")
    assert ran.code == 0, ran.err
    signer = run("key", "signer", "--state", state, "--json").document["signer"]
    assert signer in ran.document["signers"]
    return str(signer)


def test_a_signed_set_is_what_attest_takes(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "firmware.dsse"
    signer = sign(source, out, tmp_path / "alice")
    found = open_reference_set(out.read_bytes(), name="firmware", signers=[signer])
    assert (found.name, found.version) == ("firmware", 3)
    ran = run("references", "show", out, "--signer", signer, "--json")
    assert ran.code == 0
    assert ran.document == {
        "name": "firmware",
        "version": 3,
        "digest": f"sha384:{found.digest.hex()}",
        "mr_td": [HEX],
        "signers": [signer],
    }


def test_several_sign_one_set(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "firmware.dsse"
    signers = [sign(source, out, tmp_path / "alice"), sign(out, out, tmp_path / "bob")]
    assert Envelope.parse(out.read_bytes()).signers(PAYLOAD_TYPE) == set(signers)
    sign(out, out, tmp_path / "bob")  # once more changes nothing
    options = [option for signer in signers for option in ("--signer", signer)]
    assert run("references", "show", out, *options, "--threshold", 2).code == 0
    assert run("references", "show", out, *options[:2], "--threshold", 2).code == 3


def test_what_does_not_verify_is_neither_shown_nor_signed_again(source: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "firmware.dsse", tmp_path / "again.dsse"
    sign(source, out, tmp_path / "alice")
    other = run("key", "signer", "--state", tmp_path / "bob", "--json").document["signer"]
    ran = run("references", "show", out, "--signer", other)
    assert (ran.code, "CLO-1217" in ran.err) == (3, True)
    envelope = json.loads(out.read_bytes())
    envelope["signatures"][0]["sig"] = "A" * 86 + "=="
    out.write_text(json.dumps(envelope))
    assert run("references", "show", out).code == 3
    assert run("references", "sign", out, "-o", again, "--state", tmp_path / "bob").code == 3
    assert not again.exists()


@pytest.mark.parametrize("text", [SET.replace("ReferenceSet", "AppraisalPolicy"), SET.replace("0a", "0A"), "{}", ""])
def test_what_is_no_set_is_not_signed(tmp_path: Path, text: str) -> None:
    source, out = tmp_path / "set.yaml", tmp_path / "set.dsse"
    source.write_text(text)
    assert run("references", "sign", source, "-o", out, "--state", tmp_path / "alice").code == 2
    assert not out.exists()


def test_a_key_may_be_named(source: Path, tmp_path: Path) -> None:
    key, out = run("key", "signer", "--state", tmp_path / "alice", "--json").document, tmp_path / "firmware.dsse"
    assert run("references", "sign", source, "-o", out, "--signing-key", key["file"], "--state", tmp_path).code == 0
    assert run("references", "show", out, "--signer", key["signer"]).code == 0
    assert run("references", "sign", source, "-o", out, "--signing-key", tmp_path / "none").code == 5
