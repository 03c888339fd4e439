# SPDX-License-Identifier: Apache-2.0
"""Two policies compared: each difference is named, and said to let more pass or less."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.didkey import did_key
from cloister.policyblocks import digest_text
from cloister.release.difference import Change, changes, turned
from cloister.release.policy import ReleasePolicy, parse_policy
from fakes.keybroker_harness import OTHER_KEY, TENANT, TRUST_DOMAIN, Document, as_yaml, policy_document

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
A, B = (digest_text(bytes([n] * 48)) for n in (0xAA, 0xBB))
APPROVERS = [did_key(Ed25519PrivateKey.from_private_bytes(bytes([n] * 32))) for n in range(3)]
RANKS = f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/job/*/rank/*"
BACKENDS = f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/model/*/backend/*"


def with_value(place: str, value: Any) -> Document:
    """Return the standard policy with one place set, or without it when the value is None."""
    document = copy.deepcopy(policy_document())
    *path, last = place.split(".")
    block = document
    for step in path:
        block = block.setdefault(step, {})
    if value is None:
        block.pop(last, None)
    else:
        block[last] = value
    return document


def a_policy(place: str, value: Any) -> ReleasePolicy:
    return parse_policy(as_yaml(with_value(place, value)))


# place in the document, a value, a value that lets more pass (None: the block is left out), the place that is named
WIDER: list[tuple[str, Any, Any, str]] = [
    ("spec.key.versions", {"min": "3"}, {"min": "2"}, "spec.key.versions.min"),
    ("spec.key.versions", {"min": "3"}, None, "spec.key.versions.min"),
    ("spec.key.purposes", ["train"], ["train", "serve"], "spec.key.purposes"),
    ("spec.when.tee.simulated", "deny", "allow", "spec.when.tee.simulated"),
    ("spec.when.tee.simulated", None, "allow", "spec.when.tee.simulated"),
    (
        "spec.when.tee.tcb",
        {"status": ["UpToDate"]},
        {"status": ["UpToDate", "OutOfDate"]},
        "spec.when.tee.tcb.status",
    ),
    ("spec.when.tee.tcb", {"status": ["UpToDate"]}, None, "spec.when.tee.tcb.status"),
    (
        "spec.when.tee.tcb",
        {"status": ["UpToDate"], "min_date": "2026-02-11"},
        {"status": ["UpToDate"], "min_date": "2025-02-11"},
        "spec.when.tee.tcb.min_date",
    ),
    (
        "spec.when.tee.tcb",
        {"status": ["UpToDate"], "min_date": "2026-02-11"},
        {"status": ["UpToDate"]},
        "spec.when.tee.tcb.min_date",
    ),
    (
        "spec.when.tee.tcb",
        {"status": ["UpToDate"], "advisories": {"allow": []}},
        {"status": ["UpToDate"], "advisories": {"allow": ["INTEL-SA-00837"]}},
        "spec.when.tee.tcb.advisories.allow",
    ),
    (
        "spec.when.tee.tcb",
        {"status": ["UpToDate"], "advisories": {"allow": []}},
        {"status": ["UpToDate"]},
        "spec.when.tee.tcb.advisories.allow",
    ),
    ("spec.when.tee.collateral", {"max_age": "35d"}, {"max_age": "36d"}, "spec.when.tee.collateral.max_age"),
    ("spec.when.tee.collateral", {"max_age": "35d"}, None, "spec.when.tee.collateral.max_age"),
    (
        "spec.when.tee.platforms",
        {"piid": ["05" * 16]},
        {"piid": ["05" * 16, "06" * 16]},
        "spec.when.tee.platforms.piid",
    ),
    ("spec.when.tee.platforms", {"piid": ["05" * 16]}, None, "spec.when.tee.platforms.piid"),
    ("spec.when.measurements", {"mr_td": ["01" * 48]}, None, "spec.when.measurements.mr_td"),
    ("spec.when.workload.script", [A], [A, B], "spec.when.workload.script"),
    ("spec.when.workload.environment", [A], None, "spec.when.workload.environment"),
    ("spec.when.workload.config", [A], [B, A], "spec.when.workload.config"),
    ("spec.when.workload.datasets", [A], None, "spec.when.workload.datasets"),
    (
        "spec.when.workload.no_events_after",
        "cloister.workload.sealed",
        None,
        "spec.when.workload.no_events_after",
    ),
    ("spec.when.identity", {"spiffe": [RANKS]}, {"spiffe": [RANKS, BACKENDS]}, "spec.when.identity.spiffe"),
    ("spec.when.identity", {"spiffe": [RANKS]}, None, "spec.when.identity.spiffe"),
    ("spec.when.channel", {"key_exchange": ["X25519MLKEM768"]}, None, "spec.when.channel.key_exchange"),
    ("spec.when.evidence.max_age", "5m", "10m", "spec.when.evidence.max_age"),
    ("spec.when.evidence.nonce", "broker", "verifier", "spec.when.evidence.nonce"),
    ("spec.release.max_per_job", "8", "9", "spec.release.max_per_job"),
    ("spec.release.max_per_job", "8", None, "spec.release.max_per_job"),
    ("spec.release.lease", "1h", "2h", "spec.release.lease"),
    (
        "spec.release.approvals",
        {"threshold": "2", "of": APPROVERS},
        {"threshold": "1", "of": APPROVERS},
        "spec.release.approvals.threshold",
    ),
    (
        "spec.release.approvals",
        {"threshold": "1", "of": APPROVERS[:1]},
        {"threshold": "1", "of": APPROVERS},
        "spec.release.approvals.of",
    ),
    ("spec.release.approvals", {"threshold": "1", "of": APPROVERS}, None, "spec.release.approvals"),
    ("spec.change", {"approvals": {"threshold": "1", "of": APPROVERS}}, None, "spec.change.approvals"),
]


@pytest.mark.parametrize(("place", "strict", "wide", "named"), WIDER)
def test_a_change_lets_more_pass_one_way_and_less_the_other(place: str, strict: Any, wide: Any, named: str) -> None:
    narrow, broad = a_policy(place, strict), a_policy(place, wide)
    assert [(change.place, change.effect) for change in changes(narrow, broad)] == [(named, "wider")]
    assert [(change.place, change.effect) for change in changes(broad, narrow)] == [(named, "narrower")]


def test_equal_policies_differ_in_nothing() -> None:
    policy = parse_policy(as_yaml(policy_document()))
    assert not list(changes(policy, policy))
    assert not list(turned(policy, policy, NOW))
    # What is written out as the default is no change either.
    assert not list(changes(policy, a_policy("spec.when.tee.debug", None)))


def test_a_list_that_gains_and_loses_is_two_changes() -> None:
    old, new = a_policy("spec.when.workload.script", [A]), a_policy("spec.when.workload.script", [B])
    assert list(changes(old, new)) == [
        Change("spec.when.workload.script", "narrower", A, ""),  # type: ignore[arg-type]
        Change("spec.when.workload.script", "wider", "", B),  # type: ignore[arg-type]
    ]


def test_a_policy_that_begins_to_take_warnings_says_so() -> None:
    tcb = {"type": "tdx", "simulated": "allow", "tcb": {"status": ["UpToDate"]}}
    old, new = (
        parse_policy(as_yaml(policy_document(tee=tee))) for tee in (tcb, {**tcb, "collateral": {"max_age": "35d"}})
    )
    assert [(change.place, change.effect.value) for change in changes(old, new)] == [
        ("spec.when.tee.collateral.max_age", "narrower"),
        ("tokens with a warning", "wider"),
    ]


def test_names_keys_and_cases_are_neither_wider_nor_narrower() -> None:
    old = parse_policy(as_yaml(policy_document()))
    document = policy_document(OTHER_KEY)
    document["metadata"]["name"] = "other"
    document["spec"]["cases"] = [{"name": "the job", "expect": "allow"}]
    found = list(changes(old, parse_policy(as_yaml(document))))
    assert [change.place for change in found] == ["metadata.name", "spec.key.uri", "spec.cases: the job"]
    assert {change.effect.value for change in found} == {"other"}


def test_requests_on_which_two_policies_disagree_are_listed() -> None:
    document = with_value("spec.when.workload.script", [A, B])
    document["spec"]["cases"] = [
        {"name": "the second script", "set": {"workload.script": B}, "expect": "allow"},
        {
            "name": "no script",
            "set": {"workload.script": digest_text(bytes(48))},
            "expect": "deny",
            "block": "workload.script",
        },
    ]
    old, new = parse_policy(as_yaml(document)), a_policy("spec.when.workload.script", [A])
    (only,) = turned(old, new, NOW)
    assert (only.source, only.case, only.old.granted, only.new.granted) == ("old", "the second script", True, False)
    (back,) = turned(new, old, NOW)
    assert (back.source, back.case, back.old.granted, back.new.granted) == ("new", "the second script", False, True)
