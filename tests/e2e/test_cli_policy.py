# SPDX-License-Identifier: Apache-2.0
"""The life of a policy at a running stack: signed, approved of, looked back on, changed by more than one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from cloister.cli.measure import digest_of_file
from cloister.data.sample import generate_sample
from cloister.policyblocks import digest_text
from cloister.release.policy import parse_policy

from .conftest import Shell

pytestmark = pytest.mark.slow

KEY = "cloister-key://demo/datasets/approved"
SCRIPT = "import cloister.train\nprint(sorted(cloister.train.context().inputs), flush=True)\n"


class World:
    """A stack, an approver with a signing key elsewhere, and a key whose policy asks for both."""

    def __init__(self, shell: Shell, directory: Path) -> None:
        self.shell, self.directory = shell, directory
        self.approver = Shell(directory / "approver")
        self.script = directory / "script.py"
        self.script.write_text(SCRIPT)
        self.approver_name = self.approver.json("key", "signer")["signer"]
        self.policy = self.write("policy-1.yaml")
        shell.run("key", "create", KEY, "--policy", self.policy)
        generate_sample(directory / "plain", rows=24)
        shell.run("seal", directory / "plain", "-o", directory / "sealed", "--key", KEY)

    def write(self, name: str, *, after: Path | None = None, script: str | None = None) -> Path:
        """Write a policy, the first or the successor of another."""
        rule = f"{{threshold: 1, of: ['{self.approver_name}']}}"
        before = parse_policy(after.read_bytes()) if after else None
        follows = f", previous: '{digest_text(before.digest)}'" if before else ""
        path = self.directory / name
        path.write_text(
            f"""\
apiVersion: cloister.dev/v1
kind: ReleasePolicy
metadata: {{name: approved, version: {before.version + 1 if before else 1}{follows},
  owner: spiffe://cloister.test/ns/demo/user/owner}}
spec:
  key: {{uri: '{KEY}', purposes: [train]}}
  when:
    tee: {{type: tdx, simulated: allow}}
    workload: {{script: ['{script or digest_of_file(self.script)}']}}
  release: {{lease: 1h, approvals: {rule}}}
  change: {{approvals: {rule}}}
  cases:
    - {{name: the script, expect: allow}}
    - {{name: unapproved, set: {{release.approvals: 0}}, expect: deny, block: release.approvals}}
"""
        )
        return path

    def decisions(self) -> list[Any]:
        found: list[Any] = self.shell.json("key", "decisions", "--key", KEY)["decisions"]
        return found

    def submit_a_job(self) -> str:
        sealed = self.directory / "sealed"
        job = self.shell.json("train", "submit", self.script, "--nodes", "1", "--input", f"data={sealed}")
        return str(job["job_id"])


@pytest.fixture(scope="module")
def world(running: Shell) -> World:
    return World(running, running.state.parent)


def test_a_job_waits_for_approval_and_its_past_is_replayed(world: World) -> None:
    shell, approval = world.shell, world.directory / "approval.json"
    job = world.submit_a_job()
    deadline = time.monotonic() + 60
    while not any("release.approvals" in decision["failed"] for decision in world.decisions()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    made = world.approver.json("policy", "approve", world.policy, "--job", job, "--for", "1h", "-o", approval)
    assert (made["job"], made["approver"]) == (f"demo/job/{job}", world.approver_name)
    assert shell.json("policy", "submit", approval) == {"approvals": 1, "needed": 1, "enough": True}
    (listed,) = shell.json("policy", "approvals", KEY)["approvals"]
    assert (listed["job"], listed["purpose"], listed["approver"]) == (f"demo/job/{job}", "train", world.approver_name)
    shell.run("train", "watch", job)
    assert "data" in shell.run("train", "logs", job).out

    # What was asked is explained as it was decided, and as another policy would have.
    granted = next(
        decision for decision in world.decisions() if decision["granted"] and decision["action"] == "release"
    )
    explained = shell.json("policy", "explain", "--index", str(granted["index"]))
    assert explained["granted"]
    assert [block["name"] for block in explained["blocks"]] == [block["name"] for block in granted["blocks"]]
    other = world.write("other.yaml", after=world.policy, script=digest_text(bytes(48)))
    rows = [line for line in shell.run("policy", "replay", other, "--since", "1h").out.splitlines() if line]
    assert "loses" in rows[0]
    assert "workload.script" in rows[0]
    assert rows[-1].endswith("0 would gain access, 1 would lose it")
    assert "denied by workload.script" in shell.run("policy", "explain", other, "--index", str(granted["index"])).out


def test_a_policy_is_changed_with_the_signatures_of_both(world: World) -> None:
    shell = world.shell
    successor = world.write("policy-2.yaml", after=world.policy, script=digest_text(bytes(48)))
    refused = shell.json("key", "policy", KEY, "--put", successor, expect=3)["error"]
    assert (refused["code"], refused["block"]) == ("CLO-1321", "change.approvals")
    signed = shell.json("policy", "sign", successor)
    envelope = Path(signed["file"])
    assert envelope.name == "policy-2.yaml.signed"
    both = world.approver.json("policy", "sign", envelope)
    assert set(both["signers"]) == {*signed["signers"], world.approver_name}
    assert shell.json("key", "policy", KEY, "--put", envelope)["policy_version"] == 2


def test_an_approval_that_nobody_asked_for_is_not_even_made(world: World, tmp_path: Path) -> None:
    out = tmp_path / "approval.json"
    error = world.shell.json("policy", "approve", world.policy, "--job", "j-1", "-o", out, expect=3)["error"]
    assert error["code"] == "CLO-1322"
    for wrong in (
        ["--job", "a", "--model", "b"],
        [],
        ["--job", "j-1", "--for", "soon"],
        ["--job", "j-1", "--for", "31d"],
    ):
        world.approver.run("policy", "approve", world.policy, *wrong, "-o", out, expect=3 if "31d" in wrong else 2)
    assert not out.exists()
