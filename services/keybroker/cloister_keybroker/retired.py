# SPDX-License-Identifier: Apache-2.0
"""Handles that no key version has any more, until their back end has forgotten its part.

A version that moved leaves its old handle here in the transaction that gave it the new one. A release that was under
way may still use it for a moment; then the back end is told to destroy its part, and told again until it did: a copy
of the broker's disk from before must not open a key that its owner destroyed since. Rows are authenticated, since
whoever could add one could have the broker destroy keys.
"""

from __future__ import annotations

import hmac
from collections import Counter
from dataclasses import dataclass

import apsw

from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.tlv import tlv
from cloister_keybroker.backends import KeyRef, handle_damaged
from cloister_keybroker.backends.factory import backend_of
from cloister_keybroker.rootkey import RootKey

SCHEMA = """
CREATE TABLE retired_handles (
  handle BLOB PRIMARY KEY,
  uri TEXT NOT NULL,
  version INTEGER NOT NULL,
  retired_ms INTEGER NOT NULL,
  mac BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX retired_handles_by_time ON retired_handles (retired_ms);
"""


@dataclass(frozen=True, slots=True)
class Retired:
    """A handle that a version had until then."""

    uri: KeyUri
    version: int
    handle: bytes
    retired_ms: int  # Unix milliseconds

    @property
    def key(self) -> KeyRef:
        """The version, for its back end: what destroys a handle looks at nothing but the handle."""
        return KeyRef(self.uri, self.version, KeyState.DESTROYED, frozenset())


def add(connection: apsw.Connection, root_key: RootKey, retired: Retired) -> None:
    """Remember a handle until `remove`."""
    connection.execute(
        "INSERT OR REPLACE INTO retired_handles VALUES (?, ?, ?, ?, ?)",
        (retired.handle, str(retired.uri), retired.version, retired.retired_ms, _mac(root_key, retired)),
    )


def until(connection: apsw.Connection, root_key: RootKey, retired_ms: int) -> list[Retired]:
    """Return the handles retired by then, oldest first; raise STORE_DAMAGED when a row is not of this broker."""
    rows = connection.execute(
        "SELECT uri, version, handle, retired_ms, mac FROM retired_handles WHERE retired_ms <= ? ORDER BY retired_ms",
        (retired_ms,),
    )
    found = []
    for uri, version, handle, moment, mac in rows:
        retired = Retired(KeyUri.parse(uri), version, handle, moment)
        if version < 0 or moment < 0 or not hmac.compare_digest(mac, _mac(root_key, retired)):
            raise handle_damaged(retired.key)
        found.append(retired)
    return found


def remove(connection: apsw.Connection, handle: bytes) -> None:
    """Forget a handle whose back end has forgotten its part."""
    connection.execute("DELETE FROM retired_handles WHERE handle = ?", (handle,))


def by_backend(connection: apsw.Connection, root_key: RootKey) -> Counter[str]:
    """Count the handles that are left, by back end."""
    return Counter(backend_of(retired.key, retired.handle) for retired in until(connection, root_key, 2**63 - 1))


def rekey(connection: apsw.Connection, old: RootKey, new: RootKey) -> None:
    """Authenticate all rows under another root key. What is in a retired handle is never opened again."""
    for retired in until(connection, old, 2**63 - 1):
        add(connection, new, retired)


def _mac(root_key: RootKey, retired: Retired) -> bytes:
    return root_key.mac(
        tlv("cloister-retired-row-v1", str(retired.uri), retired.version, retired.handle, retired.retired_ms)
    )
