# SPDX-License-Identifier: Apache-2.0
"""The broker's own records in SQLite: keys, versions, policies, published data sets and the decision log, in one file.

Everything that changes a key is written in one transaction with its log entry. Rows are authenticated under the root
key, so an edited row is refused when it is read; at start the log is hashed again and every key row is compared with
the last change the log knows of, so a row that was put back, added or removed is found as well.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import apsw

from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister_keybroker import log
from cloister_keybroker.datasets import Registry
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.transaction import Transaction, store_damaged

_T = TypeVar("_T")

_SCHEMA: Final = (
    """
CREATE TABLE store (only INTEGER PRIMARY KEY CHECK (only = 1), canary BLOB NOT NULL) STRICT;
CREATE TABLE keys (
  uri TEXT PRIMARY KEY,
  tenant TEXT NOT NULL,
  owner TEXT NOT NULL,
  signer TEXT NOT NULL,
  state TEXT NOT NULL,
  purposes TEXT NOT NULL,
  created_ms INTEGER NOT NULL,
  newest INTEGER NOT NULL,
  min_version INTEGER NOT NULL,
  destroy_at_ms INTEGER NOT NULL,
  policy_version INTEGER NOT NULL,
  policy_digest BLOB NOT NULL,
  policy_withdrawn INTEGER NOT NULL,
  imported INTEGER NOT NULL,
  publications INTEGER NOT NULL,
  published BLOB NOT NULL,
  mac BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_by_tenant ON keys (tenant, uri);
CREATE INDEX keys_to_destroy ON keys (destroy_at_ms) WHERE state = 'destruction-scheduled';
CREATE TABLE key_versions (
  uri TEXT NOT NULL REFERENCES keys (uri),
  version INTEGER NOT NULL,
  handle BLOB NOT NULL,
  backend TEXT NOT NULL,
  created_ms INTEGER NOT NULL,
  mac BLOB NOT NULL,
  PRIMARY KEY (uri, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE policies (
  uri TEXT NOT NULL REFERENCES keys (uri),
  version INTEGER NOT NULL,
  yaml BLOB NOT NULL,
  envelope BLOB NOT NULL,
  mac BLOB NOT NULL,
  PRIMARY KEY (uri, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE publications (
  uri TEXT NOT NULL REFERENCES keys (uri),
  number INTEGER NOT NULL,
  dataset_id TEXT NOT NULL,
  version INTEGER NOT NULL,
  manifest_digest BLOB NOT NULL,
  wrapped_digest BLOB NOT NULL,
  PRIMARY KEY (uri, number)
) STRICT, WITHOUT ROWID;
"""
    + log.SCHEMA,
)


class KeyStore:
    """The database behind the broker."""

    def __init__(self, database: Database, root_key: RootKey) -> None:
        self._database = database
        self._root_key = root_key
        self._registries: OrderedDict[bytes, Registry] = OrderedDict()  # used on the database's thread only

    @classmethod
    async def open(cls, path: Path, root_key: RootKey) -> KeyStore:
        """Open or create the store and verify all of it; raise CloisterError(STORE_DAMAGED) when it does not hold."""
        store = cls(Database.open(path, _SCHEMA), root_key)
        try:
            await store._database.write(store._create_or_recognise)
            await store._database.read(store._verify)
        except apsw.Error as error:
            store.close()
            raise store_damaged(f"SQLite: {error}") from None
        except BaseException:
            store.close()
            raise
        return store

    async def read(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` on a consistent view."""
        return await self._database.read(lambda connection: work(self._transaction(connection)))

    async def write(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` in a transaction; durable on disk before this returns, undone when `work` raises."""
        return await self._database.write(lambda connection: work(self._transaction(connection)))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _transaction(self, connection: apsw.Connection) -> Transaction:
        return Transaction(connection, self._root_key, self._registries)

    def _create_or_recognise(self, connection: apsw.Connection) -> None:
        """Mark a new store with its root key's canary; refuse a store of another root key."""
        row = connection.execute("SELECT canary FROM store WHERE only = 1").fetchone()
        if row is None:
            filled = "SELECT EXISTS (SELECT 1 FROM keys) OR EXISTS (SELECT 1 FROM decisions)"
            if connection.execute(filled).fetchone() != (0,):
                raise store_damaged("its mark is missing")
            connection.execute("INSERT INTO store VALUES (1, ?)", (self._root_key.canary(),))
            log.create_head(connection, self._root_key)
        elif not hmac.compare_digest(row[0], self._root_key.canary()):
            raise CloisterError(
                Code.STORE_DAMAGED,
                what="the key store is under another root key",
                why="the root key file is not the one this store was created with",
                todo="start with the store's own root key file; it was not changed",
            )

    def _verify(self, connection: apsw.Connection) -> None:
        """Compare every key's row with the last change that the (verified) log knows of; then what hangs on the row."""
        logged = log.verify(connection, self._root_key)
        transaction = self._transaction(connection)
        records = list(transaction.all_records())
        stored = {str(record.uri): record.digest() for record in records}
        for uri in stored.keys() | logged.keys():
            if stored.get(uri) != logged.get(uri):
                raise store_damaged(f"the row of {uri} is not what the decision log says it became")
        for record in records:
            transaction.versions(record)
            transaction.registry(record)
