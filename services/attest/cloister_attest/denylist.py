# SPDX-License-Identifier: Apache-2.0
"""What operators do not let in any more: identities, platforms, measurements. Survives restarts.

Who is on it gets no new certificate, and those that are out already end as soon as services learn of it (issued.py).
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.guest.evidence import VerifiedEvidence
from cloister.identity import SpiffeId
from cloister.runtime.database import Database
from cloister_attest.tableseal import TableSealer

MAX_REASON: Final = 200  # characters
MAX_DENIALS: Final = 10_000


class DenialKind(enum.StrEnum):
    """What a denial is about."""

    IDENTITY = "identity"  # a SPIFFE id
    PLATFORM = "platform"  # FMSPC (12 hexadecimal digits), PIID or PPID (32)
    MEASUREMENT = "measurement"  # MRTD, MRSEAM, RTMR0 to RTMR2, or code, environment, configuration, data set (96)


_WANTED: Final = {
    DenialKind.IDENTITY: "a SPIFFE id",
    DenialKind.PLATFORM: "an FMSPC (12 hexadecimal digits), PIID or PPID (32)",
    DenialKind.MEASUREMENT: "96 hexadecimal digits",
}
_HEX: Final = re.compile(r"(?:[0-9a-f]{2})+", re.ASCII)
Fact = tuple[DenialKind, str]


@dataclass(frozen=True, slots=True)
class Denial:
    """One entry."""

    kind: DenialKind
    value: str  # as `parse_value` writes it
    reason: str  # public text
    by: str  # SPIFFE id of the operator
    time: datetime


class DenyList:
    """The store."""

    def __init__(self, database: Database, sealer: TableSealer) -> None:
        self._database = database
        self._sealer = sealer

    async def add(self, denial: Denial) -> None:
        """Put something on the list; an entry that is there stays as it is. Raise CloisterError(RATE_LIMITED)."""
        row = (denial.kind, denial.value, denial.reason, denial.by, int(denial.time.timestamp() * 1000))

        def work(connection: apsw.Connection) -> None:
            (count,) = connection.execute("SELECT count(*) FROM denials").fetchone()  # type: ignore[misc]
            if count >= MAX_DENIALS:
                raise CloisterError(
                    Code.RATE_LIMITED,
                    what=f"the deny-list has {count} entries",
                    why="it is bounded",
                    todo="remove what is long over: `cloister identity readmit`",
                )
            with self._sealer.change(connection, "denials"):
                connection.execute("INSERT OR IGNORE INTO denials VALUES (?, ?, ?, ?, ?)", row)

        await self._database.write(work)

    async def remove(self, kind: DenialKind, value: str) -> bool:
        """Take something off the list; say whether it was on it."""

        def work(connection: apsw.Connection) -> bool:
            with self._sealer.change(connection, "denials"):
                connection.execute("DELETE FROM denials WHERE kind = ? AND value = ?", (kind, value))
                return bool(connection.changes())

        return await self._database.write(work)

    async def all(self) -> Sequence[Denial]:
        """Return all entries, newest first."""
        query = "SELECT kind, value, reason, operator, time_unix_ms FROM denials ORDER BY time_unix_ms DESC, value"
        rows = await self._database.read(lambda connection: connection.execute(query).fetchall())
        return [_denial(row) for row in rows]

    async def first(self, facts: Iterator[Fact]) -> Denial | None:
        """Return an entry about one of these facts."""
        wanted = list(facts)

        def work(connection: apsw.Connection) -> Any:
            query = "SELECT kind, value, reason, operator, time_unix_ms FROM denials WHERE kind = ? AND value = ?"
            found = (connection.execute(query, fact).fetchone() for fact in wanted)
            return next((row for row in found if row is not None), None)

        row = await self._database.read(work)
        return None if row is None else _denial(row)


def facts_of(who: SpiffeId, evidence: VerifiedEvidence | None = None) -> Iterator[Fact]:
    """Return all that can be denied about somebody."""
    yield DenialKind.IDENTITY, str(who)
    if evidence is None:
        return
    pck, body, workload = evidence.verdict.pck, evidence.body, evidence.workload
    for platform in (pck.fmspc, pck.platform_instance_id, pck.ppid):
        yield DenialKind.PLATFORM, platform.hex()
    measured = (body.mr_td, body.mr_seam, *body.rtmrs[:3])
    for digest in (*measured, workload.script, workload.environment, workload.config, *workload.datasets):
        yield DenialKind.MEASUREMENT, digest.hex()


def parse_value(kind: DenialKind, text: str) -> str:
    """Return a value in its one spelling; raise CloisterError(ARGUMENT_INVALID)."""
    if kind is DenialKind.IDENTITY:
        try:
            return str(SpiffeId.parse(text))
        except CloisterError:
            raise _invalid(kind) from None
    value = text.removeprefix("sha384:").lower()
    sizes = (12, 32) if kind is DenialKind.PLATFORM else (96,)
    if len(value) not in sizes or not _HEX.fullmatch(value):
        raise _invalid(kind)
    return value


def _invalid(kind: DenialKind) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID,
        what="this cannot be denied",
        why=f"of kind {kind}, wanted {_WANTED[kind]}",
        todo="copy it from a verdict: `cloister attest verdicts --checks`",
    )


def _denial(row: Any) -> Denial:
    kind, value, reason, operator, time_ms = row
    return Denial(DenialKind(kind), value, reason, operator, datetime.fromtimestamp(time_ms / 1000, UTC))
