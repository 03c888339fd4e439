# SPDX-License-Identifier: Apache-2.0
"""A release policy is closed and typed: it means what it says, or it is refused with path, line and what is allowed."""

from __future__ import annotations

import copy
import hashlib
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister.cli.policyfile import PolicyDraft
from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.policyblocks import TCB_STATUSES, canonical, digest_of
from cloister.release.cases import check_cases
from cloister.release.keys import Purpose
from cloister.release.policy import MEASUREMENTS, WRAPS, ApprovalRule, SpiffeGlob, parse_policy
from fakes.keybroker_harness import KEY, OWNER, Document, as_yaml, policy_document

DIGEST = "sha384:" + "23" * 48
FULL = f"""
apiVersion: cloister.dev/v1
kind: ReleasePolicy
metadata: {{name: chnsenticorp-train, version: 7, previous: "sha384:{"07" * 48}", owner: {OWNER}}}
spec:
  key: {{uri: {KEY}, versions: {{min: 3}}, purposes: [train]}}
  when:
    tee:
      type: tdx
      debug: deny
      simulated: deny            # evidence from a simulated TD never passes unless a policy says allow
      tcb: {{status: [UpToDate, SWHardeningNeeded], min_date: 2026-02-11, advisories: {{allow: [INTEL-SA-00837]}}}}
      collateral: {{max_age: 35d, on_stale: deny}}
      platforms: {{piid: [e90210702a2cc5ad9764f29ddc8fde8c]}}
    measurements: {{mr_td: ["{"01" * 48}"], rtmr1: ["{"11" * 48}"], rtmr2: ["{"12" * 48}"]}}
    workload: {{script: ["{DIGEST}"], config: ["{DIGEST}"], no_events_after: cloister.workload.sealed}}
    identity: {{spiffe: ["spiffe://cloister.test/ns/hospital-a/job/*/rank/*"]}}
    evidence: {{max_age: 5m, nonce: broker}}
  release: {{wrap: [hpke-x25519-mlkem768], max_per_job: 8, lease: 1h}}
"""


def refused(document: Document) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        parse_policy(as_yaml(document))
    assert caught.value.code is Code.POLICY_INVALID
    return caught.value


def changed(*path: str, value: Any) -> Document:
    """Return the standard policy with one value set, or removed when it is None."""
    document = copy.deepcopy(policy_document())
    place = document
    for step in path[:-1]:
        place = place.setdefault(step, {})
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


def test_every_block_of_the_reference_is_read() -> None:
    policy = parse_policy(FULL.encode())
    assert (policy.name, policy.version, policy.previous, policy.owner) == (
        "chnsenticorp-train",
        7,
        b"\x07" * 48,
        str(OWNER),
    )
    assert (policy.key, policy.min_key_version, policy.purposes) == (KEY, 3, (Purpose.TRAIN,))
    assert policy.tee.simulated is False
    assert policy.tee.tcb is not None
    assert policy.tee.tcb.statuses == ("UpToDate", "SWHardeningNeeded")
    assert policy.tee.tcb.min_date == date(2026, 2, 11)
    assert policy.tee.tcb.advisories == ("INTEL-SA-00837",)
    assert policy.tee.collateral_max_age == timedelta(days=35)
    assert policy.tee.platforms == (bytes.fromhex("e90210702a2cc5ad9764f29ddc8fde8c"),)
    assert policy.measurements == {"mr_td": (b"\x01" * 48,), "rtmr1": (b"\x11" * 48,), "rtmr2": (b"\x12" * 48,)}
    assert policy.workload.script == (b"\x23" * 48,)
    assert policy.workload.sealed
    assert policy.max_age == timedelta(minutes=5)
    assert policy.broker_nonce
    assert (policy.kem_ids, policy.max_per_job, policy.lease) == ((KEM_MLKEM768_X25519,), 8, timedelta(hours=1))


