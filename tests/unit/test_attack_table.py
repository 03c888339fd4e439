# SPDX-License-Identifier: Apache-2.0
"""Every row of the protocol's table of attacks is in docs/attacks.md, and names tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# The protocol's rows: one that is dropped from the page would be a binding that nobody tries any more.
ATTACKS = (
    "quote of A with key of B",
    "stolen token used elsewhere",
    "HPKE key swapped",
    "old evidence replayed",
    "forged answer",
    "old answer replayed",
    "TLS terminator, sidecar or broker front end reads the key",
    "right image, wrong script",
    "relay to a machine whose platform key was extracted",
    "a proxy in the TD quotes for outsiders",
    "policy swapped or rolled back by the operator",
    "operator plants a key under the owner's name",
    "measured file changed before it runs",
    "log truncated or forked",
    "stale collateral hides a revocation",
)


@cache
def rows() -> dict[str, list[str]]:
    """Return attack -> the tests that its row names."""
    table = (ROOT / "docs" / "attacks.md").read_text().split("|---|---|---|\n")[1]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line]
    return {attack.lstrip("| "): re.findall(r"`([^`]+)`", tried) for attack, _, tried in cells}


@cache
def functions_of(name: str) -> frozenset[str]:
    """Return the functions of the files of this name, in whichever folder of tests."""
    nodes = (node for path in (ROOT / "tests").glob(f"*/{name}") for node in ast.walk(ast.parse(path.read_text())))
    return frozenset(node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_the_page_has_the_protocols_rows_and_no_others() -> None:
    found = list(rows())
    assert len(found) == len(ATTACKS)
    assert all(row.startswith(attack) for row, attack in zip(found, ATTACKS, strict=True))


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_tried_by_a_test_that_exists(attack: str) -> None:
    (named,) = [tried for row, tried in rows().items() if row.startswith(attack)]
    assert named
    for test in named:
        name, _, function = test.partition("::")
        assert function.startswith("test_")
        assert function in functions_of(name), test


@pytest.mark.parametrize("attack", ATTACKS)
def test_at_least_one_of_them_is_among_the_adversarys(attack: str) -> None:
    (named,) = [tried for row, tried in rows().items() if row.startswith(attack)]
    assert any((ROOT / "tests" / "adversary" / test.partition("::")[0]).exists() for test in named)
