# SPDX-License-Identifier: Apache-2.0
"""The broker's own records in SQLite: keys, versions, policies and the decision log, in one file.

Everything that changes a key is written in one transaction with its log entry. Rows are authenticated under the root
key, so an edited row is refused when it is read; at start the log is hashed again and every key row is compared with
the last change the log knows of, so a row that was put back, added or removed is found as well.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import apsw

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.runtime.database import Database
from cloister.tlv import sha384, tlv
from cloister.transparency.entry import Entry, LoggedEntry
from cloister_keybroker import log
from cloister_keybroker.keys import KeyRecord
from cloister_keybroker.rootkey import RootKey

_T = TypeVar("_T")

_SCHEMA: Final = (
    """
CREATE TABLE store (only INTEGER PRIMARY KEY CHECK (only = 1), canary BLOB NOT NULL) STRICT;
CREATE TABLE keys (
  uri TEXT PRIMARY KEY,
  tenant TEXT NOT NULL,
  owner TEXT NOT NULL,
  state TEXT NOT NULL,
  purposes TEXT NOT NULL,
  newest INTEGER NOT NULL,
  created_ms INTEGER NOT NULL,
  policy_version INTEGER NOT NULL,
  policy_digest BLOB NOT NULL,
  mac BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX keys_by_tenant ON keys (tenant, uri);
CREATE TABLE key_versions (
  uri TEXT NOT NULL REFERENCES keys (uri),
  version INTEGER NOT NULL,
  handle BLOB NOT NULL,
  PRIMARY KEY (uri, version)
) STRICT, WITHOUT ROWID;
CREATE TABLE policies (
  uri TEXT NOT NULL REFERENCES keys (uri),
  version INTEGER NOT NULL,
  yaml BLOB NOT NULL,
  mac BLOB NOT NULL,
  PRIMARY KEY (uri, version)
) STRICT, WITHOUT ROWID;
"""
    + log.SCHEMA,
)

_KEY_COLUMNS: Final = "uri, owner, state, purposes, newest, created_ms, policy_version, policy_digest, mac"


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key with what its back end needs and the policy in force (YAML as it was put; empty without one)."""

    record: KeyRecord
    handles: dict[int, bytes]
    policy_yaml: bytes


class Transaction:
    """What can be read and written while a transaction is open."""

    def __init__(self, connection: apsw.Connection, root_key: RootKey) -> None:
        self._connection = connection
        self._root_key = root_key

    def key(self, uri: KeyUri) -> StoredKey | None:
        """Return a key, or None; raise STORE_DAMAGED when its row is not one this broker wrote."""
        row = self._connection.execute(f"SELECT {_KEY_COLUMNS} FROM keys WHERE uri = ?", (str(uri),)).fetchone()  # noqa: S608 - a constant
        if row is None:
            return None
        record = self._record(row)
        rows = self._connection.execute("SELECT version, handle FROM key_versions WHERE uri = ?", (str(uri),))
        handles: dict[int, bytes] = dict(rows)
        if set(handles) != set(range(1, record.newest + 1)):
            raise _damaged(f"versions of {uri} are missing or were added")
        return StoredKey(record, handles, self._policy(record))

    def keys(self, tenant: str, *, after: str, limit: int) -> list[KeyRecord]:
        """Return a tenant's keys in the order of their URIs, beginning behind `after`."""
        rows = self._connection.execute(
            f"SELECT {_KEY_COLUMNS} FROM keys WHERE tenant = ? AND uri > ? ORDER BY uri LIMIT ?",  # noqa: S608 - a constant
            (tenant, after, limit),
        )
        return [self._record(row) for row in rows]

    def insert_key(self, record: KeyRecord, handle: bytes) -> None:
        """Store a new key and the handle of its first version."""
        self._connection.execute(
            "INSERT INTO keys (uri, tenant, owner, state, purposes, newest, created_ms, policy_version, policy_digest,"
            " mac) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                str(record.uri),
                record.uri.tenant,
                record.owner,
                record.state.value,
                _purposes_text(record.purposes),
                record.newest,
                record.created_ms,
                record.policy_version,
                record.policy_digest,
                self._mac(record),
            ),
        )
        self._connection.execute("INSERT INTO key_versions VALUES (?, ?, ?)", (str(record.uri), record.newest, handle))

    def update_key(self, record: KeyRecord, handles: dict[int, bytes]) -> None:
        """Store a key's new state or policy, and the handles that go with it."""
        self._connection.execute(
            "UPDATE keys SET state = ?, policy_version = ?, policy_digest = ?, mac = ? WHERE uri = ?",
            (record.state.value, record.policy_version, record.policy_digest, self._mac(record), str(record.uri)),
        )
        for version, handle in handles.items():
            self._connection.execute(
                "UPDATE key_versions SET handle = ? WHERE uri = ? AND version = ?", (handle, str(record.uri), version)
            )

    def insert_policy(self, uri: KeyUri, version: int, yaml: bytes) -> None:
        """Store a policy's text; earlier versions stay."""
        self._connection.execute(
            "INSERT INTO policies VALUES (?, ?, ?, ?)", (str(uri), version, yaml, self._policy_mac(uri, version, yaml))
        )

    def append(self, entry: Entry, *, time_ms: int, token: str = "") -> log.LogPlace:
        """Append to the decision log; `token` is the (authentic) attestation result behind its evidence_digest."""
        return log.append(self._connection, self._root_key, entry, time_ms=time_ms, token=token)

    def evidence(self, digest: bytes) -> str | None:
        """Return the token that an entry's evidence_digest names, or None when none was kept."""
        return log.evidence(self._connection, digest)

    def released_to_job(self, *, uri: KeyUri, job: str, policy_digest: bytes) -> int:
        """Count past grants."""
        return log.released_to_job(self._connection, key_uri=str(uri), job=job, policy_digest=policy_digest)

    def newest_entries(self, tenant: str, *, key_uri: str, limit: int) -> list[LoggedEntry]:
        """Return log entries of a tenant, newest first."""
        return list(log.newest(self._connection, tenant=tenant, key_uri=key_uri, limit=limit))

    def all_records(self) -> Iterator[KeyRecord]:
        """Yield every key of every tenant, authenticated."""
        for row in self._connection.execute(f"SELECT {_KEY_COLUMNS} FROM keys"):  # noqa: S608 - a constant
            yield self._record(row)

    def _record(self, row: tuple[object, ...]) -> KeyRecord:
        uri, owner, state, purposes, newest, created_ms, policy_version, policy_digest, mac = row
        try:
            record = KeyRecord(
                uri=KeyUri.parse(str(uri)),
                owner=str(owner),
                state=KeyState(str(state)),
                purposes=frozenset(Purpose(name) for name in str(purposes).split(",") if name),
                newest=int(str(newest)),
                created_ms=int(str(created_ms)),
                policy_version=int(str(policy_version)),
                policy_digest=policy_digest if isinstance(policy_digest, bytes) else b"?",
            )
        except (ValueError, CloisterError):
            raise _damaged("the row of a key is malformed") from None
        if not isinstance(mac, bytes) or not hmac.compare_digest(mac, self._mac(record)):
            raise _damaged(f"the row of {record.uri} was not written by this broker")
        return record

    def _policy(self, record: KeyRecord) -> bytes:
        if record.policy_version == 0:
            return b""
        row = self._connection.execute(
            "SELECT yaml, mac FROM policies WHERE uri = ? AND version = ?",
            (str(record.uri), record.policy_version),
        ).fetchone()
        if row is None or not hmac.compare_digest(row[1], self._policy_mac(record.uri, record.policy_version, row[0])):
            raise _damaged(f"the policy of {record.uri} was removed or edited")
        return bytes(row[0])

    def _mac(self, record: KeyRecord) -> bytes:
        return self._root_key.mac(tlv("cloister-key-row-v1", record.digest()))

    def _policy_mac(self, uri: KeyUri, version: int, yaml: bytes) -> bytes:
        return self._root_key.mac(tlv("cloister-policy-row-v1", str(uri), version, sha384(yaml)))


