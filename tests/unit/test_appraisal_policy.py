# SPDX-License-Identifier: Apache-2.0
"""Appraisal policies and reference sets: closed, typed, and strict where they are silent."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.appraisal.policy import STRICT, NamedSet, parse_td_policy
from cloister.appraisal.references import PAYLOAD_TYPE, ReferenceSet, open_reference_set, parse_reference_set
from cloister.didkey import did_key
from cloister.dsse import sign
from cloister.errors import CloisterError, Code
from cloister.tdx.tcbinfo import TcbStatus

HEX = "0a" * 48
POLICY = f"""
apiVersion: cloister.dev/v1
kind: AppraisalPolicy
metadata: {{name: production, version: 4}}
spec:
  tcb:
    status: [UpToDate, SWHardeningNeeded]
    min_date: 2026-02-11
    min_evaluation: 20
    advisories: {{allow: [INTEL-SA-00837]}}
  collateral: {{max_age: 35d, on_stale: warn}}
  td: {{features: [], migratable: allow, service_tds: ["{HEX}"]}}
  platforms: {{fmspc: [b0c06f000000], piid: [{"05" * 16}]}}
  measurements: {{mr_td: ["{HEX}"], rtmr1: {{set: firmware, min_version: 3}}, mr_owner: {{set: owners}}}}
  workload: {{environment: ["sha384:{HEX}"], script: ["sha384:{HEX}", "sha384:{"0b" * 48}"], datasets: []}}
