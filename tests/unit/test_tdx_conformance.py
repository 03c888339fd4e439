# SPDX-License-Identifier: Apache-2.0
"""Claims about cases of outside suites: every line is answered, and only what a verifier refuses is a rejection."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, cast

import pytest

from cloister.tdx.conformance import MAX_CASE_SIZE, run_case
from fakes.forged_collateral import World, level, svns
from fakes.forged_rows_policy import attributes

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"


def case(world: World, **change: Any) -> dict[str, Any]:
    return {
        "id": "one",
        "quote_hex": world.quote().hex(),
        "collateral": json.loads(world.collateral().to_json()),
        "root_der_b64": base64.b64encode(world.platform.root_der).decode(),
        "now": int(world.now.timestamp()),
        "policy": "default",
    } | change


def run(case: Any) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(run_case(json.dumps(case).encode())))


PINNED = [json.loads(line) for line in (VECTORS / "cases.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("pinned", [pytest.param(pinned, id=pinned["case"]["id"]) for pinned in PINNED])
def test_a_pinned_case_keeps_its_answer(pinned: dict[str, Any]) -> None:
    answer = run(pinned["case"])
    assert (answer.pop("error") is None) == (answer["verdict"] == "accept")
    assert answer == pinned["answer"]


ACCEPTED = {"id": "one", "verdict": "accept", "status": "UpToDate", "advisory_ids": [], "check": None, "error": None}


def test_an_honest_case_is_accepted() -> None:
    world = World()
    assert run(case(world)) == ACCEPTED
    assert run(case(world, policy="verify")) == ACCEPTED
    assert run(case(World().of_enclave())) == ACCEPTED


def test_verification_and_default_policy_are_told_apart() -> None:
    world = World()
    world.body = attributes(1)
    assert run(case(world, policy="verify"))["verdict"] == "accept"
    answer = run(case(world))
    assert (answer["verdict"], answer["check"], answer["status"]) == ("reject", "A1", "UpToDate")
    world = World()
    world.tcb_info["tcbLevels"] = [level(svns(), "OutOfDate", "INTEL-SA-00001")]
    answer = run(case(world, policy="verify"))
    assert (answer["verdict"], answer["status"], answer["advisory_ids"]) == ("accept", "OutOfDate", ["INTEL-SA-00001"])
    assert run(case(world))["check"] == "status"


@pytest.mark.parametrize(
    "now", [0, -1, 1_400_000_000, 1_795_348_800_000, 2**63, -(2**63), 10**300, 1e300, 5_000_000_000]
)
def test_a_time_that_is_none_is_a_rejection(now: float) -> None:
    answer = run(case(World(), now=now))
    assert (answer["verdict"], answer["check"]) == ("reject", "X1")


def test_a_missing_part_of_the_collateral_is_a_rejection() -> None:
    world = World()
    rows = {}
    for name in json.loads(world.collateral().to_json()):
        for value in (None, "", 5, {}):
            collateral = {**case(world)["collateral"], name: value}
            answer = run(case(world, collateral=collateral))
            assert answer["verdict"] == "reject"
            rows[name] = answer["check"]
    assert rows == {
        "pck_crl_issuer_chain": "R2",
        "root_ca_crl": "R6",
        "pck_crl": "R6",
        "tcb_info_issuer_chain": "T1",
        "tcb_info": "T2",
        "tcb_info_signature": "T2",
        "qe_identity_issuer_chain": "Q1",
        "qe_identity": "Q1",
        "qe_identity_signature": "Q1",
    }


def test_a_quote_or_a_root_that_is_none_is_a_rejection() -> None:
    assert run(case(World(), quote_hex=""))["check"] == "H1"
    assert run(case(World(), root_der_b64=""))["check"] == "P2"
    assert run(case(World(), root_der_b64=base64.b64encode(World().platform.leaf_der).decode()))["check"] == "P2"


@pytest.mark.parametrize(
    "change",
    [
        {"quote_hex": "xy"},
        {"quote_hex": None},
        {"quote_hex": "0"},
        {"collateral": None},
        {"collateral": []},
        {"root_der_b64": "*"},
        {"root_der_b64": "\ud800"},
        {"root_der_b64": None},
        {"now": "now"},
        {"now": None},
        {"now": True},
        {"policy": "none"},
        {"policy": ["verify"]},
    ],
)
def test_a_case_that_is_none_is_an_error_and_no_rejection(change: dict[str, Any]) -> None:
    answer = run(case(World(), **change))
    assert answer["id"] == "one"
    assert answer["verdict"] is None
    assert answer["error"]


@pytest.mark.parametrize(
    "line", [b"", b"[]", b"null", b"\xff", b"[" * 100_000, b"{", b"1" * 5000, b" " * (MAX_CASE_SIZE + 1)]
)
def test_a_line_that_is_none_is_an_error_too(line: bytes) -> None:
    answer = json.loads(run_case(line))
    assert answer["verdict"] is None
    assert answer["id"] is None
    assert answer["error"]


def test_surrogates_in_collateral_are_a_rejection() -> None:
    world = World()
    collateral = {**case(world)["collateral"], "tcb_info": "\ud800"}
    assert run(case(world, collateral=collateral))["check"] == "T2"
