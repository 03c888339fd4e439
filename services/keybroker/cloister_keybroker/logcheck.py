# SPDX-License-Identifier: Apache-2.0
"""Is this the log that was written? What the broker compares when it starts, in seconds for a million entries.

Whenever 4,096 entries are complete they are hashed once more, compared with their columns, and a segment is written:
the root of their subtree and a digest of their columns, under the root key. At start the columns of every segment are
digested again (SQLite does the work), the indexes are compared with them, what is behind the last segment is hashed
entry by entry, and all roots together must give the head. What the broker counts and looks up is then what was logged.

The bytes of entries in complete segments are not read at start: an edited one is found when it is read, because the
proof that goes with it does not lead to the root, and by `verify(whole=True)`.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.merkle import Frontier, leaf_hash
from cloister.tlv import tlv
from cloister.transparency.entry import EntryInvalid, Outline
from cloister_keybroker.rootkey import RootKey

_LEVEL: Final = 12
_TAG_SIZE: Final = 16
SEGMENT: Final = 1 << _LEVEL  # entries; some 40 ms to verify


def close_segment(connection: apsw.Connection, root_key: RootKey, size: int, completed: Sequence[bytes]) -> None:
    """Verify the last 4,096 entries and write their segment; `completed` are the subtrees the last entry completed."""
    number = (size >> _LEVEL) - 1
    begin = number << _LEVEL
    found = walk(connection, Frontier(), begin, size)
    if not hmac.compare_digest(found.root(), completed[_LEVEL]):
        raise damaged(f"entries from {begin} on were changed after they were written")
    columns = _columns(connection, begin)
    mac = _mac(root_key, number, found.root(), columns)
    connection.execute("INSERT INTO log_segments VALUES (?, ?, ?, ?)", (number, found.root(), columns, mac))


def verify(connection: apsw.Connection, root_key: RootKey, head: Frontier, *, whole: bool) -> dict[bytes, bytes]:
    """Raise STORE_DAMAGED unless columns, indexes and entries are those of the head; `whole` hashes every entry.

    Returns, for the tag of each key, the digest of its record after its last logged change.
    """
    try:
        problem = connection.execute("PRAGMA integrity_check(decisions)").fetchone()
    except apsw.Error as error:
        raise damaged(f"SQLite: {error}") from None
    if problem != ("ok",):
        raise damaged(f"its indexes: {problem[0] if problem else 'no answer'}")
    segments = Frontier()
    for number, root, columns, mac in connection.execute("SELECT number, root, columns, mac FROM log_segments"):
        begin = number << _LEVEL
        if number != segments.size or not hmac.compare_digest(mac, _mac(root_key, number, root, columns)):
            raise damaged(f"segment {number} was not written by this broker")
        if not hmac.compare_digest(columns, _columns(connection, begin)):
            raise damaged(f"entries from {begin} on were moved, relabelled, added or removed")
        if whole:
            check_segment(connection, root_key, number, walk(connection, Frontier(), begin, begin + SEGMENT).root())
        segments = segments.appended(root)
    if segments.size != head.size >> _LEVEL:
        raise damaged("segments were removed")
    complete = Frontier(segments.size << _LEVEL, segments.peaks)
    if walk(connection, complete, complete.size, None) != head:
        raise damaged("entries were changed, added or removed")
    changes = connection.execute(
        "SELECT key_tag, record_digest FROM decisions INDEXED BY record_changes WHERE record_digest <> x'' ORDER BY idx"
    )
    return dict(changes)


@lru_cache(maxsize=4096)
def key_tag(tenant: str, key_uri: str) -> bytes:
    """Return what stands for a tenant's entries about a key (16 bytes): columns are read whole at every start."""
    return hashlib.sha256(tlv("cloister-log-key-tag-v1", tenant, key_uri)).digest()[:_TAG_SIZE]


