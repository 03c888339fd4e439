# SPDX-License-Identifier: Apache-2.0
"""One thing for all tests: those that start whole stacks take turns, the others fill the other core."""

from __future__ import annotations

from pathlib import Path

import pytest

STACKS = frozenset({"integration", "e2e"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group tests of real processes for `--dist loadgroup`: two stacks at once would fight for two cores."""
    for item in items:
        if STACKS & set(Path(item.path).parts):
            item.add_marker(pytest.mark.xdist_group("stacks"))
