# SPDX-License-Identifier: Apache-2.0
"""Tables that say who somebody is, authenticated: the disk they lie on is the operator's.

A MAC over all rows is written in the transaction that changes one, under a key that lives with the CA. So a row that
was edited, added or taken away by anybody else is noticed. An old copy of the whole file is not in itself; but the MAC
is over the generation of the CA's state as well, and only the present and the last one are taken.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister.secret import SecretBytes
from cloister.tlv import tlv

MIGRATION: Final = """
CREATE TABLE table_seals (
    name TEXT PRIMARY KEY,
    generation INTEGER NOT NULL,
    mac BLOB NOT NULL
) STRICT;
"""
# Fixed texts: names of tables never come from outside.
_QUERIES: Final = {
    "denials": "SELECT kind, value, reason, operator, time_unix_ms FROM denials ORDER BY kind, value",
    "users": "SELECT hex(spki_sha256), spiffe_id, standing, added_by, added_unix_ms FROM users ORDER BY spki_sha256",
}
TABLES: Final = tuple(_QUERIES)


class TableSealer:
    """The seals of all tables. What concerns one transaction runs on the database's thread, within it."""

    def __init__(self, database: Database) -> None:
        """Nothing can be changed before `begin` or `load`."""
        self._database = database
        self._key = SecretBytes(b"")
        self._generation = 0

    async def begin(self, key: SecretBytes, generation: int) -> None:
        """Seal the tables as they are: this is a new CA."""
        await self._database.write(lambda connection: self.take(connection, key, generation, present=False))

    async def load(self, key: SecretBytes, generation: int) -> None:
        """Check the tables of a CA that was kept, and seal them; raise CloisterError(REGISTER_DAMAGED)."""
        await self._database.write(lambda connection: self.take(connection, key, generation, present=True))

    async def reseal(self, generation: int) -> None:
        """Seal the tables in the next generation, whose state is written already; errors as for `load`."""
        await self.load(self._key, generation)

    @contextmanager
    def change(self, connection: apsw.Connection, table: str) -> Iterator[None]:
        """Let a table be changed in the block; errors as for `load`."""
        self._check(connection, table, self._key, self._generation)
        yield
        self._write(connection, table)

    def take(self, connection: apsw.Connection, key: SecretBytes, generation: int, *, present: bool) -> None:
        """Do within a transaction what `begin` does, or `load` where a sealed state is `present`."""
        if present:
            for table in TABLES:
                self._check(connection, table, key, generation)
        self._key, self._generation = key, generation
        for table in TABLES:
            self._write(connection, table)

    def _write(self, connection: apsw.Connection, table: str) -> None:
        mac = _mac(connection, table, self._key, self._generation)
        connection.execute("INSERT OR REPLACE INTO table_seals VALUES (?, ?, ?)", (table, self._generation, mac))

    def _check(self, connection: apsw.Connection, table: str, key: SecretBytes, generation: int) -> None:
        """Raise unless the table is as it was sealed, in this generation or the last.

        The last: the state of the CA is written before the seals, and a process may end between the two.
        """
        row: Any = connection.execute("SELECT generation, mac FROM table_seals WHERE name = ?", (table,)).fetchone()
        if row is None:
            raise _damaged(table, "it is not sealed: the database is another one than this CA's")
        sealed_in, mac = row
        if not generation - 1 <= sealed_in <= generation:
            raise _damaged(table, f"it is of generation {sealed_in}, the CA of {generation}: it was put back")
        if not hmac.compare_digest(mac, _mac(connection, table, key, sealed_in)):
            raise _damaged(table, "a row was edited, added or taken away")


def _mac(connection: apsw.Connection, table: str, key: SecretBytes, generation: int) -> bytes:
    rows = connection.execute(_QUERIES[table]).fetchall()
    fields = (json.dumps(row, ensure_ascii=True, separators=(",", ":")) for row in rows)
    return hmac.digest(key.reveal(), tlv("cloister-table-seal-v1", table, generation, *fields), "sha384")


def _damaged(table: str, why: str) -> CloisterError:
    return CloisterError(
        Code.REGISTER_DAMAGED,
        what=f"attest's register of {table} does not verify",
        why=why,
        todo="keep the database for an investigation and restore the one that belongs to the sealed CA state",
    )
