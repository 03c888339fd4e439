# SPDX-License-Identifier: Apache-2.0
"""The mark of a store: whose root key it is under, and how that key can be had again."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.tlv import tlv
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import SealRecord, SealRecordInvalid

SCHEMA: Final = """
CREATE TABLE store (
  only INTEGER PRIMARY KEY CHECK (only = 1),
  canary BLOB NOT NULL,
  record BLOB NOT NULL,
  mac BLOB NOT NULL
) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Mark:
    """What can be read without the root key."""

    canary: bytes
    record: SealRecord

    def is_of(self, root_key: RootKey) -> bool:
        """Say whether this is the mark of a store under this root key."""
        return hmac.compare_digest(self.canary, root_key.canary())


def write(connection: apsw.Connection, root_key: RootKey, record: SealRecord) -> None:
    """Mark a new store, or one whose root key changes."""
    data = record.to_bytes()
    connection.execute(
        "INSERT OR REPLACE INTO store VALUES (1, ?, ?, ?)", (root_key.canary(), data, _mac(root_key, data))
    )


def read(connection: apsw.Connection) -> Mark:
    """Return the mark; raise STORE_DAMAGED when there is none."""
    row: Any = connection.execute("SELECT canary, record FROM store WHERE only = 1").fetchone()
    if row is None:
        raise _damaged("its mark is missing")
    try:
        return Mark(row[0], SealRecord.parse(row[1]))
    except SealRecordInvalid:
        raise _damaged("what it says about its root key is malformed") from None


def recognise(connection: apsw.Connection, root_key: RootKey) -> None:
    """Raise STORE_DAMAGED unless the store is under this root key and its mark was not edited."""
    if not read(connection).is_of(root_key):
        raise CloisterError(
            Code.STORE_DAMAGED,
            what="the key store is under another root key",
            why="the root key is not the one this store was created with",
            todo="start with the store's own root key; the store was not changed",
        )
    row: Any = connection.execute("SELECT record, mac FROM store WHERE only = 1").fetchone()
    if not hmac.compare_digest(row[1], _mac(root_key, row[0])):
        raise _damaged("what it says about its root key was edited")


def _mac(root_key: RootKey, record: bytes) -> bytes:
    return root_key.mac(tlv("cloister-store-mark-v1", record))


def _damaged(why: str) -> CloisterError:
    return CloisterError(
        Code.STORE_DAMAGED,
        what="the key store does not verify",
        why=why,
        todo="keep the file for an investigation and restore the store from a backup",
    )
