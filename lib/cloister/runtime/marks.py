# SPDX-License-Identifier: Apache-2.0
"""The highest versions that a process has seen, kept on disk: what was newest stays newest after a restart.

A mark is a number, and a text that tells apart what has the same number. Who compares, and how, is the caller's matter.
Whoever can put an older file in the place of this one can set marks back: they protect from a directory or a server
that goes back, not from the machine's owner. Against that, a policy says the lowest version that it accepts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import apsw

from cloister.runtime.database import Database

_MIGRATIONS: Final = (
    """
    CREATE TABLE marks (
        name TEXT PRIMARY KEY,
        number INTEGER NOT NULL,
        detail TEXT NOT NULL
    ) STRICT;
    """,
)


@dataclass(frozen=True, slots=True)
class Mark:
    """A version: its number, and what tells it apart from others of this number."""

    number: int
    detail: str


class Marks:
    """A file of marks by name. Safe from several threads; one process per file."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create the file (0600); raise CloisterError when it is in use or damaged."""
        return cls(Database.open(path, _MIGRATIONS))

    async def of(self, names: Iterable[str]) -> Mapping[str, Mark]:
        """Return the marks that there are under these names."""
        wanted = tuple(names)

        def work(connection: apsw.Connection) -> dict[str, Mark]:
            query = "SELECT number, detail FROM marks WHERE name = ?"
            rows = ((name, connection.execute(query, (name,)).fetchone()) for name in wanted)
            return {name: Mark(*row) for name, row in rows if row is not None}

        return await self._database.read(work)

    async def put(self, marks: Mapping[str, Mark]) -> None:
        """Keep marks in the place of those of the same names; when this returns, they are on disk."""
        rows = [(name, mark.number, mark.detail) for name, mark in marks.items()]
        query = "INSERT OR REPLACE INTO marks VALUES (?, ?, ?)"
        await self._database.write(lambda connection: connection.executemany(query, rows).close())

    def close(self) -> None:
        """Finish what was asked for, and close the file."""
        self._database.close()
