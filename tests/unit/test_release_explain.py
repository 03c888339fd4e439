# SPDX-License-Identifier: Apache-2.0
"""What a policy makes of a token alone, and what it would have made of a logged request."""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.didkey import did_key
from cloister.ear import Ear, TokenRejected
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role
from cloister.policyblocks import digest_text
from cloister.release.blocks import Block
from cloister.release.decide import Counters, Peer, Request, decide
from cloister.release.explain import LoggedRequest, explain_token, replay
from cloister.release.keys import KeyState, Purpose
from cloister.release.policy import ReleasePolicy, parse_policy
from cloister_keybroker.keys import KeyRecord
from fakes.ear_sample import NOW, sample_ear
from fakes.keybroker_harness import KEY, OWNER, RANK, TENANT, TRUST_DOMAIN, as_yaml, policy_document

NONCE = b"\x0b" * 32  # the second nonce of sample_ear
APPROVERS = [did_key(Ed25519PrivateKey.from_private_bytes(bytes([n] * 32))) for n in range(3)]
OTHER_SCRIPT = {"script": [digest_text(b"\x99" * 48)]}


def a_policy(release: dict[str, Any] | None = None, **when: Any) -> ReleasePolicy:
    document = policy_document(**when)
    document["spec"]["release"] |= release or {}
    return parse_policy(as_yaml(document))


def a_record(policy: ReleasePolicy, **changes: Any) -> KeyRecord:
    record = KeyRecord(
        uri=KEY,
        owner=str(OWNER),
        state=KeyState.ENABLED,
        purposes=frozenset(Purpose),
        newest=2,
        created_ms=0,
        signer="",
        policy_version=policy.version,
        policy_digest=policy.digest,
    )
    return dataclasses.replace(record, **changes)


def logged(
    policy: ReleasePolicy, ear: Ear | TokenRejected, *, nonce_problem: str = "", **changes: Any
) -> LoggedRequest:
    """Decide a request under the policy that was in force, and return what the log keeps of it."""
    key = changes.pop("key_record", None) or a_record(policy)
    digest = ear.hpke_key_digest if isinstance(ear, Ear) else bytes(48)
    certificate = ear.certificate_sha256 if isinstance(ear, Ear) else bytes(32)
    request = Request(KEY, 1, Purpose.TRAIN, NONCE, KEM_MLKEM768_X25519, digest)
    peer = Peer(RANK, changes.pop("certificate", certificate), "TLSv1.3", "X25519MLKEM768")
    counters = Counters(nonce_problem, 3, changes.pop("approvers", frozenset()))
    decision = decide(request, ear, peer, policy, key, counters, NOW)
    found = LoggedRequest(
        key=KEY,
        key_version=1,
        purpose=Purpose.TRAIN,
        caller=RANK,
        channel="TLSv1.3, X25519MLKEM768",
        time=NOW,
        renewal=False,
        blocks=decision.blocks,
        released_to_job=3,
    )
    return dataclasses.replace(found, **changes)


def failed(decision: Any) -> list[str]:
    return [block.name for block in decision.blocks if not block.ok]


def test_a_token_is_explained_block_by_block() -> None:
    decision = explain_token(a_policy(), sample_ear())
    assert decision.granted
    names = [block.name for block in decision.blocks]
    assert names[:3] == ["token.status", "policy.key.uri", "policy.key.versions"]
    assert "workload.script" in names
    assert not {"channel", "nonce", "token.certificate", "key.state", "evidence.max_age"} & set(names)


@pytest.mark.parametrize(
    ("block", "policy"),
    [
        ("tee.simulated", a_policy(tee={"type": "tdx"})),
        ("workload.script", a_policy(workload=OTHER_SCRIPT)),
        ("release.approvals", a_policy({"approvals": {"threshold": "1", "of": APPROVERS}})),
    ],
)
def test_what_the_policy_refuses_is_shown(block: str, policy: ReleasePolicy) -> None:
    assert failed(explain_token(policy, sample_ear())) == [block]


def test_the_age_of_a_token_is_not_held_against_it() -> None:
    old = sample_ear(now=NOW - timedelta(days=300))
    assert explain_token(a_policy(), old).granted


def test_a_token_over_the_verifiers_nonce_alone_would_not_do_where_the_brokers_is_wanted() -> None:
    ear = sample_ear(nonces=("0a" * 32,))
    assert failed(explain_token(a_policy(), ear)) == ["evidence.nonce"]
    assert explain_token(a_policy(evidence={"nonce": "verifier"}), ear).granted


