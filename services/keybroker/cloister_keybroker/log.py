# SPDX-License-Identifier: Apache-2.0
"""The append-only decision log: entries in SQLite, an RFC 6962 Merkle tree over them, its head under the root key.

Every method works inside a transaction of the store, so that a decision and what it changes become durable
together, before any answer leaves. The database refuses UPDATE and DELETE; who edits the file itself is found out by
what logcheck.py compares when the broker starts, and by the proofs of logproofs.py, which lead to the head. The head's
MAC needs the root key. Putting back an old copy of the whole file is not detectable from the file alone: receipts and
checkpoints in other hands, which hold size and root, are what finds it.

decisions     what the broker itself counts and looks up by              entries    the leaves' bytes
log_nodes     hashes of perfect subtrees, in the order they come about   log_head   size, peaks, MAC
log_segments  each 4,096 entries, verified once when they were complete  evidence   tokens behind decisions
"""

from __future__ import annotations

import hmac
import itertools
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import apsw

from cloister.merkle import Frontier, MerkleError, leaf_hash, stored_position
from cloister.tlv import sha384, tlv
from cloister.transparency.checkpoint import MAX_SIZE
from cloister.transparency.entry import SALT_SIZE, Entry, EntryInvalid, LoggedEntry, Outline
from cloister_keybroker import logcheck
from cloister_keybroker.rootkey import RootKey

# Tokens kept, the newest: some 300 MB. The log proves without them; only replays of policies read them.
EVIDENCE_KEPT: Final = 100_000

