# SPDX-License-Identifier: Apache-2.0
"""What a cache keeps on disk: the exact answers, under their URLs, of one root.

SQLite, because an answer is body, chain and time together or not at all, and because two processes that write one
cache would each undo the other's memory of what is newest. What is read back is verified again like a new answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

import apsw

from cloister.collateral.decode import Answer
from cloister.collateral.family import PckCa, Tee
from cloister.collateral.resources import DocumentKind, Resource
from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database

_MIGRATIONS: Final = (
    """
    CREATE TABLE root (only_row INTEGER PRIMARY KEY CHECK (only_row = 1), fingerprint BLOB NOT NULL) STRICT;
    CREATE TABLE answers (
        url TEXT PRIMARY KEY,
        kind TEXT NOT NULL,
        tee TEXT,
        fmspc BLOB,
        ca TEXT,
        evaluation_number INTEGER,
        body BLOB NOT NULL,
        chain_header TEXT,
        fetched_at INTEGER NOT NULL -- milliseconds since 1970, UTC
    ) STRICT, WITHOUT ROWID;
    """,
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_PUT: Final = """
    INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (url) DO UPDATE SET
        body = excluded.body, chain_header = excluded.chain_header, fetched_at = excluded.fetched_at
"""


@dataclass(frozen=True, slots=True)
class StoredAnswer:
    """One row: claimed, until it is verified again."""

    resource: Resource
    answer: Answer
    fetched_at: datetime


class CollateralStore:
    """The file of one cache."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path, *, root_fingerprint: bytes) -> Self:
        """Open or create the file for this root; raise CloisterError when it belongs to another."""
        database = Database.open(path, _MIGRATIONS)
        try:
            found = _owner(database, root_fingerprint)
            if found != root_fingerprint:
                raise CloisterError(
                    Code.CONFIG_INVALID,
                    what=f"the collateral cache {path} belongs to another trust root",
                    why="Intel's collateral and that of a development root are never kept together",
                    todo="name another file for this root's cache",
                )
        except CloisterError:
            database.close()
            raise
        return cls(database)

    def load(self) -> list[StoredAnswer]:
        """Return every row that can be read; the rest is not worth keeping."""
        try:
            rows = self._database.read_sync(lambda connection: connection.execute("SELECT * FROM answers").fetchall())
        except apsw.Error as error:
            raise _damaged(error) from error
        return [row for row in map(_from_row, rows) if row is not None]

    async def put(self, stored: StoredAnswer) -> None:
        """Put an answer in the place of the one before it; it is on disk when this returns."""
        resource, answer = stored.resource, stored.answer
        values = (
            resource.url,
            str(resource.kind),
            resource.tee,
            resource.fmspc,
            resource.ca,
            resource.evaluation_number,
            answer.body,
            answer.chain_header,
            (stored.fetched_at - _EPOCH) // timedelta(milliseconds=1),
        )
        try:
            await self._database.write(lambda connection: connection.execute(_PUT, values).fetchall())
        except apsw.Error as error:
            raise _damaged(error) from error

    async def remove(self, url: str) -> None:
        """Forget an answer, and with it what was newest."""
        try:
            await self._database.write(
                lambda connection: connection.execute("DELETE FROM answers WHERE url = ?", (url,)).fetchall()
            )
        except apsw.Error as error:
            raise _damaged(error) from error

    def close(self) -> None:
        self._database.close()


def _owner(database: Database, fingerprint: bytes) -> bytes:
    try:
        return database.write_sync(lambda connection: _claim(connection, fingerprint))
    except apsw.Error as error:
        raise _damaged(error) from error


def _damaged(error: apsw.Error) -> CloisterError:
    return CloisterError(
        Code.IO_FAILED,
        what="the collateral cache cannot be read or written",
        why=str(error),
        todo="remove its file: what it held is fetched again",
    )


def _claim(connection: apsw.Connection, fingerprint: bytes) -> bytes:
    """Write the root of a new file; return the root of this file."""
    connection.execute("INSERT OR IGNORE INTO root VALUES (1, ?)", (fingerprint,)).fetchall()
    found = connection.execute("SELECT fingerprint FROM root").fetchone()
    return bytes(found[0]) if found else b""


def _from_row(row: tuple[object, ...]) -> StoredAnswer | None:
    url, kind, tee, fmspc, ca, number, body, chain_header, fetched_ms = row
    try:
        resource = Resource(
            DocumentKind(str(kind)),
            str(url),
            tee=None if tee is None else Tee(str(tee)),
            fmspc=fmspc if isinstance(fmspc, bytes) else None,
            ca=None if ca is None else PckCa(str(ca)),
            evaluation_number=number if isinstance(number, int) else None,
        )
        fetched_at = _EPOCH + timedelta(milliseconds=int(str(fetched_ms)))
    except (ValueError, OverflowError):
        return None
    if not isinstance(body, bytes):
        return None
    return StoredAnswer(resource, Answer(body, None if chain_header is None else str(chain_header)), fetched_at)
