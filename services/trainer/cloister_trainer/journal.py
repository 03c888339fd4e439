# SPDX-License-Identifier: Apache-2.0
"""Jobs and their events on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import apsw

from cloister.api.trainer.v1 import trainer_pb2
from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister_trainer import wire
from cloister_trainer.job import JobRecord, JobState

_MIGRATIONS: Final = (
    """
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY,
        job_id TEXT NOT NULL UNIQUE,
        tenant TEXT NOT NULL,
        owner TEXT NOT NULL,
        request_id TEXT NOT NULL,
        state INTEGER NOT NULL,
        spec BLOB NOT NULL,
        job BLOB NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX jobs_request ON jobs (owner, request_id) WHERE request_id != '';
    CREATE INDEX jobs_tenant ON jobs (tenant, number);
    CREATE INDEX jobs_state ON jobs (state) WHERE state < 4;
    CREATE TABLE events (
        job_id TEXT NOT NULL REFERENCES jobs (job_id),
        sequence INTEGER NOT NULL,
        event BLOB NOT NULL,
        PRIMARY KEY (job_id, sequence)
    ) STRICT, WITHOUT ROWID;
    """,
)


class Journal:
    """What the coordinator must know after a restart; every method returns when its change is on disk."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, state_dir: Path) -> Journal:
        return cls(Database.open(state_dir / "trainer.sqlite", _MIGRATIONS))

    def close(self) -> None:
        self._database.close()

    async def insert(self, record: JobRecord, request_id: str, events: Sequence[trainer_pb2.Event]) -> str:
        """Store a new job and return its id; an earlier one with the owner's request id stays and is returned."""
        spec, job = wire.spec_message(record.spec).SerializeToString(), wire.job_message(record).SerializeToString()

        def run(connection: apsw.Connection) -> str:
            if request_id:
                known = connection.execute(
                    "SELECT job_id FROM jobs WHERE owner = ? AND request_id = ?", (record.owner, request_id)
                ).fetchone()
                if known:
                    return str(known[0])
            connection.execute(
                "INSERT INTO jobs (job_id, tenant, owner, request_id, state, spec, job) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (record.job_id, record.tenant, record.owner, request_id, record.state.value, spec, job),
            )
            _append(connection, record.job_id, events)
            return record.job_id

        return await self._database.write(run)

    async def store(self, job: trainer_pb2.Job, events: Sequence[trainer_pb2.Event]) -> None:
        """Replace a job's record and append events, both or neither. Calls take effect in the order they are made."""
        data = job.SerializeToString()

        def run(connection: apsw.Connection) -> None:
            connection.execute("UPDATE jobs SET state = ?, job = ? WHERE job_id = ?", (job.state, data, job.job_id))
            _append(connection, job.job_id, events)

        await self._database.write(run)

    async def job(self, job_id: str, tenant: str) -> trainer_pb2.Job:
        """Return a tenant's job with its description; another tenant's does not exist."""
        row = await self._database.read(
            lambda connection: connection.execute(
                "SELECT job, spec FROM jobs WHERE job_id = ? AND tenant = ?", (job_id, tenant)
            ).fetchone()
        )
        if row is None:
            raise CloisterError(
                Code.JOB_NOT_FOUND,
                what=f"there is no job {job_id[:80]!r} of yours",
                why="it was never submitted, or it belongs to somebody else",
                todo="list yours with `cloister train list`",
            )
        return _job(row)

    async def jobs(self, tenant: str, limit: int) -> list[trainer_pb2.Job]:
        """Return a tenant's newest jobs, without their scripts."""
        rows = await self._database.read(
            lambda connection: connection.execute(
                "SELECT job, spec FROM jobs WHERE tenant = ? ORDER BY number DESC LIMIT ?", (tenant, limit)
            ).fetchall()
        )
        found = [_job(row) for row in rows]
        for job in found:
            job.spec.script = b""
        return found

    async def unfinished(self) -> list[trainer_pb2.Job]:
        """Return the jobs that have not ended, of all tenants, oldest first."""
        rows = await self._database.read(
            lambda connection: connection.execute(
                "SELECT job, spec FROM jobs WHERE state < ? ORDER BY number", (JobState.SUCCEEDED.value,)
            ).fetchall()
        )
        return [_job(row) for row in rows]

    async def events(self, job_id: str, after: int, limit: int) -> list[trainer_pb2.Event]:
        """Return a job's events behind a sequence number, in order."""
        rows = await self._database.read(
            lambda connection: connection.execute(
                "SELECT event FROM events WHERE job_id = ? AND sequence > ? ORDER BY sequence LIMIT ?",
                (job_id, after, limit),
            ).fetchall()
        )
        return [trainer_pb2.Event.FromString(_blob(row[0])) for row in rows]

    async def last_sequence(self, job_id: str) -> int:
        row = await self._database.read(
            lambda connection: connection.execute(
                "SELECT max(sequence) FROM events WHERE job_id = ?", (job_id,)
            ).fetchone()
        )
        return int(row[0] or 0) if row else 0


def _job(row: tuple[Any, ...]) -> trainer_pb2.Job:
    job = trainer_pb2.Job.FromString(_blob(row[0]))
    job.spec.ParseFromString(_blob(row[1]))
    return job


def _blob(value: Any) -> bytes:
    assert isinstance(value, bytes)  # the tables are STRICT
    return value


def _append(connection: apsw.Connection, job_id: str, events: Sequence[trainer_pb2.Event]) -> None:
    connection.executemany(
        "INSERT INTO events (job_id, sequence, event) VALUES (?, ?, ?)",
        [(job_id, event.sequence, event.SerializeToString()) for event in events],
    )