SCHEMA: Final = """
CREATE TABLE decisions (
  idx INTEGER PRIMARY KEY,
  tenant TEXT NOT NULL,
  key_tag BLOB NOT NULL,
  grant_tag BLOB NOT NULL,
  record_digest BLOB NOT NULL
) STRICT;
CREATE INDEX decisions_by_tenant ON decisions (tenant);
CREATE INDEX decisions_by_key ON decisions (key_tag);
CREATE INDEX grants_by_job ON decisions (grant_tag) WHERE grant_tag <> x'';
CREATE INDEX record_changes ON decisions (idx) WHERE record_digest <> x'';
CREATE TABLE entries (idx INTEGER PRIMARY KEY, entry BLOB NOT NULL) STRICT;
CREATE TABLE evidence (digest BLOB PRIMARY KEY, token TEXT NOT NULL) STRICT;
CREATE TRIGGER decisions_are_not_changed BEFORE UPDATE ON decisions
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TRIGGER decisions_are_not_deleted BEFORE DELETE ON decisions
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TRIGGER decisions_follow_each_other BEFORE INSERT ON decisions
  WHEN NEW.idx IS NOT (SELECT coalesce(max(idx) + 1, 0) FROM decisions)
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TRIGGER entries_are_not_changed BEFORE UPDATE ON entries
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TRIGGER entries_are_not_deleted BEFORE DELETE ON entries
  BEGIN SELECT RAISE(ABORT, 'the decision log is append-only'); END;
CREATE TABLE log_nodes (position INTEGER PRIMARY KEY, hash BLOB NOT NULL) STRICT;
CREATE TABLE log_segments (
  number INTEGER PRIMARY KEY,
  root BLOB NOT NULL,
  columns BLOB NOT NULL,
  mac BLOB NOT NULL
) STRICT;
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


class DecisionLog:
    """The log, while a transaction is open."""

    def __init__(self, connection: apsw.Connection, root_key: RootKey) -> None:
        self._connection = connection
        self._root_key = root_key

    def create_head(self) -> None:
        """Begin an empty log."""
        empty = Frontier()
        self._connection.execute("INSERT INTO log_head VALUES (1, 0, ?, ?)", (empty.to_bytes(), self._mac(empty)))

    def append(self, entry: Entry, *, time_ms: int, token: str = "") -> LogPlace:
        """Append an entry; durable when the surrounding transaction is.

        `token` is the attestation result whose digest the entry has: kept once, however many entries name it. Raises
        ValueError for a token of another digest.
        """
        if token:
            self._keep_evidence(entry.evidence_digest, token)
        frontier = self.head()
        index = frontier.size
        data = entry.to_bytes(index=index, time_ms=time_ms, salt=secrets.token_bytes(SALT_SIZE))
        execute = self._connection.execute
        execute("INSERT INTO decisions VALUES (?, ?, ?, ?, ?)", (index, *logcheck.columns_of(Outline.of(index, entry))))
        execute("INSERT INTO entries VALUES (?, ?)", (index, data))
        frontier, completed = frontier.extended(leaf_hash(data))
        rows = enumerate(completed, start=stored_position(0, index))
        execute(
            f"INSERT INTO log_nodes VALUES {', '.join(['(?, ?)'] * len(completed))}",  # noqa: S608 - constants
            tuple(itertools.chain.from_iterable(rows)),
        )
        execute(
            "UPDATE log_head SET size = ?, peaks = ?, mac = ? WHERE only = 1",
            (frontier.size, frontier.to_bytes(), self._mac(frontier)),
        )
        if frontier.size % logcheck.SEGMENT == 0:
            logcheck.close_segment(self._connection, self._root_key, frontier.size, completed)
        return LogPlace(index, frontier.root())

    def head(self) -> Frontier:
        """Return the log's frontier; raise STORE_DAMAGED when it is not one this broker wrote."""
        row = self._connection.execute("SELECT size, peaks, mac FROM log_head WHERE only = 1").fetchone()
        if row is None:
            raise logcheck.damaged("it has no head")
        size, peaks, mac = row
        try:
            frontier = Frontier.from_bytes(size, peaks)
        except MerkleError:
            raise logcheck.damaged("its head is malformed") from None
        if not hmac.compare_digest(mac, self._mac(frontier)):
            raise logcheck.damaged("its head was not written by this broker")
        return frontier

    def verify(self, *, whole: bool = False) -> dict[bytes, bytes]:
        """Compare the log with its head; see logcheck.py. Raises STORE_DAMAGED.

        Returns, for the tag of each key, the digest of its record after its last logged change: the store compares.
        """
        return logcheck.verify(self._connection, self._root_key, self.head(), whole=whole)

    def walk(self, frontier: Frontier, begin: int, end: int) -> Frontier:
        """Return the frontier with the entries [begin, end) hashed into it; raise STORE_DAMAGED for a changed one."""
        return logcheck.walk(self._connection, frontier, begin, end)

    def check_segment(self, number: int, root: bytes) -> None:
        """Raise STORE_DAMAGED unless a segment's entries had this root when they were complete."""
        logcheck.check_segment(self._connection, self._root_key, number, root)

    def rekey(self, root_key: RootKey) -> None:
        """Authenticate head and segments anew, for a root key that replaces this one; entries stay as they are."""
        head, after = self.head(), DecisionLog(self._connection, root_key)
        logcheck.rekey(self._connection, self._root_key, root_key)
        self._connection.execute("UPDATE log_head SET mac = ? WHERE only = 1", (after._mac(head),))

    def released_to_job(self, *, key_uri: str, job: str, policy_digest: bytes, before: int = MAX_SIZE) -> int:
        """Count the grants of a key to a job under one policy, up to an index: the log itself is the counter."""
        row = self._connection.execute(
            "SELECT count(*) FROM decisions INDEXED BY grants_by_job"
            " WHERE grant_tag <> x'' AND grant_tag = ? AND idx < ?",
            (logcheck.grant_tag(key_uri, job, policy_digest), before),
        ).fetchone()
        return int(row[0]) if row else 0

    def newest(self, tenant: str, *, key_uri: str = "", limit: int) -> Iterator[LoggedEntry]:
        """Yield a tenant's entries, newest first; of one key unless key_uri is empty."""
        return self.preceding(tenant, key_uri=key_uri, before=MAX_SIZE, limit=limit)

    def preceding(self, tenant: str, *, key_uri: str = "", before: int, limit: int) -> Iterator[LoggedEntry]:
        """Yield a tenant's entries before an index, newest first; of one key unless key_uri is empty."""
        return self._entries("idx < ? ORDER BY idx DESC", tenant, key_uri, before, limit)

    def following(self, tenant: str, *, key_uri: str = "", first: int, limit: int) -> Iterator[LoggedEntry]:
        """Yield a tenant's entries from an index on, oldest first; of one key unless key_uri is empty."""
        return self._entries("idx >= ? ORDER BY idx", tenant, key_uri, first, limit)

    def _entries(self, which: str, tenant: str, key_uri: str, index: int, limit: int) -> Iterator[LoggedEntry]:
        column, value = ("key_tag", logcheck.key_tag(tenant, key_uri)) if key_uri else ("tenant", tenant)
        rows = self._connection.execute(
            f"SELECT idx, entry FROM decisions JOIN entries USING (idx) WHERE {column} = ? AND {which} LIMIT ?",  # noqa: S608 - constants
            (value, index, limit),
        )
        for place, data in rows:
            try:
                logged = LoggedEntry.parse(data)
            except EntryInvalid:
                raise logcheck.damaged(f"entry {place} is malformed") from None
            # The columns are only an index: what they say must not show a tenant what is another's.
            if (logged.index, logged.entry.tenant) != (place, tenant):
                raise logcheck.damaged(f"entry {place} was moved or relabelled")
            yield logged

    def evidence(self, digest: bytes) -> str | None:
        """Return the token of this SHA-384 digest, or None when none is kept; raise STORE_DAMAGED for an edited one."""
        row = self._connection.execute("SELECT token FROM evidence WHERE digest = ?", (digest,)).fetchone()
        if row is None:
            return None
        if not hmac.compare_digest(sha384(row[0].encode()), digest):
            raise logcheck.damaged("a token that it names was edited")
        return str(row[0])

    def _keep_evidence(self, digest: bytes, token: str) -> None:
        if not hmac.compare_digest(sha384(token.encode()), digest):
            raise ValueError("an entry keeps the token of its own evidence_digest and no other")
        self._connection.execute("INSERT INTO evidence VALUES (?, ?) ON CONFLICT DO NOTHING", (digest, token))
        if self._connection.changes():
            self._connection.execute("DELETE FROM evidence WHERE rowid <= last_insert_rowid() - ?", (EVIDENCE_KEPT,))

    def _mac(self, frontier: Frontier) -> bytes:
        return self._root_key.mac(tlv("cloister-log-head-v1", frontier.size, frontier.to_bytes()))
