# SPDX-License-Identifier: Apache-2.0
"""Every policy of the cookbook is one that the broker would take, and shows what it refuses besides what it allows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cloister.release.cases import check_cases
from cloister.release.policy import ReleasePolicy, parse_policy

DOCS = Path(__file__).parents[2] / "docs"
POLICIES = sorted((DOCS / "policies").glob("*.yaml"))
# Cases do not depend on the day: a policy that passes today passes for as long as it is in force.
DAYS = (datetime(2026, 11, 1, tzinfo=UTC), datetime(2030, 1, 1, tzinfo=UTC))


def read(path: Path) -> ReleasePolicy:
    return parse_policy(path.read_bytes())


def test_there_are_ten_policies_for_ten_keys_in_the_order_of_the_page() -> None:
    assert len(POLICIES) >= 10
    page = (DOCS / "policy-cookbook.md").read_text()
    places = [page.index(f"(policies/{path.name})") for path in POLICIES]
    assert places == sorted(places)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_a_policy_does_what_its_cases_say(path: Path) -> None:
    policy = read(path)
    assert path.stem.endswith(policy.name)
    for now in DAYS:
        check_cases(policy, now)
    allowed = sum(not case.block for case in policy.cases)
    assert allowed
    assert len(policy.cases) - allowed >= 2


@pytest.mark.parametrize("path", POLICIES[1:], ids=lambda path: path.stem)
def test_a_policy_for_real_data_asks_for_current_hardware_and_a_known_environment(path: Path) -> None:
    policy = read(path)
    assert not policy.tee.simulated
    assert policy.tee.tcb is not None
    assert policy.tee.collateral_max_age is not None
    assert policy.workload.environment is not None
    assert policy.workload.sealed
    assert policy.lease <= timedelta(hours=12)
