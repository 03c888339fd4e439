# SPDX-License-Identifier: Apache-2.0
"""The release decision: each block alone decides, a missing claim is a denial, and the order is the protocol's."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.ear import Ear, TokenRejected
from cloister.errors import Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role, SpiffeId
from cloister.policyblocks import digest_text
from cloister.release.blocks import Block, Decision
from cloister.release.decide import Counters, Peer, Request, decide, denial, fresh_enough
from cloister.release.keys import KeyState, Purpose
from cloister.release.policy import ReleasePolicy, parse_policy
from cloister.tlv import sha384
from cloister_keybroker.keys import KeyRecord
from fakes.ear_sample import sample_ear
from fakes.keybroker_harness import KEY, OTHER_KEY, OWNER, RANK, TENANT, TRUST_DOMAIN, as_yaml, policy_document

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
NONCE = b"\x0b" * 32
HPKE_KEY = b"\x77" * 1216
BACKEND = SpiffeId.of_backend(TRUST_DOMAIN, tenant=TENANT, model="reviews", backend="b-0")
PEER = Peer(RANK, bytes(range(32)), "TLSv1.3", "X25519MLKEM768")
REQUEST = Request(KEY, 1, Purpose.TRAIN, NONCE, KEM_MLKEM768_X25519, sha384(HPKE_KEY))
COUNTERS = Counters("", 0)
SCRIPT = {"script": [digest_text(b"\x23" * 48)]}


def an_ear(role: Role = Role.RANK, tee: dict[str, Any] | None = None, **workload: Any) -> Ear:
    ear = sample_ear(role=role, now=NOW)
    return dataclasses.replace(
        ear,
        hpke_key_digest=sha384(HPKE_KEY),
        spiffe_id=str(RANK if role is Role.RANK else BACKEND),
        tee=dataclasses.replace(ear.tee, **(tee or {})),
        workload=dataclasses.replace(ear.workload, **workload),
    )


def a_policy(release: dict[str, str] | None = None, **when: Any) -> ReleasePolicy:
    document = policy_document(**when)
    if release is not None:
        document["spec"]["release"] = release
    return parse_policy(as_yaml(document))


def a_key(policy: ReleasePolicy, **changes: Any) -> KeyRecord:
    record = KeyRecord(
        uri=KEY,
        owner=str(OWNER),
        signer="did:key:z6Mk",
        state=KeyState.ENABLED,
        purposes=frozenset(Purpose),
        created_ms=0,
        policy_version=policy.version,
        policy_digest=policy.digest,
    )
    return dataclasses.replace(record, **changes)


def outcome(
    *,
    request: Request = REQUEST,
    ear: Ear | TokenRejected | None = None,
    peer: Peer = PEER,
    policy: ReleasePolicy | None = None,
    key: dict[str, Any] | None = None,
    counters: Counters = COUNTERS,
    now: datetime = NOW,
) -> Decision:
    policy = policy or a_policy()
    return decide(request, ear or an_ear(), peer, policy, a_key(policy, **(key or {})), counters, now)


def failed(decision: Decision) -> list[str]:
    return [block.name for block in decision.blocks if not block.ok]


def test_what_the_policy_asks_for_is_granted() -> None:
    decision = outcome()
    assert decision.granted
    assert failed(decision) == []
    assert decision.lease == timedelta(hours=1)


def test_the_order_is_the_protocols() -> None:
    everything = a_policy(
        release={"max_per_job": "1"},
        tee={
            "type": "tdx",
            "tcb": {"status": ["UpToDate"], "min_date": "2026-01-01", "advisories": {"allow": []}},
            "collateral": {"max_age": "35d"},
            "platforms": {"piid": ["05" * 16]},
        },
        measurements={"mr_td": ["01" * 48], "rtmr2": ["12" * 48]},
    )
    assert [block.name for block in outcome(policy=everything).blocks] == [
        "channel",
        "caller",
        "token",
        "token.subject",
        "token.certificate",
        "token.hpke_key",
        "token.status",
        "nonce",
        "policy",
        "policy.key.uri",
        "policy.key.versions",
        "policy.key.purposes",
        "tee.type",
        "tee.debug",
        "tee.simulated",
        "tee.tcb.status",
        "tee.tcb.min_date",
        "tee.tcb.advisories",
        "tee.collateral.max_age",
        "tee.platforms.piid",
        "measurements.mr_td",
        "measurements.rtmr2",
        "workload.script",
        "workload.no_events_after",
        "identity.spiffe",
        "evidence.max_age",
        "evidence.nonce",
        "release.wrap",
        "release.max_per_job",
        "key.version",
        "key.state",
        "key.purposes",
    ]


@pytest.mark.parametrize(
    ("block", "changes"),
    [
        ("channel", {"peer": dataclasses.replace(PEER, tls_version="TLSv1.2")}),
        ("token", {"ear": TokenRejected("exp", "expired")}),
        ("token.certificate", {"peer": dataclasses.replace(PEER, certificate_sha256=bytes(32))}),
        ("token.hpke_key", {"request": dataclasses.replace(REQUEST, hpke_key_digest=sha384(b"another"))}),
        ("token.status", {"ear": dataclasses.replace(an_ear(), status="warning"), "policy": a_policy(workload=SCRIPT)}),
        ("nonce", {"counters": Counters("a nonce that has expired", 0)}),
        ("policy.key.uri", {"request": dataclasses.replace(REQUEST, key=OTHER_KEY)}),
        ("policy", {"key": {"policy_version": 2}}),
        ("policy", {"key": {"policy_digest": bytes(48)}}),
        ("policy", {"key": {"owner": "spiffe://cloister.test/ns/hospital-a/user/other"}}),
        ("tee.debug", {"ear": an_ear(tee={"debug": True})}),
        ("tee.simulated", {"policy": a_policy(tee={"type": "tdx"})}),
        ("tee.simulated", {"policy": a_policy(tee={"type": "tdx", "simulated": "deny"})}),
        ("workload.script", {"ear": an_ear(script=b"\x99" * 48)}),
        ("evidence.max_age", {"now": NOW + timedelta(minutes=5, seconds=1)}),
        ("evidence.max_age", {"now": NOW - timedelta(seconds=31)}),
        ("evidence.nonce", {"request": dataclasses.replace(REQUEST, broker_nonce=b"\x0c" * 32)}),
        ("release.wrap", {"request": dataclasses.replace(REQUEST, hpke_kem_id=0x0020)}),
        ("key.version", {"request": dataclasses.replace(REQUEST, key_version=2)}),
        ("key.state", {"key": {"state": KeyState.DISABLED}}),
        ("key.purposes", {"key": {"purposes": frozenset({Purpose.SERVE})}}),
    ],
)
def test_one_wrong_thing_is_one_failed_block(block: str, changes: dict[str, Any]) -> None:
    decision = outcome(**changes)
    assert not decision.granted
    assert failed(decision) == [block]
    error = denial(REQUEST, decision)
    assert f"block {block}" in error.what
    assert "wanted" in error.why
    assert "got" in error.why


PLATFORM = {"tcb_status": "UpToDate", "tcb_date": "2026-02-11", "advisories": ("INTEL-SA-00837",)}
DATASET = b"\x25" * 48


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"tcb": {"status": ["UpToDate"]}}, PLATFORM, [{"tcb_status": "OutOfDate"}, {"tcb_status": None}]),
        (
            {"tcb": {"status": ["UpToDate"], "min_date": "2026-02-11"}},
            PLATFORM,
            [PLATFORM | {"tcb_date": date} for date in ("2026-02-10", None, "soon")],
        ),
        (
            {"tcb": {"status": ["UpToDate"], "advisories": {"allow": ["INTEL-SA-00837"]}}},
            PLATFORM,
            [PLATFORM | {"advisories": ("INTEL-SA-00837", "INTEL-SA-00001")}],
        ),
        ({"platforms": {"piid": ["05" * 16, "06" * 16]}}, {"piid": b"\x06" * 16}, [{"piid": b"\x07" * 16}]),
    ],
)
def test_a_platform_rule_holds_and_a_missing_claim_is_a_denial(
    rule: dict[str, Any], good: dict[str, Any], bad: list[dict[str, Any]]
) -> None:
    policy = a_policy(tee={"type": "tdx", "simulated": "allow", **rule})
    assert outcome(policy=policy, ear=an_ear(tee=good)).granted
    for claims in bad:
        (name, *_) = failed(outcome(policy=policy, ear=an_ear(tee=claims)))
        assert name.startswith("tee.")


COLLATERAL = {"type": "tdx", "simulated": "allow", "collateral": {"max_age": "35d"}}


def signed(**ago: float) -> dict[str, Any]:
    return PLATFORM | {"collateral_issued": f"{NOW - timedelta(**ago):%Y-%m-%dT%H:%M:%SZ}"}


def test_collateral_may_be_as_old_as_the_policy_says_and_a_token_without_its_age_is_denied() -> None:
    policy = a_policy(tee=COLLATERAL)
    assert outcome(policy=policy, ear=an_ear(tee=signed(days=35))).granted
    assert outcome(policy=policy, ear=an_ear(tee=signed(seconds=-30))).granted
    for claims in (
        signed(days=35, seconds=1),
        signed(seconds=-31),
        PLATFORM,
        PLATFORM | {"collateral_issued": "soon"},
        PLATFORM | {"collateral_issued": "2026-10-31T12:00:00"},  # no zone
    ):
        assert failed(outcome(policy=policy, ear=an_ear(tee=claims))) == ["tee.collateral.max_age"]
    decision = outcome(policy=policy, ear=an_ear(tee=PLATFORM))
    assert decision.failed == Block("tee.collateral.max_age", False, "signed at most 35 days, 0:00:00 ago", "missing")


def test_a_warning_passes_only_where_the_policy_says_itself_which_tcb_and_collateral_will_do() -> None:
    def warned(**changes: Any) -> Ear:
        claims = signed(days=1) | {"tcb_status": "SWHardeningNeeded"} | changes
        return dataclasses.replace(an_ear(tee=claims), status="warning")

    tcb = {"tcb": {"status": ["UpToDate", "SWHardeningNeeded"]}}
    both = a_policy(tee=COLLATERAL | tcb)
    assert outcome(policy=both, ear=warned()).granted
    assert failed(outcome(policy=both, ear=warned(tcb_status="OutOfDate"))) == ["tee.tcb.status"]
    old = signed(days=40)["collateral_issued"]
    assert failed(outcome(policy=both, ear=warned(collateral_issued=old))) == ["tee.collateral.max_age"]
    contraindicated = dataclasses.replace(warned(), status="contraindicated")
    assert "token.status" in failed(outcome(policy=both, ear=contraindicated))
    for tee in (COLLATERAL, {"type": "tdx", "simulated": "allow", **tcb}):
        assert failed(outcome(policy=a_policy(tee=tee), ear=warned())) == ["token.status"]


@pytest.mark.parametrize(
    ("when", "good", "bad"),
    [
        ({"config": [digest_text(b"\x24" * 48)]}, {}, {"config": b"\x23" * 48}),
        ({"environment": [digest_text(b"\x21" * 48)]}, {}, {"environment": b"\x22" * 48}),
        ({"datasets": [digest_text(DATASET)]}, {}, {"datasets": ()}),
        ({"datasets": [digest_text(DATASET)]}, {"datasets": (DATASET,)}, {"datasets": (DATASET, b"\x26" * 48)}),
    ],
)
def test_a_workload_rule_holds(when: dict[str, Any], good: dict[str, Any], bad: dict[str, Any]) -> None:
    policy = a_policy(workload=SCRIPT | when)
    assert outcome(policy=policy, ear=an_ear(**good)).granted
    assert failed(outcome(policy=policy, ear=an_ear(**bad))) == ["workload." + next(iter(when))]


def test_measurements_are_compared_register_by_register() -> None:
    assert outcome(policy=a_policy(measurements={"mr_td": ["09" * 48, "01" * 48], "rtmr1": ["11" * 48]})).granted
    swapped = a_policy(measurements={"mr_td": ["11" * 48], "rtmr1": ["01" * 48]})
    assert failed(outcome(policy=swapped)) == ["measurements.mr_td", "measurements.rtmr1"]


def test_an_identity_outside_the_list_is_denied() -> None:
    policy = a_policy(identity={"spiffe": [f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/job/j-2/rank/*"]})
    assert failed(outcome(policy=policy)) == ["identity.spiffe"]


def test_an_old_key_version_is_retired_by_the_policy() -> None:
    document = policy_document()
    document["spec"]["key"]["versions"] = {"min": "2"}
    policy = parse_policy(as_yaml(document))
    assert failed(outcome(policy=policy, key={"newest": 2})) == ["policy.key.versions"]
    newer = dataclasses.replace(REQUEST, key_version=2)
    assert outcome(policy=policy, key={"newest": 2}, request=newer).granted


def test_the_last_release_of_a_job_is_the_one_the_policy_counts_to() -> None:
    policy = a_policy(release={"max_per_job": "2"})
    assert outcome(policy=policy, counters=Counters("", 1)).granted
    assert failed(outcome(policy=policy, counters=Counters("", 2))) == ["release.max_per_job"]


@pytest.mark.parametrize(
    ("role", "purpose", "granted"),
    [
        (Role.RANK, Purpose.TRAIN, True),
        (Role.RANK, Purpose.EVALUATE, True),
        (Role.RANK, Purpose.SERVE, False),
        (Role.BACKEND, Purpose.SERVE, True),
        (Role.BACKEND, Purpose.EVALUATE, True),
        (Role.BACKEND, Purpose.TRAIN, False),
        (Role.BACKEND, Purpose.EXPORT, False),
        (Role.RANK, Purpose.EXPORT, False),
    ],
)
def test_a_role_has_its_purposes_and_no_others(role: Role, purpose: Purpose, granted: bool) -> None:
    peer = PEER if role is Role.RANK else dataclasses.replace(PEER, spiffe_id=BACKEND)
    request = dataclasses.replace(REQUEST, purpose=purpose)
    decision = outcome(policy=a_policy(identity=None), peer=peer, request=request, ear=an_ear(role))
    assert decision.granted is granted
    if not granted:
        assert "key.purposes" in failed(decision)


@pytest.mark.parametrize("role", [Role.TRAINER, Role.GATEWAY, Role.ATTEST, Role.KEYBROKER])
def test_a_service_is_never_given_a_key(role: Role) -> None:
    service = SpiffeId.service(TRUST_DOMAIN, role)
    peer = dataclasses.replace(PEER, spiffe_id=service)
    ear = dataclasses.replace(an_ear(), spiffe_id=str(service))
    decision = outcome(policy=a_policy(identity=None), peer=peer, ear=ear)
    assert failed(decision) == ["caller", "key.purposes"]


def test_without_a_policy_nothing_is_released() -> None:
    record = a_key(a_policy())
    decision = decide(REQUEST, an_ear(), PEER, None, record, COUNTERS, NOW)
    assert failed(decision) == ["policy"]
    assert denial(REQUEST, decision).code is Code.RELEASE_DENIED


def test_without_blocks_nothing_is_granted() -> None:
    assert not Decision(()).granted


@pytest.mark.parametrize(
    ("block", "code"),
    [
        ("token", Code.TOKEN_INVALID),
        ("token.certificate", Code.TOKEN_INVALID),
        ("nonce", Code.NONCE_UNKNOWN),
        ("key.state", Code.KEY_DISABLED),
        ("data_key", Code.WRAPPED_KEY_INVALID),
        ("workload.script", Code.RELEASE_DENIED),
    ],
)
def test_a_denial_has_the_code_of_its_first_failed_block(block: str, code: Code) -> None:
    blocks = (Block("channel", True, "", ""), Block(block, False, "a", "b"), Block("policy", False, "c", "d"))
    assert denial(REQUEST, Decision(blocks)).code is code


def test_a_held_token_is_fresh_enough_only_for_a_policy_without_broker_nonce() -> None:
    relaxed = a_policy(evidence={"max_age": "2m", "nonce": "verifier"})
    assert fresh_enough(an_ear(), relaxed, NOW + timedelta(minutes=2))
    assert not fresh_enough(an_ear(), relaxed, NOW + timedelta(minutes=2, seconds=1))
    assert not fresh_enough(an_ear(), a_policy(), NOW)


@given(
    st.sets(st.sampled_from(["script", "debug", "simulated", "certificate", "nonce", "state", "count"]), min_size=1),
)
def test_any_wrong_thing_among_right_ones_is_a_denial(wrong: set[str]) -> None:
    tee = {"debug": "debug" in wrong}
    policy = a_policy(
        release={"max_per_job": "3"}, tee={"type": "tdx", "simulated": "deny" if "simulated" in wrong else "allow"}
    )
    decision = outcome(
        policy=policy,
        ear=an_ear(tee=tee, script=b"\x99" * 48 if "script" in wrong else b"\x23" * 48),
        peer=dataclasses.replace(PEER, certificate_sha256=bytes(32)) if "certificate" in wrong else PEER,
        counters=Counters("used" if "nonce" in wrong else "", 3 if "count" in wrong else 0),
        key={"state": KeyState.DISABLED if "state" in wrong else KeyState.ENABLED},
    )
    assert len(failed(decision)) == len(wrong)
    assert not decision.granted