def test_the_purpose_is_one_that_the_role_may_have() -> None:
    backends = {"spiffe": [f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/model/*/backend/*"]}
    ear = sample_ear(role=Role.BACKEND)
    decision = explain_token(a_policy(identity=backends), ear)
    assert decision.granted
    assert next(block.got for block in decision.blocks if block.name == "policy.key.purposes") == "serve"
    assert failed(explain_token(a_policy(identity=backends), ear, purpose=Purpose.TRAIN)) == ["key.purposes"]


def test_a_key_that_is_known_counts() -> None:
    policy = a_policy()
    key = a_record(policy, state=KeyState.DISABLED)
    assert failed(explain_token(policy, sample_ear(), key=key)) == ["key.state"]


def test_the_policy_that_decided_decides_the_same_again() -> None:
    policy = a_policy({"max_per_job": "8"})
    for ear in (sample_ear(), dataclasses.replace(sample_ear(), spiffe_id=str(OWNER))):
        request = logged(policy, ear)
        assert replay(policy, request, ear).blocks == request.blocks


def test_a_request_is_decided_again_under_another_policy() -> None:
    ear, wide, narrow = sample_ear(), a_policy(), a_policy(workload=OTHER_SCRIPT)
    granted, denied = logged(wide, ear), logged(narrow, ear)
    assert failed(replay(narrow, granted, ear)) == ["workload.script"]
    assert replay(wide, denied, ear).granted


def test_a_request_is_decided_at_its_own_time() -> None:
    ear = sample_ear()
    late = logged(a_policy(), ear)
    assert failed(replay(a_policy(), dataclasses.replace(late, time=NOW + timedelta(minutes=6)), ear)) == [
        "evidence.max_age"
    ]


@pytest.mark.parametrize(
    ("block", "changes"),
    [
        ("nonce", {"nonce_problem": "a nonce that has expired"}),
        ("token.certificate", {"certificate": bytes(32)}),
        ("key.state", {"key_record": a_record(a_policy(), state=KeyState.DISABLED)}),
        ("key.purposes", {"key_record": a_record(a_policy(), purposes=frozenset({Purpose.SERVE}))}),
    ],
)
def test_what_no_policy_has_a_say_in_stands_as_recorded(block: str, changes: dict[str, Any]) -> None:
    ear = sample_ear()
    assert block in failed(replay(a_policy(), logged(a_policy(), ear, **changes), ear))


def test_a_data_key_that_did_not_open_would_not_open_under_another_policy() -> None:
    ear = sample_ear()
    request = logged(a_policy(), ear)
    blocks = (*request.blocks, Block("data_key", False, "wrapped under version 1", "one that does not open"))
    assert failed(replay(a_policy(), dataclasses.replace(request, blocks=blocks), ear)) == ["data_key"]


@pytest.mark.parametrize(("group", "refused"), [("X25519MLKEM768", []), ("X25519", ["channel.key_exchange"])])
def test_a_policy_that_begins_to_want_a_key_exchange_finds_it_in_the_log(group: str, refused: list[str]) -> None:
    request = logged(a_policy(), sample_ear(), channel=f"TLSv1.3, {group}")
    policy = a_policy(channel={"key_exchange": ["X25519MLKEM768"]})
    assert failed(replay(policy, request, sample_ear())) == refused
    assert failed(explain_token(policy, sample_ear())) == []  # a token alone came over no channel


def test_without_the_token_nothing_would_be_granted() -> None:
    request = logged(a_policy(), sample_ear())
    assert failed(replay(a_policy(), request, None)) == ["token"]
    rejected = logged(a_policy(), TokenRejected("exp", "expired"))
    assert failed(replay(a_policy(), rejected, None)) == ["token"]


def test_counters_are_those_of_the_time() -> None:
    ear = sample_ear()
    request = logged(a_policy(), ear)
    assert replay(a_policy({"max_per_job": "4"}), request, ear).granted
    assert failed(replay(a_policy({"max_per_job": "3"}), request, ear)) == ["release.max_per_job"]
    renewal = dataclasses.replace(request, renewal=True)
    assert replay(a_policy({"max_per_job": "3"}), renewal, ear).granted


def test_approvals_are_those_of_the_time() -> None:
    ear = sample_ear()
    asked = a_policy({"approvals": {"threshold": "1", "of": APPROVERS}})
    request = logged(asked, ear, approvers=frozenset(APPROVERS[:2]))
    assert replay(a_policy({"approvals": {"threshold": "2", "of": APPROVERS}}), request, ear).granted
    others = a_policy({"approvals": {"threshold": "1", "of": APPROVERS[2:]}})
    assert failed(replay(others, request, ear)) == ["release.approvals"]
    assert failed(replay(asked, logged(a_policy(), ear), ear)) == ["release.approvals"]


def test_a_policy_that_begins_to_want_the_brokers_nonce_finds_it_in_the_log() -> None:
    ear = sample_ear()
    request = logged(a_policy(evidence={"nonce": "verifier"}), ear)
    assert replay(a_policy(), request, ear).granted
    without = sample_ear(nonces=("0a" * 32,))
    request = logged(a_policy(evidence={"nonce": "verifier"}), without)
    assert failed(replay(a_policy(), request, without)) == ["evidence.nonce"]
