# SPDX-License-Identifier: Apache-2.0
"""Bad input at a running stack: every refusal names what it is about, and loses nothing."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from cloister.cli.measure import digest_of_file, job_script_path
from cloister.cli.policyfile import PolicyDraft
from cloister.data.sample import generate_sample

from .conftest import TINY, Shell

pytestmark = pytest.mark.slow

DATA_KEY = "cloister-key://demo/datasets/refusals"
OUT_KEY = "cloister-key://demo/models/refusals"


@pytest.fixture(scope="module")
def sealed(running: Shell) -> Path:
    """A sealed sample; both keys have a policy for the built-in job."""
    base = running.state.parent
    plain = base / "plain"
    plain.mkdir()
    generate_sample(plain, rows=72)
    for uri in (DATA_KEY, OUT_KEY):
        policy = base / "policy.yaml"
        policy.write_text(
            PolicyDraft(
                name="refusals",
                owner="spiffe://cloister.test/ns/demo/user/owner",
                key_uri=uri,
                purposes=["train"],
                scripts=[digest_of_file(job_script_path())],
                identities=["spiffe://cloister.test/ns/demo/job/*/rank/*"],
                simulated=True,
            ).to_yaml()
        )
        running.run("key", "create", uri, "--policy", policy)
    running.run("seal", plain, "-o", base / "sealed", "--key", DATA_KEY, "--check", "labelled-text")
    return base / "sealed"


def train(running: Shell, directory: Path, output: Path, *, expect: int, key: str = OUT_KEY) -> str:
    """Submit and follow a job on a directory; return what its owner reads."""
    arguments = ["--input", f"reviews={directory}", "--output", output, "--output-key", key, "--follow"]
    return running.run("train", "submit", *arguments, "--", *TINY, expect=expect).err


def copy_of(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "copy"))


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_the_untouched_directory_trains(running: Shell, sealed: Path, tmp_path: Path) -> None:
    assert "job succeeded" in train(running, sealed, tmp_path / "out", expect=0)
    assert (tmp_path / "out" / "model" / "model.safetensors.sealed").exists()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT as `save_pretrained` leaves it, with the characters of the sample as vocabulary."""
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("bert")
    generate_sample(directory / "words", rows=72)
    words = sorted({c for path in (directory / "words").iterdir() for c in path.read_text() if not c.isspace()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    )
    BertModel(config).save_pretrained(directory / "model")
    (directory / "model" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    return directory / "model"


def test_a_job_starts_from_a_local_checkpoint_which_is_sealed_first(
    running: Shell, sealed: Path, checkpoint: Path, tmp_path: Path
) -> None:
    arguments = ["--input", f"reviews={sealed}", "--output", tmp_path / "out", "--output-key", OUT_KEY, "--follow"]
    told = running.run("train", "submit", *arguments, "--model", checkpoint, "--", *TINY).err
    assert "job succeeded" in told
    assert (tmp_path / "out-base-model" / "model.safetensors.sealed").exists()
    # 24 is the checkpoint's width, 16 that of a new model by these arguments.
    weights = (checkpoint / "model.safetensors").stat().st_size
    trained = (tmp_path / "out" / "model" / "model.safetensors.sealed").stat().st_size
    assert trained == pytest.approx(weights, rel=0.25)
    again = [*arguments[:3], tmp_path / "again", *arguments[4:], "--model", tmp_path / "out-base-model", "--", *TINY]
    assert "job succeeded" in running.run("train", "submit", *again).err


def test_a_checkpoint_of_pickled_weights_is_refused(
    running: Shell, sealed: Path, checkpoint: Path, tmp_path: Path
) -> None:
    pickled = Path(shutil.copytree(checkpoint, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    arguments = ["--input", f"reviews={sealed}", "--output", tmp_path / "out", "--output-key", OUT_KEY, "--follow"]
    told = running.run("train", "submit", *arguments, "--model", pickled, "--", *TINY, expect=6).err
    assert "pickle" in told


def test_a_flipped_bit_in_a_sealed_file_names_the_file(running: Shell, sealed: Path, tmp_path: Path) -> None:
    directory = copy_of(sealed, tmp_path)
    flip(directory / "train.tsv.sealed", -100)
    text = train(running, directory, tmp_path / "out", expect=6)
    assert "CLO-1401" in text
    assert "train.tsv" in text


def test_a_changed_manifest_is_not_the_published_one_and_gets_no_key(
    running: Shell, sealed: Path, tmp_path: Path
) -> None:
    directory = copy_of(sealed, tmp_path)
    manifest = directory / "cloister-manifest.json"
    document = json.loads(manifest.read_text())
    document["version"] = 7
    manifest.write_text(json.dumps(document, sort_keys=True, separators=(",", ":")))
    text = train(running, directory, tmp_path / "out", expect=6)
    assert "block dataset.version" in text


@pytest.mark.usefixtures("sealed")
def test_an_older_version_of_a_file_is_refused_with_its_name(running: Shell, tmp_path: Path) -> None:
    older, directory = tmp_path / "older", tmp_path / "newer"
    for out in (older, directory):  # two versions of a data set of this test's own
        running.run("seal", running.state.parent / "plain", "-o", out, "--key", DATA_KEY, "--name", "versions")
    shutil.copy(older / "train.tsv.sealed", directory / "train.tsv.sealed")
    text = train(running, directory, tmp_path / "out", expect=6)
    assert "train.tsv" in text
    assert "CLO-14" in text


def test_a_renamed_and_a_removed_file_are_refused_with_their_names(
    running: Shell, sealed: Path, tmp_path: Path
) -> None:
    directory = copy_of(sealed, tmp_path)
    (directory / "train.tsv.sealed").rename(directory / "other.tsv.sealed")
    text = train(running, directory, tmp_path / "out", expect=6)
    assert "CLO-1403" in text
    assert "train.tsv" in text or "other.tsv" in text
    (directory / "dev.tsv.sealed").unlink()
    assert "dev.tsv is missing" in train(running, directory, tmp_path / "out", expect=3)


def test_a_disabled_key_fails_the_job_with_the_brokers_explanation(
    running: Shell, sealed: Path, tmp_path: Path
) -> None:
    running.run("key", "disable", DATA_KEY)
    try:
        text = train(running, sealed, tmp_path / "out", expect=6)
        assert "CLO-1303" in text
        assert "disabled" in text
    finally:
        running.run("key", "enable", DATA_KEY)
    decisions = running.json("key", "decisions", "--key", DATA_KEY)["decisions"]
    assert any(not decision["granted"] and decision["action"] == "release" for decision in decisions)


def test_a_script_that_the_policy_does_not_name_gets_no_key(running: Shell, sealed: Path, tmp_path: Path) -> None:
    script = tmp_path / "other.py"
    script.write_text("print('hello')\n")
    arguments = ["--input", f"reviews={sealed}", "--follow"]
    text = running.run("train", "submit", script, *arguments, expect=6).err
    assert "CLO-1304" in text
    assert "script" in text


@pytest.mark.parametrize("command", ["show", "disable", "policy"])
def test_another_tenants_key_cannot_be_told_from_one_that_is_not_there(running: Shell, command: str) -> None:
    foreign = running.json("key", command, "cloister-key://other/datasets/x", expect=5)["error"]
    missing = running.json("key", command, "cloister-key://demo/datasets/x", expect=5)["error"]
    assert foreign["code"] == missing["code"] == "CLO-1301"


def test_nothing_is_sealed_with_another_tenants_key(running: Shell, tmp_path: Path) -> None:
    plain = running.state.parent / "plain"
    running.run("seal", plain, "-o", tmp_path / "out", "--key", "cloister-key://other/datasets/x", expect=5)
    assert not (tmp_path / "out").exists()


def test_a_drafted_policy_is_one_that_the_broker_takes(running: Shell, tmp_path: Path) -> None:
    uri = "cloister-key://demo/models/drafted"
    policy = tmp_path / "policy.yaml"
    policy.write_text(running.json("key", "draft-policy", uri, "--purpose", "train", "--purpose", "serve")["policy"])
    assert running.run("key", "draft-policy", uri, "--purpose", "train", "--purpose", "serve").out == policy.read_text()
    assert running.json("key", "create", uri, "--policy", policy)["policy_version"] == 1


def test_a_key_is_created_once(running: Shell, sealed: Path) -> None:
    error = running.json("key", "create", DATA_KEY, "--purpose", "train", expect=6)["error"]
    assert error["code"] == "CLO-1302"


def test_a_broken_row_is_named_before_anything_is_written(running: Shell, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "train.tsv").write_text("label\ttext_a\n1\tgood\nno tab here\n", encoding="utf-8")
    arguments = ["seal", plain, "-o", tmp_path / "out", "--key", DATA_KEY, "--check", "labelled-text"]
    error = running.run(*arguments, expect=2).err
    assert "train.tsv" in error
    assert "3" in error
    assert not (tmp_path / "out").exists()


def test_a_key_without_the_purpose_export_opens_nothing_here(running: Shell, sealed: Path, tmp_path: Path) -> None:
    running.run("open", sealed, "-o", tmp_path / "out", expect=3)
    assert not (tmp_path / "out").exists()


def test_what_was_sealed_for_export_comes_back_byte_for_byte(running: Shell, sealed: Path, tmp_path: Path) -> None:
    uri = "cloister-key://demo/datasets/export"
    running.run("key", "create", uri, "--purpose", "export")
    plain = running.state.parent / "plain"
    running.run("seal", plain, "-o", tmp_path / "sealed", "--key", uri)
    running.run("open", tmp_path / "sealed", "-o", tmp_path / "opened")
    for path in plain.iterdir():
        assert (tmp_path / "opened" / path.name).read_bytes() == path.read_bytes()
    running.run("open", tmp_path / "sealed", "-o", tmp_path / "opened", expect=6)


def test_a_second_stack_in_the_same_directory_is_refused(running: Shell) -> None:
    error = running.json("dev", "up", expect=6)["error"]
    assert error["code"] == "CLO-1008"
    assert running.json("dev", "status")["services"][0]["ok"]


def test_a_taken_port_is_named(shell: Shell) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        error = shell.json("dev", "up", "--detach", "--https-port", str(port), expect=6)["error"]
    assert error["code"] == "CLO-1009"
    assert str(port) in error["what"]
    assert shell.processes() == []


def test_an_unknown_model_is_an_error_over_both_ways_in(running: Shell) -> None:
    for way in ([], ["--http"]):
        assert running.json("predict", "--model", "nobody", "text", *way, expect=5)["error"]["code"] == "CLO-1601"


def test_doctor_finds_nothing_wrong_and_verdicts_show_every_service(running: Shell) -> None:
    assert all(finding["ok"] for finding in running.json("doctor")["findings"])
    roles = {verdict["role"] for verdict in running.json("attest", "verdicts", "--limit", "200")["verdicts"]}
    assert {"attest", "keybroker", "trainer", "gateway"} <= roles
