# SPDX-License-Identifier: Apache-2.0
"""A policy's example cases come out as they say, or the policy is refused; they go through the very decision."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.policyblocks import digest_text
from cloister.release.cases import check_cases, outcome_of, run_cases
from cloister.release.claims import MAX_CASES
from cloister.release.policy import ReleasePolicy, parse_policy
from fakes.keybroker_harness import TENANT, TRUST_DOMAIN, as_yaml, policy_document

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
OTHER = digest_text(b"\x99" * 48)
APPROVERS = [did_key(Ed25519PrivateKey.from_private_bytes(bytes([n] * 32))) for n in range(3)]
BACKEND = f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/model/reviews/backend/b-0"
# Every block that a policy can have, so that every claim of a case has something to fail at.
STRICT: dict[str, Any] = {
    "tee": {
        "type": "tdx",
        "simulated": "deny",
        "tcb": {"status": ["UpToDate", "OutOfDate"], "min_date": "2026-02-11", "advisories": {"allow": []}},
        "collateral": {"max_age": "35d"},
        "platforms": {"piid": ["05" * 16]},
    },
    "measurements": {name: [f"{n:02}" * 48] for n, name in enumerate(("mr_td", "mr_seam", "rtmr0", "rtmr1", "rtmr2"))},
    "workload": {
        "script": [digest_text(b"\x23" * 48)],
        "environment": [digest_text(b"\x21" * 48)],
        "config": [digest_text(b"\x24" * 48)],
        "datasets": [digest_text(b"\x25" * 48)],
        "no_events_after": "cloister.workload.sealed",
    },
    "channel": {"key_exchange": ["X25519MLKEM768"]},
}


def a_policy(*cases: dict[str, Any], **when: Any) -> ReleasePolicy:
    document = policy_document(**{**STRICT, **when})
    document["spec"]["key"] |= {"purposes": ["train"], "versions": {"min": "3"}}
    document["spec"]["release"] = {"max_per_job": "8", "approvals": {"threshold": "2", "of": APPROVERS}}
    if cases:
        document["spec"]["cases"] = list(cases)
    return parse_policy(as_yaml(document))


def denied(block: str, **claims: Any) -> dict[str, Any]:
    return {"name": f"not {block}", "set": claims, "expect": "deny", "block": block}


def test_what_the_policy_accepts_is_where_a_case_begins() -> None:
    (result,) = run_cases(a_policy({"name": "the job", "expect": "allow"}), NOW)
    assert result.ok
    assert result.decision.granted
    names = {block.name for block in result.decision.blocks}
    assert {"tee.collateral.max_age", "measurements.rtmr2", "workload.datasets", "release.approvals"} <= names


@pytest.mark.parametrize(
    ("block", "claim", "value"),
    [
        ("policy.key.purposes", "purpose", "evaluate"),
        ("policy.key.versions", "key.version", "2"),
        ("key.state", "key.state", "destruction-scheduled"),
        ("token.status", "token.status", "contraindicated"),
        ("tee.debug", "tee.debug", "true"),
        ("tee.simulated", "tee.simulated", "true"),
        ("tee.tcb.status", "tee.tcb.status", "SWHardeningNeeded"),
        ("tee.tcb.status", "tee.tcb.status", "Revoked"),
        ("tee.tcb.status", "tee.tcb.status", "missing"),
        ("tee.tcb.min_date", "tee.tcb.date", "2026-02-10"),
        ("tee.tcb.min_date", "tee.tcb.date", "missing"),
        ("tee.tcb.advisories", "tee.tcb.advisories", ["INTEL-SA-00837"]),
        ("tee.collateral.max_age", "tee.collateral.age", "36d"),
        ("tee.collateral.max_age", "tee.collateral.age", "missing"),
        ("tee.platforms.piid", "tee.platforms.piid", "06" * 16),
        ("tee.platforms.piid", "tee.platforms.piid", "missing"),
        ("measurements.mr_td", "measurements.mr_td", "99" * 48),
        ("measurements.mr_seam", "measurements.mr_seam", "99" * 48),
        ("measurements.rtmr0", "measurements.rtmr0", "99" * 48),
        ("measurements.rtmr1", "measurements.rtmr1", "99" * 48),
        ("measurements.rtmr2", "measurements.rtmr2", "99" * 48),
        ("workload.script", "workload.script", OTHER),
        ("workload.environment", "workload.environment", OTHER),
        ("workload.config", "workload.config", OTHER),
        ("workload.datasets", "workload.datasets", [digest_text(b"\x25" * 48), OTHER]),
        ("workload.datasets", "workload.datasets", []),
        ("identity.spiffe", "identity.spiffe", BACKEND),
        ("channel.key_exchange", "channel.key_exchange", "X25519"),
        ("evidence.max_age", "evidence.age", "6m"),
        ("evidence.nonce", "evidence.nonce", "verifier"),
        ("release.max_per_job", "release.count", "8"),
        ("release.approvals", "release.approvals", "1"),
    ],
)
def test_every_claim_of_a_case_reaches_its_block(block: str, claim: str, value: Any) -> None:
    (result,) = run_cases(a_policy(denied(block, **{claim: value})), NOW)
    assert result.ok, str(result)


@pytest.mark.parametrize(
    ("claim", "value"),
    [
        ("tee.tcb.status", "OutOfDate"),
        ("tee.tcb.date", "2026-02-11"),
        ("tee.collateral.age", "35d"),
        ("release.count", "7"),
        ("release.approvals", "3"),
        ("evidence.age", "5m"),
        ("key.version", "4"),
        ("workload.script", digest_text(b"\x23" * 48)),
    ],
)
def test_what_the_policy_also_allows_passes(claim: str, value: str) -> None:
    check_cases(a_policy({"name": "as well", "set": {claim: value}, "expect": "allow"}), NOW)


def test_a_case_that_fails_is_named_with_what_came_out() -> None:
    policy = a_policy(
        {"name": "the job", "expect": "allow"},
        {"name": "any script", "set": {"workload.script": OTHER}, "expect": "allow"},
        denied("workload.config", **{"workload.script": OTHER}),
        denied("tee.simulated"),
    )
    assert [result.ok for result in run_cases(policy, NOW)] == [True, False, False, False]
    with pytest.raises(CloisterError) as caught:
        check_cases(policy, NOW)
    assert caught.value.code is Code.CASE_FAILED
    assert caught.value.what.startswith("3 of the 4 cases")
    assert caught.value.why.startswith("any script: wanted allowed; got denied by workload.script (wanted sha384:2323")


def test_a_policy_without_cases_passes() -> None:
    check_cases(a_policy(), NOW)


def test_a_warning_follows_from_a_platform_that_is_not_up_to_date() -> None:
    tee = {"type": "tdx", "tcb": {"status": ["UpToDate", "OutOfDate"]}}  # and no word about collateral
    check_cases(a_policy(denied("token.status", **{"tee.tcb.status": "OutOfDate"}), tee=tee), NOW)


def test_the_caller_of_a_case_is_one_who_may_ask_for_its_purpose() -> None:
    document = policy_document(identity={"spiffe": [f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/job/*/rank/*", BACKEND]})
    document["spec"]["cases"] = [
        {"name": "trains", "expect": "allow"},
        {"name": "serves", "set": {"purpose": "serve"}, "expect": "allow"},
    ]
    check_cases(parse_policy(as_yaml(document)), NOW)
    del document["spec"]["when"]["identity"]
    check_cases(parse_policy(as_yaml(document)), NOW)


def test_what_one_policy_accepts_can_be_tried_on_another() -> None:
    old, new = a_policy({"name": "the job", "expect": "allow"}), a_policy(workload={"script": [OTHER]})
    (case,) = old.cases
    assert outcome_of(new, case, NOW).granted  # what `new` itself accepts
    failed = outcome_of(new, case, NOW, accepted_by=old).failed
    assert failed is not None
    assert failed.name == "workload.script"


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ({"name": "a", "expect": "perhaps"}, "spec.cases[0].expect"),
        ({"expect": "allow"}, "spec.cases[0].name"),
        ({"name": "a", "expect": "deny"}, "spec.cases[0].block"),
        ({"name": "a", "expect": "deny", "block": ""}, "spec.cases[0].block"),
        ({"name": "a", "expect": "allow", "block": "tee.debug"}, "spec.cases[0].block"),
        ({"name": "a", "expect": "allow", "set": {"workload.skript": OTHER}}, "spec.cases[0].set.workload.skript"),
        ({"name": "a", "expect": "allow", "set": {"tee.debug": "yes"}}, "spec.cases[0].set.tee.debug"),
        ({"name": "a", "expect": "allow", "set": {"identity.spiffe": "x"}}, "spec.cases[0].set.identity.spiffe"),
        ({"name": "a", "expect": "allow", "set": ["x"]}, "spec.cases[0].set"),
        ({"name": "x" * 81, "expect": "allow"}, "spec.cases[0].name"),
        ({"name": "a\tb", "expect": "allow"}, "spec.cases[0].name"),
        ("a", "spec.cases[0]"),
    ],
)
def test_a_case_is_closed_and_typed_too(case: Any, place: str) -> None:
    with pytest.raises(CloisterError) as caught:
        a_policy(case)
    assert caught.value.code is Code.POLICY_INVALID
    assert caught.value.what.startswith(f"{place} (line 1)")


def test_cases_have_names_of_their_own_and_are_not_too_many() -> None:
    for cases in ([{"name": "a", "expect": "allow"}] * 2, [{"name": "a", "expect": "allow"}] * (MAX_CASES + 1)):
        with pytest.raises(CloisterError) as caught:
            a_policy(*cases)
        assert caught.value.code is Code.POLICY_INVALID


def test_a_case_changes_the_digest_of_its_policy() -> None:
    assert a_policy().digest != a_policy({"name": "the job", "expect": "allow"}).digest
