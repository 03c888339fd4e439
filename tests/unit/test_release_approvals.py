# SPDX-License-Identifier: Apache-2.0
"""An approval counts for what it names, by whom the policy asks, until it ends; a change needs its own."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister import dsse, strictjson
from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.approvals import LONGEST, ReleaseApproval, SignedApproval, change_block, check_approval
from cloister.release.keys import Purpose
from cloister.release.policy import ReleasePolicy, parse_policy
from fakes.keybroker_harness import KEY, TENANT, as_yaml, policy_document

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
KEYS = [Ed25519PrivateKey.from_private_bytes(bytes([n] * 32)) for n in range(4)]
NAMES = [did_key(key) for key in KEYS]
JOB = f"{TENANT}/job/j-1"


def a_policy(*, release: int = 2, change: int | None = None) -> ReleasePolicy:
    document = policy_document()
    document["spec"]["key"]["purposes"] = ["train"]
    if release:
        document["spec"]["release"]["approvals"] = {"threshold": str(release), "of": NAMES[:3]}
    if change is not None:
        document["spec"]["change"] = {"approvals": {"threshold": str(change), "of": NAMES[:3]}}
    return parse_policy(as_yaml(document))


def an_approval(policy: ReleasePolicy, **changes: Any) -> ReleaseApproval:
    expires = int((NOW + timedelta(hours=1)).timestamp() * 1000)
    statement = ReleaseApproval(
        key_uri=KEY, purpose=Purpose.TRAIN, job=JOB, policy_digest=policy.digest, expires_ms=expires
    )
    return dataclasses.replace(statement, **changes)


def ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def test_what_was_signed_is_read_back_with_its_signers() -> None:
    statement = an_approval(a_policy())
    envelope = statement.signed(*KEYS[:2])
    found = SignedApproval.verified(envelope)
    assert (found.statement, found.approvers, found.envelope) == (statement, frozenset(NAMES[:2]), envelope)


def test_only_signers_whom_the_policy_asks_count() -> None:
    policy = a_policy()
    signed = SignedApproval.verified(an_approval(policy).signed(KEYS[0], KEYS[3]))
    assert check_approval(signed, policy, NOW) == {NAMES[0]}


@pytest.mark.parametrize(
    ("changes", "keys", "why"),
    [
        ({"policy_digest": bytes(48)}, KEYS[:1], "another policy"),
        ({"purpose": Purpose.SERVE}, KEYS[:1], "nothing for serve"),
        ({}, KEYS[3:], "nobody who signed"),
        ({"expires_ms": ms(NOW)}, KEYS[:1], "expired"),
        ({"expires_ms": ms(NOW - timedelta(days=1))}, KEYS[:1], "expired"),
        ({"expires_ms": 0}, KEYS[:1], "expired"),
        ({"expires_ms": ms(NOW + LONGEST) + 1}, KEYS[:1], "longer than 30 days"),
    ],
)
def test_an_approval_of_no_use_is_refused(changes: dict[str, Any], keys: list[Ed25519PrivateKey], why: str) -> None:
    policy = a_policy()
    signed = SignedApproval.verified(an_approval(policy, **changes).signed(*keys))
    with pytest.raises(CloisterError) as caught:
        check_approval(signed, policy, NOW)
    assert caught.value.code is Code.APPROVAL_INVALID
    assert why in caught.value.why


def test_the_longest_approval_is_taken() -> None:
    policy = a_policy()
    signed = SignedApproval.verified(an_approval(policy, expires_ms=ms(NOW + LONGEST)).signed(KEYS[0]))
    assert check_approval(signed, policy, NOW)


def test_without_a_policy_that_asks_there_is_nothing_to_approve() -> None:
    policy = a_policy(release=0)
    signed = SignedApproval.verified(an_approval(policy).signed(KEYS[0]))
    for in_force in (policy, None):
        with pytest.raises(CloisterError) as caught:
            check_approval(signed, in_force, NOW)
        assert "asks for no approvals" in caught.value.why


@pytest.mark.parametrize(
    "job",
    [
        "hospital-b/job/j-1",  # another tenant than the key's
        f"{TENANT}/rank/j-1",
        f"{TENANT}/job/",
        f"{TENANT}/job/*",
        f"{TENANT}/job/j-1/rank/0",
        "job/j-1",
        "",
    ],
)
def test_a_job_is_named_exactly(job: str) -> None:
    with pytest.raises(CloisterError) as caught:
        SignedApproval.verified(an_approval(a_policy(), job=job).signed(KEYS[0]))
    assert caught.value.code is Code.ENVELOPE_INVALID


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "read"},
        {"policy_digest": "00"},
        {"key_uri": "hospital-a/datasets/reviews"},
        {"expires_ms": "1"},
        {"expires_ms": 2**53 - 1},
        {"more": "x"},
    ],
)
def test_a_statement_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    statement = {
        "key_uri": str(KEY),
        "purpose": "train",
        "job": JOB,
        "policy_digest": "00" * 48,
        "expires_ms": 1,
    }
    envelope = dsse.sign(dsse.RELEASE_APPROVAL, strictjson.dump(statement | change), KEYS[0]).to_bytes()
    with pytest.raises(CloisterError) as caught:
        SignedApproval.verified(envelope)
    assert caught.value.code is Code.ENVELOPE_INVALID


def test_a_signed_document_of_another_kind_is_no_approval() -> None:
    statement = strictjson.dump({"key_uri": str(KEY)})
    with pytest.raises(CloisterError) as caught:
        SignedApproval.verified(dsse.sign(dsse.RELEASE_POLICY, statement, KEYS[0]).to_bytes())
    assert caught.value.code is Code.ENVELOPE_INVALID


def test_an_edited_approval_is_refused() -> None:
    policy = a_policy()
    envelope = dsse.Envelope.parse(an_approval(policy).signed(KEYS[0]))
    other = dsse.Envelope.parse(an_approval(policy, job=f"{TENANT}/job/j-2").signed(KEYS[1]))
    with pytest.raises(CloisterError) as caught:
        SignedApproval.verified(dataclasses.replace(envelope, payload=other.payload).to_bytes())
    assert caught.value.code is Code.SIGNATURE_INVALID


@given(st.binary(max_size=400))
def test_any_signed_bytes_are_an_approval_or_refused(payload: bytes) -> None:
    envelope = dsse.sign(dsse.RELEASE_APPROVAL, payload, KEYS[0]).to_bytes()
    with pytest.raises(CloisterError) as caught:
        SignedApproval.verified(envelope)
    assert caught.value.code is Code.ENVELOPE_INVALID


OWNER = NAMES[0]


@pytest.mark.parametrize(
    ("signers", "ok"),
    [
        ([0, 1, 2], True),
        ([1, 2], True),
        ([0, 1], False),  # the owner signs anyway, and is no second person
        ([0, 1, 3], False),
        ([1], False),
        ([], False),
    ],
)
def test_a_change_needs_others_than_the_owner(signers: list[int], ok: bool) -> None:
    block = change_block(a_policy(change=2), frozenset(NAMES[n] for n in signers), OWNER)
    assert block is not None
    assert (block.name, block.ok) == ("change.approvals", ok)
    assert block.wanted == f"2 of {', '.join(NAMES[:3])}"


def test_a_policy_that_asks_nobody_is_changed_by_its_owner() -> None:
    assert change_block(a_policy(), frozenset({OWNER}), OWNER) is None
    assert change_block(None, frozenset({OWNER}), OWNER) is None


def test_a_rule_that_only_counts_on_the_owner_can_never_be_met() -> None:
    document = policy_document()
    document["spec"]["change"] = {"approvals": {"threshold": "1", "of": [OWNER]}}
    block = change_block(parse_policy(as_yaml(document)), frozenset({OWNER}), OWNER)
    assert block is not None
    assert not block.ok


def test_keys_of_other_tenants_have_jobs_of_their_own() -> None:
    other = KeyUri.parse("cloister-key://hospital-b/datasets/reviews")
    statement = an_approval(a_policy(), key_uri=other, job="hospital-b/job/j-1")
    assert SignedApproval.verified(statement.signed(KEYS[0])).statement.key_uri == other