"""
SET = f"""
apiVersion: cloister.dev/v1
kind: ReferenceSet
metadata: {{name: firmware, version: 3}}
spec: {{mr_td: ["{HEX}"], rtmr1: ["{HEX}", "{"0b" * 48}"]}}
"""


def test_every_block_is_read() -> None:
    policy = parse_td_policy(POLICY.encode())
    assert str(policy) == "production version 4"
    assert policy.statuses == {TcbStatus.UP_TO_DATE, TcbStatus.SW_HARDENING_NEEDED}
    assert (policy.min_date, policy.min_evaluation) == (date(2026, 2, 11), 20)
    assert policy.advisories == {"INTEL-SA-00837"}
    assert (policy.collateral_max_age, policy.stale_denies) == (timedelta(days=35), False)
    assert (policy.features, policy.migratable) == (frozenset(), True)
    assert policy.service_tds == {bytes.fromhex(HEX)}
    assert (policy.fmspcs, policy.piids) == ((bytes.fromhex("b0c06f000000"),), (b"\x05" * 16,))
    assert policy.measurements == {
        "mr_td": (bytes.fromhex(HEX),),
        "rtmr1": NamedSet("firmware", 3),
        "mr_owner": NamedSet("owners", 1),
    }
    assert policy.workload == {
        "environment": (bytes.fromhex(HEX),),
        "script": (bytes.fromhex(HEX), b"\x0b" * 48),
        "datasets": (),
    }


def test_what_is_left_out_is_strict() -> None:
    assert STRICT.statuses == {TcbStatus.UP_TO_DATE}
    assert STRICT.features == {"PKS"}
    assert not STRICT.migratable
    assert STRICT.service_tds == frozenset()
    assert STRICT.stale_denies


def test_a_digest_is_of_what_a_policy_says_and_not_of_how_it_is_written() -> None:
    policy = parse_td_policy(POLICY.encode())
    assert parse_td_policy(b"# a remark\n" + POLICY.encode()).digest == policy.digest
    assert parse_td_policy(POLICY.replace("version: 4", "version: 5").encode()).digest != policy.digest


@pytest.mark.parametrize(
    ("right", "wrong", "place"),
    [
        ("AppraisalPolicy", "ReleasePolicy", "kind"),
        ("production", "Production!", "metadata.name"),
        ("version: 4", "version: 0", "metadata.version"),
        ("  tcb:\n", "  tbc:\n", "spec.tcb"),
        ("SWHardeningNeeded", "Revoked", "spec.tcb.status[1]"),
        ("[UpToDate, SWHardeningNeeded]", "[]", "spec.tcb.status"),
        ("min_evaluation: 20", "min_evaluation: twenty", "spec.tcb.min_evaluation"),
        ("INTEL-SA-00837", "SA-837", "spec.tcb.advisories.allow[0]"),
        ("on_stale: warn", "on_stale: allow", "spec.collateral.on_stale"),
        ("max_age: 35d", "max_age: 35", "spec.collateral.max_age"),
        ("features: []", "features: [DEBUG]", "spec.td.features[0]"),
        ("features: []", "debug: allow", "spec.td.debug"),
        ("features: []", "profiling: allow", "spec.td.profiling"),
        ("b0c06f000000", "B0C06F000000", "spec.platforms.fmspc[0]"),
        ("mr_td: [", "rtmr4: [", "spec.measurements.rtmr4"),
        ("{set: owners}", "{set: owners, version: 1}", "spec.measurements.mr_owner.version"),
        ("{set: owners}", "{}", "spec.measurements.mr_owner.set"),
        ("{set: owners}", "[]", "spec.measurements.mr_owner"),
        ("  workload:", "  workloads:", "spec.workloads"),
        ("{environment: [", "{image: [", "spec.workload.image"),
        ("datasets: []", "config: []", "spec.workload.config"),
        ('script: ["sha384:', 'script: ["sha256:', "spec.workload.script[0]"),
    ],
)
def test_what_is_not_allowed_is_an_error_with_its_place(right: str, wrong: str, place: str) -> None:
    assert right in POLICY
    with pytest.raises(CloisterError) as caught:
        parse_td_policy(POLICY.replace(right, wrong, 1).encode())
    assert caught.value.code is Code.POLICY_INVALID
    assert caught.value.what.startswith(f"{place} (line ")
    assert caught.value.todo


@pytest.mark.parametrize(
    "spec",
    [
        "{tcb: {status: [UpToDate]}, measurements: {}}",
        "{tcb: {status: [UpToDate]}, workload: {}}",
        "{tcb: {status: [UpToDate]}, event_log: {}}",
        "{}",
        "[]",
    ],
)
def test_empty_blocks_are_errors(spec: str) -> None:
    head = "apiVersion: cloister.dev/v1\nkind: AppraisalPolicy\nmetadata: {name: x, version: 1}\n"
    with pytest.raises(CloisterError) as caught:
        parse_td_policy(f"{head}spec: {spec}\n".encode())
    assert caught.value.code is Code.POLICY_INVALID


def test_a_reference_set_is_read_by_register() -> None:
    found = parse_reference_set(SET.encode())
    assert str(found) == "firmware version 3"
    assert found.values == {
        "mr_td": (bytes.fromhex(HEX),),
        "rtmr1": (bytes.fromhex(HEX), b"\x0b" * 48),
    }
    assert parse_reference_set(SET.replace("0b", "0c").encode()).digest != found.digest


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ReferenceSet", "AppraisalPolicy"),
        ("rtmr1", "rtmr4"),
        ("name: firmware", "name: ''"),
        (f'mr_td: ["{HEX}"]', "mr_td: []"),
        (f'mr_td: ["{HEX}"]', f'mr_td: ["{HEX}", "{HEX}"]'),
        (HEX, HEX[:-2]),
    ],
)
def test_a_reference_set_is_closed(right: str, wrong: str) -> None:
    with pytest.raises(CloisterError) as caught:
        parse_reference_set(SET.replace(right, wrong, 1).encode())
    assert caught.value.code is Code.POLICY_INVALID
    with pytest.raises(CloisterError):
        parse_reference_set(SET[: SET.index("spec")].encode() + b"spec: {}\n")


# Signed sets.

KEY, OTHER_KEY, STRANGER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
SIGNERS = (did_key(KEY), did_key(OTHER_KEY))


def opened(*keys: Ed25519PrivateKey, text: str = SET, kind: str = PAYLOAD_TYPE, threshold: int = 1) -> ReferenceSet:
    envelope = sign(kind, text.encode(), *keys).to_bytes()
    return open_reference_set(envelope, name="firmware", signers=SIGNERS, threshold=threshold)


def rejected(*args: Any, **options: Any) -> Code:
    with pytest.raises(CloisterError) as caught:
        opened(*args, **options)
    assert caught.value.todo
    return caught.value.code


def test_a_set_is_whose_signers_are_named() -> None:
    assert opened(KEY) == parse_reference_set(SET.encode())
    assert opened(OTHER_KEY, STRANGER) == parse_reference_set(SET.encode())
    assert opened(KEY, OTHER_KEY, threshold=2) == parse_reference_set(SET.encode())


def test_a_set_by_another_signer_or_by_too_few_is_refused() -> None:
    assert rejected(STRANGER) is Code.REFERENCES_REJECTED
    assert rejected(KEY, threshold=2) is Code.REFERENCES_REJECTED
    assert rejected(KEY, STRANGER, threshold=2) is Code.REFERENCES_REJECTED
    assert rejected(KEY, threshold=0) is Code.REFERENCES_REJECTED


def test_a_set_signed_as_something_else_or_under_another_name_is_refused() -> None:
    assert rejected(KEY, kind="application/vnd.cloister.release-policy.v1+yaml") is Code.ENVELOPE_INVALID
    assert rejected(KEY, text=SET.replace("name: firmware", "name: owners")) is Code.REFERENCES_REJECTED


def test_an_empty_set_is_refused_whoever_signed_it() -> None:
    empty = SET[: SET.index("spec")] + "spec: {}\n"
    assert rejected(KEY, text=empty) is Code.POLICY_INVALID
    assert rejected(KEY, text=SET.replace("mr_td: [", "mr_td: [], mr_owner: [")) is Code.POLICY_INVALID


def test_a_set_that_was_edited_or_is_not_signed_is_refused() -> None:
    edited = replace(sign(PAYLOAD_TYPE, SET.encode(), KEY), payload=SET.replace("0b", "0c").encode()).to_bytes()
    for data, code in ((edited, Code.SIGNATURE_INVALID), (SET.encode(), Code.ENVELOPE_INVALID)):
        with pytest.raises(CloisterError) as caught:
            open_reference_set(data, name="firmware", signers=SIGNERS)
        assert caught.value.code is code
