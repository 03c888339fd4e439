# SPDX-License-Identifier: Apache-2.0
"""Workloads that services have announced: which measurements may become which rank or backend. Survives restarts.

Announcing the same twice is fine (a service that was interrupted does it again); announcing something else under a
name that is taken is refused, and a closed name stays closed: identities are never handed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister_attest import issued, tableseal, users
from cloister_attest.workloads import UNKNOWN, Backend, Job, Registration

MIGRATIONS: Final = (
    """
    CREATE TABLE jobs (
        job_id TEXT PRIMARY KEY,
        tenant TEXT NOT NULL,
        world_size INTEGER NOT NULL,
        script BLOB NOT NULL,
        config BLOB NOT NULL,
        open INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE backends (
        tenant TEXT NOT NULL,
        model TEXT NOT NULL,
        backend TEXT NOT NULL,
        script BLOB NOT NULL,
        config BLOB NOT NULL,
        open INTEGER NOT NULL,
        PRIMARY KEY (tenant, model, backend)
    ) STRICT;
    CREATE TABLE verdicts (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        time_unix_ms INTEGER NOT NULL,
        role TEXT NOT NULL,
        tenant TEXT NOT NULL,
        spiffe_id TEXT NOT NULL,
        accepted INTEGER NOT NULL,
        simulated INTEGER NOT NULL,
        quote_sha384 BLOB NOT NULL,
        event_log_sha384 BLOB NOT NULL,
        checks TEXT NOT NULL
    ) STRICT;
    CREATE INDEX verdicts_by_identity ON verdicts (spiffe_id, number);
    CREATE INDEX verdicts_by_outcome ON verdicts (accepted, number);
    """,
    """
    CREATE TABLE inputs (
        digest BLOB PRIMARY KEY,
        content BLOB NOT NULL
    ) STRICT;
    CREATE TABLE grounds (
        number INTEGER PRIMARY KEY,
        accepted INTEGER NOT NULL,
        bundle BLOB NOT NULL,
        collateral BLOB REFERENCES inputs (digest),
        policy BLOB NOT NULL REFERENCES inputs (digest)
    ) STRICT;
    CREATE INDEX grounds_by_outcome ON grounds (accepted, number);
    """,
    """
    CREATE TABLE denials (
        kind TEXT NOT NULL,
        value TEXT NOT NULL,
        reason TEXT NOT NULL,
        operator TEXT NOT NULL,
        time_unix_ms INTEGER NOT NULL,
        PRIMARY KEY (kind, value)
    ) STRICT;
    """,
    users.MIGRATION + tableseal.MIGRATION + issued.MIGRATION,
    """
    ALTER TABLE jobs ADD COLUMN registered_by TEXT NOT NULL DEFAULT '';
    ALTER TABLE jobs ADD COLUMN registered_unix_ms INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE backends ADD COLUMN registered_by TEXT NOT NULL DEFAULT '';
    ALTER TABLE backends ADD COLUMN registered_unix_ms INTEGER NOT NULL DEFAULT 0;
    """,
)
MAX_LISTED: Final = 10_000
_JOB: Final = "SELECT job_id, tenant, world_size, script, config, open FROM jobs WHERE job_id = ?"
_BACKEND: Final = """
    SELECT tenant, model, backend, script, config, open FROM backends WHERE tenant = ? AND model = ? AND backend = ?
"""
_JOBS: Final = """
    SELECT job_id, tenant, world_size, script, config, open, registered_by, registered_unix_ms FROM jobs
    WHERE (?1 OR open) ORDER BY registered_unix_ms DESC, rowid DESC LIMIT ?2
"""
_BACKENDS: Final = """
    SELECT tenant, model, backend, script, config, open, registered_by, registered_unix_ms FROM backends
    WHERE (?1 OR open) ORDER BY registered_unix_ms DESC, rowid DESC LIMIT ?2
"""


class Registry:
    """Jobs and backends, in SQLite."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def register_job(self, job: Job, by: Registration = UNKNOWN) -> None:
        """Open a job; raise CloisterError(WORKLOAD_EXISTS) when its name means something else, or is closed."""

        def work(connection: apsw.Connection) -> None:
            present = _job(connection, job.job_id)
            if present is None:
                connection.execute(
                    "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, 1, ?, ?)",
                    (job.job_id, job.tenant, job.world_size, job.script, job.config, by.service, by.unix_ms),
                )
            elif present != job:
                raise _taken(f"the job {job.job_id}", is_open=present.open)

        await self._database.write(work)

    async def close_job(self, job_id: str) -> None:
        """Let no rank of this job enrol any more; raise CloisterError(JOB_NOT_FOUND)."""

        def work(connection: apsw.Connection) -> None:
            connection.execute("UPDATE jobs SET open = 0 WHERE job_id = ?", (job_id,))
            if not connection.changes():
                raise CloisterError(
                    Code.JOB_NOT_FOUND,
                    what=f"there is no job {job_id}",
                    why="it was never registered",
                    todo="check the job id",
                )

        await self._database.write(work)

    async def job(self, job_id: str) -> Job | None:
        """Return a job, open or closed."""
        return await self._database.read(lambda connection: _job(connection, job_id))

    async def jobs(self, *, closed: bool) -> Sequence[tuple[Job, Registration]]:
        """Return jobs with who registered them, the newest first: those that are open, or all."""
        rows = await self._listed(_JOBS, closed)
        return [(_to_job(row[:6]), Registration(*row[6:])) for row in rows]

    async def backends(self, *, closed: bool) -> Sequence[tuple[Backend, Registration]]:
        """Return backends as `jobs` returns jobs."""
        rows = await self._listed(_BACKENDS, closed)
        return [(_to_backend(row[:6]), Registration(*row[6:])) for row in rows]

    async def _listed(self, query: str, closed: bool) -> Any:
        values = (int(closed), MAX_LISTED)
        return await self._database.read(lambda connection: connection.execute(query, values).fetchall())

    async def register_backend(self, backend: Backend, by: Registration = UNKNOWN) -> None:
        """Open a backend; raise CloisterError(WORKLOAD_EXISTS) like `register_job`."""

        def work(connection: apsw.Connection) -> None:
            names = (backend.tenant, backend.model, backend.backend)
            present = _backend(connection, names)
            if present is None:
                connection.execute(
                    "INSERT INTO backends VALUES (?, ?, ?, ?, ?, 1, ?, ?)",
                    (*names, backend.script, backend.config, by.service, by.unix_ms),
                )
            elif present != backend:
                raise _taken(f"the backend {backend.model}/{backend.backend}", is_open=present.open)

        await self._database.write(work)

    async def close_backend(self, tenant: str, model: str, backend: str) -> None:
        """Let this backend enrol no more; raise CloisterError(MODEL_NOT_FOUND)."""

        def work(connection: apsw.Connection) -> None:
            connection.execute(
                "UPDATE backends SET open = 0 WHERE tenant = ? AND model = ? AND backend = ?", (tenant, model, backend)
            )
            if not connection.changes():
                raise CloisterError(
                    Code.MODEL_NOT_FOUND,
                    what=f"there is no backend {model}/{backend}",
                    why="it was never registered",
                    todo="check model and backend id",
                )

        await self._database.write(work)

    async def backend(self, tenant: str, model: str, backend: str) -> Backend | None:
        """Return a backend, open or closed."""
        return await self._database.read(lambda connection: _backend(connection, (tenant, model, backend)))


def _job(connection: apsw.Connection, job_id: str) -> Job | None:
    row: Any = connection.execute(_JOB, (job_id,)).fetchone()
    return None if row is None else _to_job(row)


def _to_job(row: Any) -> Job:
    job, tenant, world_size, script, config, is_open = row
    return Job(job, tenant, world_size, script, config, bool(is_open))


def _backend(connection: apsw.Connection, names: tuple[str, str, str]) -> Backend | None:
    row: Any = connection.execute(_BACKEND, names).fetchone()
    return None if row is None else _to_backend(row)


def _to_backend(row: Any) -> Backend:
    tenant, model, backend, script, config, is_open = row
    return Backend(tenant, model, backend, script, config, bool(is_open))


def _taken(what: str, *, is_open: bool) -> CloisterError:
    return CloisterError(
        Code.WORKLOAD_EXISTS,
        what=f"{what} is registered already",
        why="with other measurements" if is_open else "and closed: a closed name is not used again",
        todo="use another name",
    )
