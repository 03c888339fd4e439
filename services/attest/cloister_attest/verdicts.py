# SPDX-License-Identifier: Apache-2.0
"""What attest decided, kept for operators and reports: a bounded number of verdicts, newest first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import apsw

from cloister.runtime.database import Database
from cloister.tdx.check import Check


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


class Verdicts:
    """The store. Accepted and refused verdicts are bounded apart."""

    def __init__(self, database: Database, *, limit: int) -> None:
        self._database = database
        self._limit = limit

    async def add(self, verdict: Verdict) -> None:
        """Keep a verdict; the oldest of its outcome goes when there are too many."""
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

        await self._database.write(work)

    async def newest(self, *, limit: int, spiffe_id: str = "", tenant: str | None = None) -> Sequence[Verdict]:
        """Return verdicts, newest first: of one identity, and with `tenant` only those of it and of services."""
        query = """
            SELECT time_unix_ms, role, tenant, spiffe_id, accepted, simulated, checks, quote_sha384, event_log_sha384
            FROM verdicts
            WHERE (?1 = '' OR spiffe_id = ?1) AND (?2 IS NULL OR (spiffe_id <> '' AND tenant IN (?2, '')))
            ORDER BY number DESC LIMIT ?3
        """
        values = (spiffe_id, tenant, limit)
        rows = await self._database.read(lambda connection: connection.execute(query, values).fetchall())
        return [_verdict(row) for row in rows]


def _verdict(row: Any) -> Verdict:
    time_ms, role, tenant, spiffe_id, accepted, simulated, checks, quote, log = row
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
    )
