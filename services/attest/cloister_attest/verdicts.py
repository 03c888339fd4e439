# SPDX-License-Identifier: Apache-2.0
"""What attest decided, kept for operators and reports: a bounded number of verdicts, newest first.

Of the newest, what they were made from is kept as well, so that they can be made again (cloister.guest.verdictbundle).
Collateral and policies are shared by many verdicts and stored once.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import apsw

from cloister.errors import CloisterError, Code
from cloister.guest.verdictbundle import VerdictBundle
from cloister.runtime.database import Database
from cloister.tdx.check import Check
from cloister.tlv import sha384


@dataclass(frozen=True, slots=True)
class Verdict:
    """One decision about one attempt to enrol."""

    time: datetime
    role: str  # as claimed
    tenant: str  # of the identity; empty for services and refusals
    spiffe_id: str  # empty when it was refused before an identity was found
    accepted: bool
    simulated: bool
    checks: tuple[Check, ...]
    # SHA-384 of quote and event log (empty for users): what an archive of evidence would be keyed by.
    quote_digest: bytes
    event_log_digest: bytes
    # Given by the store.
    number: int = field(default=0, compare=False)
    has_grounds: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class Grounds:
    """What a verdict was made from."""

    bundle: VerdictBundle  # without what follows
    collateral: bytes  # nine strings as JSON, or empty when there was none
    policy: str
    references: tuple[str, ...]


class Verdicts:
    """The store. Accepted and refused verdicts are bounded apart, and so are their grounds."""

    def __init__(self, database: Database, *, limit: int, grounds_limit: int) -> None:
        self._database = database
        self._limit = limit
        self._grounds_limit = grounds_limit

    async def add(self, verdict: Verdict, grounds: Grounds | None = None) -> None:
        """Keep a verdict and its grounds; the oldest of its outcome go when there are too many."""
        checks = json.dumps([[check.name, check.ok, check.wanted, check.got] for check in verdict.checks])
        row = (
            int(verdict.time.timestamp() * 1000),
            verdict.role,
            verdict.tenant,
            verdict.spiffe_id,
            int(verdict.accepted),
            int(verdict.simulated),
            verdict.quote_digest,
            verdict.event_log_digest,
            checks,
        )

        kept = await asyncio.to_thread(_packed, grounds) if grounds is not None and self._grounds_limit else None

        def work(connection: apsw.Connection) -> None:
            connection.execute(
                "INSERT INTO verdicts (time_unix_ms, role, tenant, spiffe_id, accepted, simulated, quote_sha384,"
                " event_log_sha384, checks) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            connection.execute(
                "DELETE FROM verdicts WHERE number IN (SELECT number FROM verdicts WHERE accepted = ?"
                " ORDER BY number DESC LIMIT -1 OFFSET ?)",
                (row[4], self._limit),
            )
            if kept is not None:
                bundle, collateral, policy = kept
                number = connection.last_insert_rowid()
                digests = [_store(connection, content) for content in (collateral, policy)]
                connection.execute(
                    "INSERT INTO grounds VALUES (?, ?, ?, ?, ?)", (number, row[4], bundle, digests[0], digests[1])
                )
                connection.execute(
                    "DELETE FROM grounds WHERE accepted = ?1 AND number NOT IN"
                    " (SELECT number FROM grounds WHERE accepted = ?1 ORDER BY number DESC LIMIT ?2)",
                    (row[4], self._grounds_limit),
                )

        await self._database.write(work)

    async def newest(self, *, limit: int, spiffe_id: str = "", tenant: str | None = None) -> Sequence[Verdict]:
        """Return verdicts, newest first: of one identity, and with `tenant` only those of it and of services."""
        query = """
            SELECT time_unix_ms, role, tenant, spiffe_id, accepted, simulated, checks, quote_sha384, event_log_sha384,
                number, EXISTS (SELECT 1 FROM grounds WHERE grounds.number = verdicts.number)
            FROM verdicts
            WHERE (?1 = '' OR spiffe_id = ?1) AND (?2 IS NULL OR (spiffe_id <> '' AND tenant IN (?2, '')))
            ORDER BY number DESC LIMIT ?3
        """
        values = (spiffe_id, tenant, limit)
        rows = await self._database.read(lambda connection: connection.execute(query, values).fetchall())
        return [_verdict(row) for row in rows]

    async def bundle(self, number: int, *, tenant: str | None = None) -> bytes:
        """Return a verdict with its grounds as JSON; raise CloisterError(VERDICT_NOT_FOUND)."""
        query = """
            SELECT bundle, (SELECT content FROM inputs WHERE digest = collateral),
                (SELECT content FROM inputs WHERE digest = policy)
            FROM grounds WHERE number = ?1
                AND EXISTS (SELECT 1 FROM verdicts WHERE verdicts.number = ?1
                    AND (?2 IS NULL OR (spiffe_id <> '' AND tenant IN (?2, ''))))
        """
        row: Any = await self._database.read(lambda connection: connection.execute(query, (number, tenant)).fetchone())
        if row is None:
            raise CloisterError(
                Code.VERDICT_NOT_FOUND,
                what=f"there is no evidence of the verdict {number}",
                why="there is no such verdict, or it is too old, or its quote was not even of a genuine platform",
                todo="`cloister attest verdicts` lists those there are",
            )
        bundle = await asyncio.to_thread(_unpacked, *row)
        return await asyncio.to_thread(bundle.to_json)

    async def sweep(self) -> None:
        """Remove collateral and policies that no verdict refers to any more."""
        await self._database.write(
            lambda connection: connection.execute(
                "DELETE FROM inputs WHERE digest NOT IN (SELECT policy FROM grounds) AND digest NOT IN"
                " (SELECT collateral FROM grounds WHERE collateral IS NOT NULL)"
            ).close()
        )


def _verdict(row: Any) -> Verdict:
    time_ms, role, tenant, spiffe_id, accepted, simulated, checks, quote, log, number, has_grounds = row
    return Verdict(
        time=datetime.fromtimestamp(time_ms / 1000, UTC),
        role=role,
        tenant=tenant,
        spiffe_id=spiffe_id,
        accepted=bool(accepted),
        simulated=bool(simulated),
        checks=tuple(Check(*check) for check in json.loads(checks)),
        quote_digest=quote,
        event_log_digest=log,
        number=number,
        has_grounds=bool(has_grounds),
    )


def _packed(grounds: Grounds) -> tuple[bytes, bytes, bytes]:
    """Return bundle, collateral and policy as they are stored."""
    policy = json.dumps({"policy": grounds.policy, "references": grounds.references})
    return zlib.compress(grounds.bundle.model_dump_json().encode(), 1), grounds.collateral, policy.encode()


def _unpacked(bundle: bytes, collateral: bytes | None, policy: bytes) -> VerdictBundle:
    rules = json.loads(policy)
    return VerdictBundle.parse(zlib.decompress(bundle)).model_copy(
        update={
            "collateral": None if collateral is None else json.loads(collateral),
            "policy": rules["policy"],
            "references": tuple(rules["references"]),
        }
    )


def _store(connection: apsw.Connection, content: bytes) -> bytes | None:
    if not content:
        return None
    digest = sha384(content)
    connection.execute("INSERT OR IGNORE INTO inputs VALUES (?, ?)", (digest, content))
    return digest
