# SPDX-License-Identifier: Apache-2.0
"""Entries for decision logs, and an operator who has the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from cloister.identity import Role, SpiffeId
from cloister.merkle import leaf_hash
from cloister.release.blocks import Block
from cloister.secret import SecretBytes
from cloister.transparency.documents import SignedReceipt
from cloister.transparency.entry import Entry
from cloister.transparency.start import Start
from cloister_keybroker import log as log_module
from cloister_keybroker import logkey
from cloister_keybroker.log import DecisionLog
from cloister_keybroker.logkey import LogKey
from cloister_keybroker.logproofs import LogProofs
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.workloads import Released
from fakes.certs import TRUST_DOMAIN
from fakes.keybroker_harness import KEY, TENANT

BROKER = SpiffeId.service(TRUST_DOMAIN, Role.KEYBROKER)
ROOT_KEY = RootKey(SecretBytes(b"\x05" * 32))
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


def tenant_of(number: int) -> str:
    """Return whose the entry of this number is in a `Log`."""
    return TENANT if number % 2 else "hospital-b"


class Log:
    """A log in a database of its own."""

    def __init__(self, path: str | Path = ":memory:") -> None:
        self.connection = apsw.Connection(str(path))
        self.log = DecisionLog(self.connection, ROOT_KEY)
        self.proofs = LogProofs(self.connection, self.log)

    @classmethod
    def begin(cls, path: str | Path = ":memory:", entries: int = 0) -> Log:
        made = cls(path)
        made.connection.execute(log_module.SCHEMA + logkey.SCHEMA)
        made.log.create_head()
        with made.connection:
            for number in range(entries):
                made.append(number)
        return made

    def append(self, number: int) -> None:
        job = f"j-{number % 3}"
        self.log.append(
            an_entry(tenant=tenant_of(number), job=job, record_digest=bytes([number % 256])), time_ms=number
        )

    def begin_life(self) -> tuple[LogKey, Ed25519PrivateKey]:
        """Append the entry that a broker's life begins with; return the log's key and the life's receipt key."""
        receipt = Ed25519PrivateKey.generate()
        key = logkey.load_or_create(self.connection, ROOT_KEY, BROKER)
        head = self.log.head()
        start = Start.make(log=key.note_key, broker_id=str(BROKER), receipt=receipt, size=head.size, root=head.root())
        return replace(key, start_index=self.log.append(start.entry(), time_ms=0).index), receipt

    def leaves(self) -> list[bytes]:
        return [leaf_hash(data) for (data,) in self.connection.execute("SELECT entry FROM entries ORDER BY idx")]


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


def receipt_of(released: Released) -> SignedReceipt:
    """Return a workload's receipt as its holder keeps it."""
    answer, receipt = released.data_key, released.data_key.receipt
    message = answer.binding.receipt_message(
        sealed=answer.sealed,
        terms=released.terms,
        log_id=receipt.log_id,
        index=receipt.place.index,
        root=receipt.place.root,
    )
    return SignedReceipt(message, receipt.signature)
