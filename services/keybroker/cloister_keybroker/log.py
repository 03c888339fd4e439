# SPDX-License-Identifier: Apache-2.0
"""The append-only decision log: entries in SQLite, an RFC 6962 Merkle tree over them, its head under the root key.

Every function works inside a transaction of the store, so that a decision and what it changes become durable
together, before any answer leaves. The database refuses UPDATE and DELETE; who edits the file itself is found out
when the broker starts, because every entry is hashed again and the head's MAC needs the root key. Putting back an old
copy of the whole file is not detectable from the file alone: receipts, which hold index and root, are.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.merkle import Frontier, MerkleError, leaf_hash
from cloister.tlv import sha384, tlv
from cloister.transparency.entry import SALT_SIZE, Entry, EntryInvalid, LoggedEntry, Outline
from cloister_keybroker.rootkey import RootKey

# Tokens kept, the newest: some 300 MB. The log proves without them; only replays of policies read them.
EVIDENCE_KEPT: Final = 100_000

SCHEMA: Final = """
CREATE TABLE decisions (
  idx INTEGER PRIMARY KEY,
  tenant TEXT NOT NULL,
  key_uri TEXT NOT NULL,
  job TEXT NOT NULL,
  granted INTEGER NOT NULL,
  policy_digest BLOB NOT NULL,
  entry BLOB NOT NULL
) STRICT;
CREATE TABLE evidence (digest BLOB PRIMARY KEY, token TEXT NOT NULL) STRICT;
CREATE INDEX decisions_by_tenant ON decisions (tenant, key_uri, idx);
CREATE INDEX grants_by_job ON decisions (key_uri, job, policy_digest) WHERE granted = 1 AND job <> '';
CREATE TRIGGER decisions_are_not_changed BEFORE UPDATE ON decisions
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TRIGGER decisions_are_not_deleted BEFORE DELETE ON decisions
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TRIGGER decisions_follow_each_other BEFORE INSERT ON decisions
  WHEN NEW.idx IS NOT (SELECT coalesce(max(idx) + 1, 0) FROM decisions)
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TABLE log_head (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  size INTEGER NOT NULL,
  peaks BLOB NOT NULL,
  mac BLOB NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where an entry stands, and the root of the log that ends with it."""

    index: int
    root: bytes  # 32 bytes


def create_head(connection: apsw.Connection, root_key: RootKey) -> None:
    """Begin an empty log."""
    empty = Frontier()
    connection.execute("INSERT INTO log_head VALUES (1, 0, ?, ?)", (empty.to_bytes(), _mac(root_key, empty)))


def append(connection: apsw.Connection, root_key: RootKey, entry: Entry, *, time_ms: int, token: str = "") -> LogPlace:
    """Append an entry; durable when the surrounding transaction is.

    `token` is the attestation result whose digest the entry has: kept once, however many entries name it. Raises
    ValueError for a token of another digest.
    """
    if token:
        _keep_evidence(connection, entry.evidence_digest, token)
    frontier = read_head(connection, root_key)
    index = frontier.size
    data = entry.to_bytes(index=index, time_ms=time_ms, salt=secrets.token_bytes(SALT_SIZE))
    connection.execute(
        "INSERT INTO decisions VALUES (?, ?, ?, ?, ?, ?, ?)",
        (index, entry.tenant, entry.key_uri, entry.job, int(entry.granted), entry.policy_digest, data),
    )
    frontier = frontier.appended(leaf_hash(data))
    connection.execute(
        "UPDATE log_head SET size = ?, peaks = ?, mac = ? WHERE only = 1",
        (frontier.size, frontier.to_bytes(), _mac(root_key, frontier)),
    )
    return LogPlace(index, frontier.root())


def read_head(connection: apsw.Connection, root_key: RootKey) -> Frontier:
    """Return the log's frontier; raise STORE_DAMAGED when it is not one this broker wrote."""
    row = connection.execute("SELECT size, peaks, mac FROM log_head WHERE only = 1").fetchone()
    if row is None:
        raise _damaged("it has no head")
    size, peaks, mac = row
    try:
        frontier = Frontier.from_bytes(size, peaks)
    except MerkleError:
        raise _damaged("its head is malformed") from None
    if not hmac.compare_digest(mac, _mac(root_key, frontier)):
        raise _damaged("its head was not written by this broker")
    return frontier


def verify(connection: apsw.Connection, root_key: RootKey) -> dict[str, bytes]:
    """Hash every entry again and compare with the head; raise STORE_DAMAGED when anything differs.

    Returns, for each key, the digest of its record after its last logged change: the store compares its rows.
    """
    wanted = read_head(connection, root_key)
    frontier = Frontier()
    records: dict[str, bytes] = {}
    rows = connection.execute(
        "SELECT idx, tenant, key_uri, job, granted, policy_digest, entry FROM decisions ORDER BY idx"
    )
    for idx, *columns, data in rows:
        try:
            outline = Outline.parse(data)
        except EntryInvalid:
            raise _damaged(f"entry {idx} is malformed") from None
        # The columns are only an index, but max_per_job counts by them.
        if outline.index != idx or idx != frontier.size or tuple(columns) != outline.columns:
            raise _damaged(f"entry {idx} was moved or relabelled")
        frontier = frontier.appended(leaf_hash(data))
        if outline.record_digest:
            records[outline.columns[1]] = outline.record_digest
    if frontier != wanted:
        raise _damaged("entries were changed, added or removed")
    return records


def released_to_job(connection: apsw.Connection, *, key_uri: str, job: str, policy_digest: bytes) -> int:
    """Count the grants of a key to a job under one policy: the log itself is the counter."""
    row = connection.execute(
        "SELECT count(*) FROM decisions WHERE granted = 1 AND job <> '' AND key_uri = ? AND job = ?"
        " AND policy_digest = ?",
        (key_uri, job, policy_digest),
    ).fetchone()
    return int(row[0]) if row else 0


def newest(connection: apsw.Connection, *, tenant: str, key_uri: str, limit: int) -> Iterator[LoggedEntry]:
    """Yield a tenant's entries, newest first; of one key unless key_uri is empty."""
    if key_uri:
        rows = connection.execute(
            "SELECT entry FROM decisions WHERE tenant = ? AND key_uri = ? ORDER BY idx DESC LIMIT ?",
            (tenant, key_uri, limit),
        )
    else:
        rows = connection.execute(
            "SELECT entry FROM decisions WHERE tenant = ? ORDER BY idx DESC LIMIT ?", (tenant, limit)
        )
    for (data,) in rows:
        try:
            yield LoggedEntry.parse(data)
        except EntryInvalid:
            raise _damaged("an entry is malformed") from None


def evidence(connection: apsw.Connection, digest: bytes) -> str | None:
    """Return the token of this SHA-384 digest, or None when none was kept; raise STORE_DAMAGED for an edited one."""
    row = connection.execute("SELECT token FROM evidence WHERE digest = ?", (digest,)).fetchone()
    if row is None:
        return None
    if not hmac.compare_digest(sha384(row[0].encode()), digest):
        raise _damaged("a token that it names was edited")
    return str(row[0])


def _keep_evidence(connection: apsw.Connection, digest: bytes, token: str) -> None:
    if not hmac.compare_digest(sha384(token.encode()), digest):
        raise ValueError("an entry keeps the token of its own evidence_digest and no other")
    connection.execute("INSERT INTO evidence VALUES (?, ?) ON CONFLICT DO NOTHING", (digest, token))
    if connection.changes():
        connection.execute("DELETE FROM evidence WHERE rowid <= last_insert_rowid() - ?", (EVIDENCE_KEPT,))


def _mac(root_key: RootKey, frontier: Frontier) -> bytes:
    return root_key.mac(tlv("cloister-log-head-v1", frontier.size, frontier.to_bytes()))


def _damaged(why: str) -> CloisterError:
    return CloisterError(
        Code.STORE_DAMAGED,
        what="the decision log does not verify",
        why=why,
        todo="keep this file as it is for an investigation and restore the store from a backup",
    )
