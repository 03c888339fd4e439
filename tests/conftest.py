# SPDX-License-Identifier: Apache-2.0
"""One thing for all tests: how `--dist loadgroup` shares them out, so that two cores are kept busy and not fought for.

What starts whole stacks or pins cores takes turns on one worker. Every other module of tests with real processes stays
together, because its tests share what it started. All the rest goes wherever there is room.
"""

from __future__ import annotations

from pathlib import Path

import pytest

PINNED = ("test_trainer_", "test_serving_")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give every test with real processes its group."""
    for item in items:
        path = Path(item.path)
        if "e2e" in path.parts or ("integration" in path.parts and path.name.startswith(PINNED)):
            item.add_marker(pytest.mark.xdist_group("stacks"))
        elif "integration" in path.parts:
            item.add_marker(pytest.mark.xdist_group(path.stem))
