# SPDX-License-Identifier: Apache-2.0
"""Certificates in force, and what they were issued on: so that a denial reaches those that are out already.

A certificate is remembered until no call that it let in can run any more (its life, and the longest stream). What is
known about it is what can be denied: its identity, its platform, its measurements. Most certificates are renewals of
one another, so these facts are stored once for all that share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import apsw

from cloister.runtime.database import Database
from cloister.runtime.trust import MAX_CERTIFICATES
from cloister.tlv import sha384, tlv
from cloister_attest.authority import Issued
from cloister_attest.denylist import Fact
from cloister_attest.epochs import CALLS_OUTLIVE

MIGRATION: Final = """
CREATE TABLE fact_sets (
    digest BLOB NOT NULL,
    kind TEXT NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (digest, kind, value)
) STRICT, WITHOUT ROWID;
CREATE INDEX fact_sets_by_value ON fact_sets (kind, value);
CREATE TABLE issued (
    leaf_sha256 BLOB PRIMARY KEY,
    spiffe_id TEXT NOT NULL,
    facts BLOB NOT NULL,
    struck INTEGER NOT NULL,
    forget_unix_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX issued_by_identity ON issued (spiffe_id);
CREATE INDEX issued_by_facts ON issued (facts);
CREATE INDEX issued_by_time ON issued (forget_unix_ms);
"""
_DENIED: Final = """
    SELECT leaf_sha256, forget_unix_ms FROM issued WHERE forget_unix_ms > ?1 AND (struck OR facts IN
        (SELECT digest FROM fact_sets JOIN denials USING (kind, value)))
    ORDER BY forget_unix_ms DESC LIMIT ?2
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """Certificates that are not in force any more."""

    certificates: frozenset[bytes]  # SHA-256 of the leaf (DER)
    unexpired: frozenset[bytes]  # those among them whose own time is not over
    complete: bool  # False: there are more than can be told


class IssuedRegister:
    """The store."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, issued: Issued, facts: Collection[Fact], *, now: datetime) -> None:
        """Remember a certificate before it is given out; forget those that nobody can use any more."""
        rows = sorted((str(kind), value) for kind, value in set(facts))
        digest = sha384(tlv("cloister-facts-v1", *(part for row in rows for part in row)))
        leaf = hashlib.sha256(issued.leaf_der).digest()
        forget = _ms(issued.not_after + CALLS_OUTLIVE)

        def work(connection: apsw.Connection) -> None:
            connection.execute("DELETE FROM issued WHERE forget_unix_ms <= ?", (_ms(now),))
            if connection.changes():
                connection.execute("DELETE FROM fact_sets WHERE digest NOT IN (SELECT facts FROM issued)")
            connection.execute(
                "INSERT OR REPLACE INTO issued VALUES (?, ?, ?, 0, ?)", (leaf, str(issued.spiffe_id), digest, forget)
            )
            connection.executemany("INSERT OR IGNORE INTO fact_sets VALUES (?, ?, ?)", [(digest, *row) for row in rows])

        await self._database.write(work)

    async def strike(self, spiffe_id: str) -> None:
        """End all certificates of an identity for good, whether it is denied or not."""
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE issued SET struck = 1 WHERE spiffe_id = ?", (spiffe_id,)
            ).close()
        )

    async def ended(self, *, now: datetime) -> Ended:
        """Return what is denied or struck and would be in force otherwise, the longest-lived first."""
        values = (_ms(now), MAX_CERTIFICATES + 1)
        rows: Any = await self._database.read(lambda connection: connection.execute(_DENIED, values).fetchall())
        told = rows[:MAX_CERTIFICATES]
        expired_before = _ms(now + CALLS_OUTLIVE)
        unexpired = frozenset(leaf for leaf, forget in told if forget > expired_before)
        return Ended(frozenset(leaf for leaf, _ in told), unexpired, len(rows) <= MAX_CERTIFICATES)


def _ms(time: datetime) -> int:
    return int(time.timestamp() * 1000)
