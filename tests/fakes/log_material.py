# SPDX-License-Identifier: Apache-2.0
"""Entries for decision logs, and an operator who has the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
from hypothesis import strategies as st

from cloister.release.blocks import Block
from cloister.transparency.entry import Entry
from fakes.keybroker_harness import KEY, TENANT

SALT = bytes(range(16))
DROP_GUARDS = tuple(
    f"DROP TRIGGER {name}"
    for name in (
        "decisions_are_not_changed",
        "decisions_are_not_deleted",
        "decisions_follow_each_other",
        "entries_are_not_changed",
        "entries_are_not_deleted",
    )
)


def an_entry(**changes: Any) -> Entry:
    fields: dict[str, Any] = {
        "action": "release",
        "tenant": TENANT,
        "key_uri": str(KEY),
        "caller": "spiffe://cloister.test/ns/hospital-a/job/j-1/rank/1",
        "granted": True,
        "blocks": (Block("channel", True, "TLSv1.3", "TLSv1.3"),),
    }
    return Entry(**fields | changes)


def edit(path: Path, *statements: str) -> None:
    """Do what an operator with the file can do."""
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


TEXTS = st.text(max_size=12)
ENTRIES = st.builds(
    Entry,
    action=TEXTS,
    tenant=TEXTS,
    key_uri=TEXTS,
    caller=TEXTS,
    granted=st.booleans(),
    blocks=st.lists(st.builds(Block, TEXTS, st.booleans(), TEXTS, TEXTS), max_size=4).map(tuple),
    key_version=st.integers(0, 2**32 - 1),
    purpose=TEXTS,
    job=TEXTS,
    channel=TEXTS,
    policy_digest=st.binary(max_size=48),
    evidence_digest=st.binary(max_size=48),
    wrapped_digest=st.binary(max_size=48),
    record_digest=st.binary(max_size=48),
    request_id=TEXTS,
    detail=st.binary(max_size=9),
)