@lru_cache(maxsize=4096)
def grant_tag(key_uri: str, job: str, policy_digest: bytes) -> bytes:
    """Return what stands for a key, a job and a policy: what max_per_job counts (16 bytes)."""
    return hashlib.sha256(tlv("cloister-log-grant-tag-v1", key_uri, job, policy_digest)).digest()[:_TAG_SIZE]


def columns_of(outline: Outline) -> tuple[str, bytes, bytes, bytes]:
    """Return tenant, key tag, grant tag (empty for what does not count) and record digest of an entry."""
    counts = outline.granted and outline.job
    counted = grant_tag(outline.key_uri, outline.job, outline.policy_digest) if counts else b""
    return outline.tenant, key_tag(outline.tenant, outline.key_uri), counted, outline.record_digest


def check_segment(connection: apsw.Connection, root_key: RootKey, number: int, found: bytes) -> None:
    """Raise STORE_DAMAGED unless this is the root that the entries of a segment had when they were complete."""
    row: Any = connection.execute("SELECT root, columns, mac FROM log_segments WHERE number = ?", (number,)).fetchone()
    if row is None or not hmac.compare_digest(row[2], _mac(root_key, number, row[0], row[1])):
        raise damaged(f"segment {number} was not written by this broker")
    if not hmac.compare_digest(row[0], found):
        raise damaged(f"entries from {number << _LEVEL} on were changed")


def rekey(connection: apsw.Connection, old: RootKey, new: RootKey) -> None:
    """Authenticate the segments anew, for a root key that replaces another."""
    rows: list[Any] = connection.execute("SELECT number, root, columns, mac FROM log_segments").fetchall()
    for number, root, columns, mac in rows:
        if not hmac.compare_digest(mac, _mac(old, number, root, columns)):
            raise damaged(f"segment {number} was not written by this broker")
        again = _mac(new, number, root, columns)
        connection.execute("UPDATE log_segments SET mac = ? WHERE number = ?", (again, number))


def damaged(why: str) -> CloisterError:
    """Return the error for a log that is not the one that was written."""
    return CloisterError(
        Code.STORE_DAMAGED,
        what="the decision log does not verify",
        why=why,
        todo="keep this file as it is for an investigation and restore the store from a backup",
    )


def walk(connection: apsw.Connection, frontier: Frontier, begin: int, end: int | None) -> Frontier:
    """Return the frontier with the entries [begin, end) appended, each of them compared with its columns."""
    rows = connection.execute(
        "SELECT idx, tenant, key_tag, grant_tag, record_digest, entry"
        " FROM decisions LEFT JOIN entries USING (idx) WHERE idx >= ? AND idx < ? ORDER BY idx",
        (begin, end if end is not None else 2**62),
    )
    for expected, (index, *columns, data) in enumerate(rows, start=begin):
        try:
            outline = Outline.parse(data or b"")
        except EntryInvalid:
            raise damaged(f"entry {index} is missing or malformed") from None
        # The columns are only an index, but max_per_job counts by them.
        if outline.index != index or index != expected or tuple(columns) != columns_of(outline):
            raise damaged(f"entry {index} was moved or relabelled")
        frontier = frontier.appended(leaf_hash(data))
    return frontier


def _columns(connection: apsw.Connection, begin: int) -> bytes:
    """Return SHA-384 over the columns of one segment (48 bytes). hex() of text stops at nothing, as quote() would."""
    row = connection.execute(
        "SELECT group_concat(idx || ',' || hex(tenant) || ',' || hex(key_tag) || ',' || hex(grant_tag)"
        " || ',' || hex(record_digest), ';' ORDER BY idx)"
        " FROM decisions WHERE idx >= ? AND idx < ?",
        (begin, begin + SEGMENT),
    ).fetchone()
    return hashlib.sha384(str(row[0] if row else "").encode()).digest()


def _mac(root_key: RootKey, number: int, root: bytes, columns: bytes) -> bytes:
    return root_key.mac(tlv("cloister-log-segment-v1", number, root, columns))
