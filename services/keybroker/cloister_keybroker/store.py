# SPDX-License-Identifier: Apache-2.0
"""The broker's own records in SQLite: keys, versions, policies, published data sets and the decision log, in one file.

Everything that changes a key is written in one transaction with its log entry. Rows are authenticated under the root
key, so an edited row is refused when it is read; at start the log is verified and every key row is compared with
the last change the log knows of, so a row that was put back, added or removed is found as well.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import apsw
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.atomicfile import file_error, sync_directory
from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.runtime.database import Database
from cloister.transparency.start import Start
from cloister_keybroker import approvals, log, logcheck, logkey, mark, retired
from cloister_keybroker.datasets import Registry
from cloister_keybroker.keycache import Changes, Memo
from cloister_keybroker.keys import KeyRecord
from cloister_keybroker.logkey import LogKey
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import SealRecord
from cloister_keybroker.transaction import StoredKey, Transaction, store_damaged
from cloister_keybroker.turns import Turns

_T = TypeVar("_T")

SCHEMA: Final = (
    """
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
  data_key_digest BLOB NOT NULL,
  PRIMARY KEY (uri, number)
) STRICT, WITHOUT ROWID;
"""
    + mark.SCHEMA
    + approvals.SCHEMA
    + log.SCHEMA
    + logkey.SCHEMA
    + retired.SCHEMA,
)


class KeyStore:
    """The database behind the broker."""

    def __init__(self, database: Database, root_key: RootKey) -> None:
        self._database = database
        self._root_key = root_key
        self._ended: CloisterError | None = None
        self._registries: OrderedDict[bytes, Registry] = OrderedDict()  # used on the database's thread only
        self._next_write: asyncio.Event | None = None
        self._changes = Changes()
        self._records: Memo[KeyRecord] = Memo()  # used on the database's thread only
        self._keys: Memo[tuple[int, StoredKey]] = Memo()  # with the changes that had been counted when each was read
        self.turns = Turns()

    @classmethod
    async def create(cls, path: Path, root_key: RootKey, record: SealRecord) -> KeyStore:
        """Make a new, empty store; raise CloisterError(FILE_EXISTS) when there is one, or remains of one.

        The file appears under its name when it is whole: an interrupted attempt leaves nothing that looks like a store.
        """
        remains = [path, path.with_name(f"{path.name}-wal")]
        if any(file.exists() for file in remains):
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"there is a store at {path}",
                why="another in its place would lose its keys",
                todo="use it, or name another directory",
            )
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        database = Database.open(unfinished, SCHEMA)
        try:
            await database.write(lambda connection: _begin(connection, root_key, record))
            database.close()
            os.link(unfinished, path)  # unlike rename, link refuses an existing name
            sync_directory(path.parent)
        except OSError as error:
            raise file_error(error, what=f"cannot make the store {path}") from None
        finally:
            database.close()
            for suffix in ("", "-wal", "-journal"):
                unfinished.with_name(f"{unfinished.name}{suffix}").unlink(missing_ok=True)
        return await cls.open(path, root_key)

    @classmethod
    def open_file(cls, path: Path) -> Database:
        """Open the file of a store that is there; what it holds is for `unsealed` to judge."""
        return Database.open(path, SCHEMA, create=False)

    @classmethod
    async def open(cls, path: Path, root_key: RootKey) -> KeyStore:
        """Open a store and verify all of it; raise CloisterError(STORE_DAMAGED) when it does not hold."""
        database = cls.open_file(path)
        try:
            return await cls.unsealed(database, root_key)
        except BaseException:
            database.close()
            raise

    @classmethod
    async def unsealed(cls, database: Database, root_key: RootKey, *, whole: bool = False) -> KeyStore:
        """Verify a store whose file is open; raise CloisterError(STORE_DAMAGED) when it does not hold.

        `whole` hashes every entry of the log at once: a running broker does it little by little (logreading.py).
        """
        store = cls(database, root_key)
        try:
            await database.read(lambda connection: mark.recognise(connection, root_key))
            await database.read(lambda connection: store._verify(connection, whole=whole))
        except apsw.Error as error:
            raise store_damaged(f"SQLite: {error}") from None
        return store

    async def key(self, uri: KeyUri, *, version: int = 0) -> StoredKey | None:
        """Return what `Transaction.key` returns, without asking the database while no key has changed."""
        known = self._keys.look((uri, version))
        if known is not None and known[0] == self._changes.count and self._ended is None:
            return known[1]

        def work(transaction: Transaction) -> tuple[int, StoredKey | None]:
            return self._changes.count, transaction.key(uri, version=version)

        count, found = await self.read(work)
        if found is not None:
            self._keys.put((uri, version), (count, found))
        return found

    async def read(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` on a consistent view."""
        return await self._database.read(lambda connection: work(self._transaction(connection)))

    async def write(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` in a transaction; durable on disk before this returns, undone when `work` raises."""
        result = await self._database.write(lambda connection: work(self._transaction(connection)))
        if self._next_write is not None:
            self._next_write.set()
            self._next_write = None
        return result

    def next_write(self) -> asyncio.Event:
        """Return an event that is set after the next write; for the event loop that writes."""
        if self._next_write is None:
            self._next_write = asyncio.Event()
        return self._next_write

    def retire(self) -> None:
        """Do nothing more: the root key is to be forgotten or replaced. What still holds this store gets an error."""
        self._ended = CloisterError(
            Code.BROKER_SEALED,
            what="the key broker was sealed meanwhile",
            why="its root key was forgotten or replaced",
            todo="try again when it is unsealed",
        )

    def condemn(self, error: CloisterError) -> None:
        """Do nothing more but raise this error: what the store holds is not what was put there."""
        self._ended = error

    async def begin_life(self, receipt: Ed25519PrivateKey, broker_id: SpiffeId, *, time_ms: int) -> LogKey:
        """Log that a broker with this receipt key goes on with the log; return the log's own key."""

        def work(connection: apsw.Connection) -> LogKey:
            key = logkey.load_or_create(connection, self._root_key, broker_id)
            decisions = log.DecisionLog(connection, self._root_key)
            head = decisions.head()
            start = Start.make(
                log=key.note_key, broker_id=str(broker_id), receipt=receipt, size=head.size, root=head.root()
            )
            place = decisions.append(start.entry(), time_ms=time_ms)
            return replace(key, start_index=place.index)

        return await self._database.write(work)

    async def fold(self) -> None:
        """Leave nothing of deleted rows in the file or in the log beside it."""
        await self._database.fold()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _transaction(self, connection: apsw.Connection) -> Transaction:
        if self._ended is not None:  # on the database's thread: no work that waited there gets past it
            raise self._ended
        return Transaction(connection, self._root_key, self._registries, records=self._records, changes=self._changes)

    def _verify(self, connection: apsw.Connection, *, whole: bool) -> None:
        """Compare every key's row with the last change that the (verified) log knows of; then what hangs on the row."""
        logged = log.DecisionLog(connection, self._root_key).verify(whole=whole)
        transaction = self._transaction(connection)
        records = list(transaction.all_records())
        for record in records:
            if logged.pop(logcheck.key_tag(record.uri.tenant, str(record.uri)), b"") != record.digest():
                raise store_damaged(f"the row of {record.uri} is not what the decision log says it became")
        if logged:
            raise store_damaged("the decision log knows of a key whose row is missing")
        for record in records:
            transaction.versions(record)
            transaction.registry(record)
        transaction.retired.all()


def _begin(connection: apsw.Connection, root_key: RootKey, record: SealRecord) -> None:
    mark.write(connection, root_key, record)
    log.DecisionLog(connection, root_key).create_head()