def test_the_examples_of_the_reference_page_are_what_the_broker_accepts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "release-policy.md").read_text()
    examples = re.findall(r"^```yaml\n(apiVersion.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert len(examples) >= 3
    for example in examples:
        check_cases(parse_policy(example.encode()), datetime(2026, 11, 1, tzinfo=UTC))


def test_every_block_of_the_language_is_on_the_reference_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "release-policy.md").read_text()
    for name in (*MEASUREMENTS, *TCB_STATUSES, *WRAPS, "piid", "on_stale", "environment", "datasets", "lease"):
        assert name in page, name


def test_what_is_left_out_is_strict() -> None:
    document = policy_document(tee={"type": "tdx"}, evidence=None, identity=None, workload={"script": [DIGEST]})
    del document["spec"]["release"]
    policy = parse_policy(as_yaml(document))
    assert policy.tee.simulated is False
    assert policy.broker_nonce
    assert policy.max_age == timedelta(minutes=5)
    assert policy.kem_ids == (KEM_MLKEM768_X25519,)


def test_the_draft_of_the_command_line_is_accepted() -> None:
    draft = PolicyDraft(
        name="reviews",
        owner=str(OWNER),
        key_uri=str(KEY),
        purposes=["train"],
        scripts=[DIGEST],
        identities=["spiffe://cloister.test/ns/hospital-a/job/*/rank/*"],
    )
    assert parse_policy(draft.to_yaml().encode()).tee.simulated is False


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("spec", "when", "tee", "simulated"), "yes", "allow"),
        (("spec", "when", "tee", "simulated"), "Allow", "deny, allow"),
        (("spec", "when", "tee", "debug"), "allow", "deny"),
        (("spec", "when", "tee", "type"), "sgx", "tdx"),
        (("spec", "when", "tee", "typ"), "tdx", "allowed here: type, debug, simulated, tcb, collateral, platforms"),
        (("spec", "when", "tee", "type"), None, "write one of: tdx"),
        (("spec", "when", "tee"), None, "required"),
        (("spec", "when", "tee", "tcb"), {"status": ["Revoked"]}, "UpToDate"),
        (("spec", "when", "tee", "tcb"), {"status": []}, "one of: UpToDate"),
        (("spec", "when", "tee", "tcb"), {"status": ["UpToDate"], "min_date": "2026-02-30"}, "a date"),
        (("spec", "when", "tee", "tcb"), {"status": ["UpToDate"], "min_date": "11.2.2026"}, "a date"),
        (("spec", "when", "tee", "platforms"), {"piid": ["E90210702A2CC5AD9764F29DDC8FDE8C"]}, "lower case"),
        (("spec", "when", "tee", "collateral"), {"max_age": "35d", "on_stale": "warn"}, "deny"),
        (("spec", "when", "measurements"), {}, "mr_td"),
        (("spec", "when", "measurements"), {"rtmr3": ["13" * 48]}, "rtmr2"),
        (("spec", "when", "measurements"), {"mr_td": ["13" * 47]}, "96 hexadecimal digits"),
        (("spec", "when", "measurements"), {"mr_td": "13" * 48}, "write \\[..\\]"),
        (("spec", "when", "workload"), None, "required"),
        (("spec", "when", "workload", "script"), None, "sha384:"),
        (("spec", "when", "workload", "script"), [], "sha384:"),
        (("spec", "when", "workload", "script"), ["23" * 48], "sha384:"),
        (("spec", "when", "workload", "script"), [DIGEST, DIGEST], "once"),
        (("spec", "when", "workload", "script"), [DIGEST] * 300, "shorten"),
        (("spec", "when", "workload", "no_events_after"), "cloister.key", "cloister.workload.sealed"),
        (("spec", "when", "identity", "spiffe"), ["spiffe://cloister.test/ns/*/job/**"], "one whole segment"),
        (("spec", "when", "identity", "spiffe"), ["spiffe://*/ns/hospital-a/job/x/rank/0"], "after the trust domain"),
        (("spec", "when", "identity", "spiffe"), ["spiffe://cloister.test/service/gateway"], "ranks or backends"),
        (("spec", "when", "identity", "spiffe"), ["spiffe://cloister.test/ns/hospital-a/job/x*/rank/0"], "whole"),
        (("spec", "when", "identity", "spiffe"), ["*"], "ranks or backends"),
        (("spec", "when", "evidence", "max_age"), "5 minutes", "30s, 5m"),
        (("spec", "when", "evidence", "max_age"), "0s", "from 1s to 1d"),
        (("spec", "when", "evidence", "max_age"), "2d", "from 1s to 1d"),
        (("spec", "when", "evidence", "nonce"), "none", "broker, verifier"),
        (("spec", "when", "weather"), "sunny", "allowed here: "),
        (("spec", "key", "purposes"), ["export"], "train, serve, evaluate"),
        (("spec", "key", "purposes"), [], "train, serve, evaluate"),
        (("spec", "key", "uri"), "hospital-a/x", "cloister-key://"),
        (("spec", "key", "versions"), {"min": "0"}, "from 1"),
        (("spec", "key", "versions"), {"min": "1", "max": "2"}, "allowed here: min"),
        (("spec", "release", "wrap"), ["rsa-oaep"], "hpke-x25519-mlkem768"),
        (("spec", "release", "max_per_job"), "many", "a number"),
        (("spec", "release", "max_per_job"), "-1", "a number"),
        (("spec", "release", "max_per_job"), "08", "a number"),
        (("spec", "release", "lease"), "1y", "30s, 5m"),
        (("metadata", "version"), "0", "from 1"),
        (("metadata", "name"), "Reviews!", "a-z0-9-"),
        (("metadata", "owner"), "spiffe://cloister.test/service/trainer", "the user who owns"),
        (("metadata", "owner"), "spiffe://cloister.test/ns/hospital-b/user/x", "hospital-a"),
        (("metadata", "previous"), DIGEST, "leave it out of version 1"),
        (("metadata", "comment"), "x", "allowed here: name, version, owner, previous"),
        (("apiVersion",), "cloister.dev/v2", "cloister.dev/v1"),
        (("kind",), "Policy", "ReleasePolicy"),
        (("spec",), "all", "block"),
        (("extra",), {}, "allowed here: apiVersion, kind, metadata, spec"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused_with_what_is(path: tuple[str, ...], value: Any, says: str) -> None:
    error = refused(changed(*path, value=value))
    assert error.what.startswith(".".join(path))
    assert "(line " in error.what
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(error.todo)


APPROVERS = [did_key(Ed25519PrivateKey.from_private_bytes(bytes([n] * 32))) for n in range(17)]


def test_approvals_are_read_for_a_release_and_for_a_change() -> None:
    document = changed("spec", "release", "approvals", value={"threshold": "2", "of": APPROVERS[:3]})
    document["spec"]["change"] = {"approvals": {"threshold": "1", "of": APPROVERS[3:4]}}
    policy = parse_policy(as_yaml(document))
    assert policy.approvals == ApprovalRule(2, tuple(APPROVERS[:3]))
    assert policy.change == ApprovalRule(1, (APPROVERS[3],))


@pytest.mark.parametrize(
    ("threshold", "of", "why"),
    [
        ("0", APPROVERS[:2], "threshold"),
        ("3", APPROVERS[:2], "threshold"),
        ("1", [], "nothing would ever pass"),
        ("1", [APPROVERS[0], APPROVERS[0]], "stands twice"),
        ("1", ["did:key:a"], "did:key:a"),
        ("1", APPROVERS, "more than 16"),
    ],
)
def test_approvals_nobody_could_give_or_that_do_not_count_are_refused(threshold: str, of: list[str], why: str) -> None:
    for path in (("release", "approvals"), ("change", "approvals")):
        error = refused(changed("spec", *path, value={"threshold": threshold, "of": of}))
        assert why in error.what
        assert f"spec.{path[0]}.approvals" in error.what


def test_a_successor_without_its_predecessor_is_refused() -> None:
    assert "previous" in refused(policy_document(version=2)).what


def test_yaml_that_is_not_strict_is_refused_with_its_line() -> None:
    with pytest.raises(CloisterError, match="line 3") as caught:
        parse_policy(b"apiVersion: cloister.dev/v1\nkind: ReleasePolicy\nkind: ReleasePolicy\n")
    assert caught.value.code is Code.POLICY_INVALID


@pytest.mark.parametrize("data", [b"", b"text", b"[]", b"{}", b"\xff", b"kind: ReleasePolicy"])
def test_an_empty_or_foreign_document_is_no_policy(data: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        parse_policy(data)
    assert caught.value.code is Code.POLICY_INVALID


def test_the_digest_is_over_the_document_and_not_its_layout() -> None:
    policy = parse_policy(FULL.encode())
    moved = FULL.replace("      type: tdx\n      debug: deny\n", "      debug: 'deny'\n      type: \"tdx\"\n")
    assert moved != FULL
    assert parse_policy(moved.encode()).digest == policy.digest
    assert parse_policy(FULL.replace("simulated: deny ", "simulated: allow").encode()).digest != policy.digest
    assert len(policy.digest) == 48


def test_the_canonical_form_is_rfc_8785s() -> None:
    # RFC 8785, 3.2.3: the sorting example (by UTF-16 code units), with texts for values.
    members = {
        "\u20ac": "Euro Sign",
        "\r": "Carriage Return",
        "\ufb33": "Hebrew Letter Dalet With Dagesh",
        "1": "One",
        "\U0001f600": "Emoji: Grinning Face",
        "\u0080": "Control",
        "\u00f6": "Latin Small Letter O With Diaeresis",
    }
    expected = (
        '{"\\r":"Carriage Return","1":"One","\u0080":"Control","\u00f6":"Latin Small Letter O With Diaeresis",'
        '"\u20ac":"Euro Sign","\U0001f600":"Emoji: Grinning Face","\ufb33":"Hebrew Letter Dalet With Dagesh"}'
    )
    assert canonical(members) == expected
    # RFC 8785, 3.2.2.2: the string example.
    assert canonical('\u20ac$\x0f\nA\'B"\\\\"/') == '"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'
    assert digest_of(members) == hashlib.sha384(expected.encode()).digest()


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("job/*/rank/*", ["job/a/rank/0", "job/b/rank/12"], ["model/a/backend/b", "job/a/rank/0/x"]),
        ("job/a/rank/*", ["job/a/rank/3"], ["job/ab/rank/3", "job/b/rank/3"]),
        ("model/*/backend/*", ["model/m/backend/b"], ["job/a/rank/0"]),
    ],
)
def test_a_star_is_one_whole_segment(pattern: str, matching: list[str], other: list[str]) -> None:
    base = "spiffe://cloister.test/ns/hospital-a/"
    glob = SpiffeGlob.parse(base + pattern)
    assert glob is not None
    assert all(glob.matches(base + path) for path in matching)
    assert not any(glob.matches(base + path) for path in other)
    assert not glob.matches("spiffe://cloister.test/ns/hospital-b/" + matching[0])
    assert not glob.matches("spiffe://evil.test/ns/hospital-a/" + matching[0])


WORDS = st.sampled_from(["", "tdx", "allow", "deny", "1", "no", "*", DIGEST, "5m", "UpToDate", "train"])
ANYTHING = st.recursive(WORDS, lambda v: st.lists(v, max_size=3) | st.dictionaries(WORDS, v, max_size=3), max_leaves=6)
PLACES = st.lists(st.sampled_from(["metadata", "spec", "when", "key", "tee", "workload", "release", "x"]), max_size=3)


@given(PLACES, ANYTHING)
def test_any_change_gives_a_policy_or_one_error(places: list[str], value: Any) -> None:
    document: Any = copy.deepcopy(policy_document())
    inner = document
    for step in places:
        inner = inner.setdefault(step, {}) if isinstance(inner, dict) else {}
    if isinstance(inner, dict):
        inner["tee" if "when" in places else "key"] = value
    try:
        policy = parse_policy(as_yaml(document))
    except CloisterError as error:
        if error.code is not Code.POLICY_INVALID:
            raise
        return
    assert policy.workload.script
    assert policy.purposes


@given(st.binary(max_size=200))
def test_any_bytes_give_one_error(data: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        parse_policy(data)
    assert caught.value.code is Code.POLICY_INVALID
