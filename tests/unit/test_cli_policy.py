# SPDX-License-Identifier: Apache-2.0
"""`cloister policy` on files alone: no broker, no certificate, no state directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import dsse
from cloister.ear import issue
from cloister.policyblocks import digest_text
from cloister.provisioning import SignedPolicy
from cloister.release.approvals import SignedApproval
from cloister.release.policy import parse_policy
from fakes.cli_runner import run
from fakes.ear_sample import sample_ear
from fakes.keybroker_harness import KEY, TENANT, as_yaml, policy_document

OTHER = digest_text(b"\x99" * 48)
JOB = {"name": "the job", "expect": "allow"}
ANOTHER = {"name": "another script", "set": {"workload.script": OTHER}, "expect": "deny", "block": "workload.script"}
WRONG = {"name": "wrong", "set": {"workload.script": OTHER}, "expect": "allow"}


def a_file(path: Path, *cases: Any, **when: Any) -> Path:
    document = policy_document(**when)
    if cases:
        document["spec"]["cases"] = list(cases)
    path.write_bytes(as_yaml(document))
    return path


@pytest.fixture
def token(tmp_path: Path) -> Path:
    path = tmp_path / "token.jwt"
    path.write_text(issue(sample_ear(), key=ec.generate_private_key(ec.SECP256R1()), key_id="1") + "\n")
    return path


def test_a_good_policy_is_valid_and_its_digest_is_told(tmp_path: Path) -> None:
    file = a_file(tmp_path / "policy.yaml", JOB, ANOTHER)
    found = run("policy", "validate", file, "--json")
    assert found.code == 0
    digest = digest_text(parse_policy(file.read_bytes()).digest)
    assert (found.document["digest"], found.document["key"], found.document["cases"]) == (digest, str(KEY), 2)
    assert digest in run("policy", "validate", file).out


def test_the_policy_in_a_signed_envelope_is_read_as_well(tmp_path: Path) -> None:
    file = a_file(tmp_path / "policy.yaml")
    envelope = dsse.sign(dsse.RELEASE_POLICY, file.read_bytes(), Ed25519PrivateKey.generate())
    signed = tmp_path / "policy.json"
    signed.write_bytes(envelope.to_bytes())
    assert run("policy", "validate", signed, "--json").document == run("policy", "validate", file, "--json").document


@pytest.mark.parametrize(
    ("text", "code"),
    [(b"kind: ReleasePolicy", "CLO-1305"), (b"", "CLO-1305"), (b'{"payloadType": "x"}', "CLO-1311")],
)
def test_what_is_no_policy_is_refused(tmp_path: Path, text: bytes, code: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_bytes(text)
    found = run("policy", "validate", file, "--json")
    assert (found.code, found.document["error"]["code"]) == (2, code)


def test_a_policy_whose_cases_fail_is_not_valid(tmp_path: Path) -> None:
    found = run("policy", "validate", a_file(tmp_path / "policy.yaml", WRONG), "--json")
    assert (found.code, found.document["error"]["code"]) == (2, "CLO-1320")


def test_a_policy_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    assert run("policy", "test", tmp_path / "none.yaml").code == 5


def test_every_case_is_shown(tmp_path: Path) -> None:
    file = a_file(tmp_path / "policy.yaml", JOB, ANOTHER)
    found = run("policy", "test", file, "--json")
    assert found.code == 0
    assert [(row["case"], row["ok"], row["got"]) for row in found.document["cases"]] == [
        ("the job", True, "allow"),
        ("another script", True, "workload.script"),
    ]
    assert "the policy has no cases" in run("policy", "test", a_file(tmp_path / "bare.yaml")).out


def test_a_failing_case_fails_the_command_and_is_still_shown(tmp_path: Path) -> None:
    file = a_file(tmp_path / "policy.yaml", JOB, WRONG)
    found = run("policy", "test", file, "--json")
    assert (found.code, found.document["exit_code"], found.document["error"]["code"]) == (2, 2, "CLO-1320")
    assert [row["ok"] for row in found.document["cases"]] == [True, False]
    told = run("policy", "test", file)
    assert told.code == 2
    assert "wrong: wanted allowed; got denied by workload.script" in told.out
    assert "error CLO-1320" in told.err


def test_a_difference_is_named_with_its_effect(tmp_path: Path) -> None:
    old = a_file(tmp_path / "old.yaml", JOB)
    new = a_file(
        tmp_path / "new.yaml",
        JOB,
        tee={"type": "tdx"},
        version=2,
        previous=parse_policy(old.read_bytes()).digest,
    )
    found = run("policy", "diff", old, new, "--json").document
    assert (found["same"], found["follows"]) == (False, True)
    (change,) = found["changes"]
    assert (change["effect"], change["place"]) == ("narrower", "spec.when.tee.simulated")
    back = run("policy", "diff", new, old)
    assert back.code == 0
    assert "wider" in back.out
    assert "NEW does not follow OLD" in back.out


def test_equal_policies_are_the_same(tmp_path: Path) -> None:
    file = a_file(tmp_path / "policy.yaml")
    assert run("policy", "diff", file, file, "--json").document["same"] is True
    assert "the policies allow the same" in run("policy", "diff", file, file).out


def test_a_token_is_explained_without_a_broker(tmp_path: Path, token: Path) -> None:
    granted = run("policy", "explain", a_file(tmp_path / "a.yaml"), "--token", token, "--json")
    assert (granted.code, granted.document["granted"]) == (0, True)
    denied = run("policy", "explain", a_file(tmp_path / "b.yaml", tee={"type": "tdx"}), "--token", token)
    assert denied.code == 0
    assert "wanted a hardware TD" in denied.out
    assert "denied by tee.simulated" in denied.out


def test_what_is_no_token_is_refused(tmp_path: Path) -> None:
    file, token = a_file(tmp_path / "a.yaml"), tmp_path / "token.jwt"
    for text in (b"", b"a.b.c", b"\xff", b"x" * 20_000):
        token.write_bytes(text)
        found = run("policy", "explain", file, "--token", token, "--json")
        assert (found.code, found.document["error"]["code"]) == (3, "CLO-1211")


def test_a_policy_is_signed_by_one_after_the_other_without_a_broker(tmp_path: Path) -> None:
    file = a_file(tmp_path / "policy.yaml", JOB)
    owner = run("policy", "sign", file, "--state", tmp_path / "owner", "--json").document
    signed = tmp_path / "policy.yaml.signed"
    assert (owner["file"], len(owner["signers"])) == (str(signed), 1)
    both = run("policy", "sign", signed, "--state", tmp_path / "approver", "--json").document
    assert both["file"] == str(signed)
    assert set(both["signers"]) > set(owner["signers"])
    again = run("policy", "sign", signed, "--state", tmp_path / "approver", "--json").document
    assert again["signers"] == both["signers"]
    assert SignedPolicy.verified(signed.read_bytes()).signers == set(both["signers"])
    assert run("policy", "validate", signed).code == 0


def test_a_policy_whose_cases_fail_is_not_signed(tmp_path: Path) -> None:
    found = run("policy", "sign", a_file(tmp_path / "policy.yaml", WRONG), "--state", tmp_path / "owner", "--json")
    assert (found.code, found.document["error"]["code"]) == (2, "CLO-1320")
    assert not (tmp_path / "policy.yaml.signed").exists()


def test_an_approval_is_made_without_a_broker_for_one_job_and_a_time(tmp_path: Path) -> None:
    signer = run("key", "signer", "--state", tmp_path / "approver", "--json").document
    document = policy_document()
    document["spec"]["release"]["approvals"] = {"threshold": "1", "of": [signer["signer"]]}
    file, out = tmp_path / "policy.yaml", tmp_path / "approval.json"
    file.write_bytes(as_yaml(document))
    options = ("--for", "2h", "-o", out, "--signing-key", signer["file"], "--json")
    made = run("policy", "approve", file, "--model", "reviews", *options).document
    assert (made["job"], made["purpose"], made["approver"]) == (f"{TENANT}/model/reviews", "serve", signer["signer"])
    approval = SignedApproval.verified(out.read_bytes())
    assert approval.statement.policy_digest == parse_policy(file.read_bytes()).digest
    left = approval.statement.expires_ms / 1000 - time.time()
    assert 7100 < left <= 7200


@pytest.mark.parametrize("what", [(), ("--token", "t", "--index", "1"), ("--token", "t")])
def test_what_is_to_be_explained_has_to_be_clear(what: tuple[str, ...]) -> None:
    found = run("policy", "explain", *what, "--json")
    assert (found.code, found.document["error"]["code"]) == (2, "CLO-1002")