class KeyStore:
    """The database behind the broker."""

    def __init__(self, database: Database, root_key: RootKey) -> None:
        self._database = database
        self._root_key = root_key

    @classmethod
    async def open(cls, path: Path, root_key: RootKey) -> KeyStore:
        """Open or create the store and verify all of it; raise CloisterError(STORE_DAMAGED) when it does not hold."""
        store = cls(Database.open(path, _SCHEMA), root_key)
        try:
            await store._database.write(store._create_or_recognise)
            await store._database.read(store._verify)
        except apsw.Error as error:
            store.close()
            raise _damaged(f"SQLite: {error}") from None
        except BaseException:
            store.close()
            raise
        return store

    async def read(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` on a consistent view."""
        return await self._database.read(lambda connection: work(Transaction(connection, self._root_key)))

    async def write(self, work: Callable[[Transaction], _T]) -> _T:
        """Run `work` in a transaction; durable on disk before this returns, undone when `work` raises."""
        return await self._database.write(lambda connection: work(Transaction(connection, self._root_key)))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _create_or_recognise(self, connection: apsw.Connection) -> None:
        """Mark a new store with its root key's canary; refuse a store of another root key."""
        row = connection.execute("SELECT canary FROM store WHERE only = 1").fetchone()
        if row is None:
            filled = "SELECT EXISTS (SELECT 1 FROM keys) OR EXISTS (SELECT 1 FROM decisions)"
            if connection.execute(filled).fetchone() != (0,):
                raise _damaged("its mark is missing")
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
        """Compare every key's row with the last change that the (verified) log knows of."""
        logged = log.verify(connection, self._root_key)
        transaction = Transaction(connection, self._root_key)
        stored = {str(record.uri): record.digest() for record in transaction.all_records()}
        for uri in stored.keys() | logged.keys():
            if stored.get(uri) != logged.get(uri):
                raise _damaged(f"the row of {uri} is not what the decision log says it became")


def _purposes_text(purposes: frozenset[Purpose]) -> str:
    return ",".join(sorted(purpose.value for purpose in purposes))


def _damaged(why: str) -> CloisterError:
    return CloisterError(
        Code.STORE_DAMAGED,
        what="the key store does not verify",
        why=why,
        todo="keep the file for an investigation and restore the store and its root key from the same backup",
    )
