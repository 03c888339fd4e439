# SPDX-License-Identifier: Apache-2.0
"""Handles that no key version has any more, until their back end has forgotten its part.

A version that moved leaves its old handle here in the transaction that gave it the new one. A release that was under
way may still use it for a moment; then the back end is told to destroy its part, and told again until it did: a copy
of the broker's disk from before must not open a key that its owner destroyed since. Rows are authenticated, since
whoever could add one could have the broker destroy keys.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any, Final

import apsw

from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState
from cloister.tlv import tlv
from cloister_keybroker.backends import KeyRef, handle_damaged
from cloister_keybroker.rootkey import RootKey

SCHEMA: Final = """
CREATE TABLE retired_handles (
  handle BLOB PRIMARY KEY,
  uri TEXT NOT NULL,
  version INTEGER NOT NULL,
  backend TEXT NOT NULL,
  retired_ms INTEGER NOT NULL,
  mac BLOB NOT NULL
) STRICT, WITHOUT ROWID;
"""

_COLUMNS: Final = ", ".join(
    f"retired_handles.{name}" for name in ("uri", "version", "handle", "backend", "retired_ms", "mac")
)


@dataclass(frozen=True, slots=True)
class Retired:
    """A handle that a version had until then."""

    uri: KeyUri
    version: int
    handle: bytes
    backend: str  # that made it
    retired_ms: int  # Unix milliseconds

    @property
    def key(self) -> KeyRef:
        """The version, for its back end: what destroys looks at nothing but the handle."""
        return KeyRef(self.uri, self.version, KeyState.DESTROYED, frozenset())


class RetiredHandles:
    """The table, inside a transaction."""

    def __init__(self, connection: apsw.Connection, root_key: RootKey) -> None:
        self._connection = connection
        self._root_key = root_key

    def add(self, retired: Retired) -> None:
        """Remember a handle until `remove`."""
        self._connection.execute(
            "INSERT OR REPLACE INTO retired_handles VALUES (?, ?, ?, ?, ?, ?)",
            (
                retired.handle,
                str(retired.uri),
                retired.version,
                retired.backend,
                retired.retired_ms,
                self._mac(retired),
            ),
        )

    def all(self) -> list[Retired]:
        """Return them; raise STORE_DAMAGED when a row is not of this broker."""
        return self._authentic(f"SELECT {_COLUMNS} FROM retired_handles", ())  # noqa: S608 - a constant

    def over(self, *, closed_ms: int, kept_ms: int) -> list[Retired]:
        """Return those that were retired by `kept_ms`, or by `closed_ms` when their key is not enabled any more."""
        return self._authentic(
            f"SELECT {_COLUMNS} FROM retired_handles JOIN keys USING (uri)"  # noqa: S608 - a constant
            " WHERE retired_ms <= ? OR (retired_ms <= ? AND state <> 'enabled')",
            (kept_ms, closed_ms),
        )

    def remove(self, handle: bytes) -> None:
        """Forget a handle whose back end has forgotten its part."""
        self._connection.execute("DELETE FROM retired_handles WHERE handle = ?", (handle,))

    def by_backend(self) -> dict[str, int]:
        """Count them by back end."""
        return dict(self._connection.execute("SELECT backend, count(*) FROM retired_handles GROUP BY backend"))

    def handles_at(self, backend: str) -> list[bytes]:
        """Return those that a back end made, as they stand there."""
        rows = self._connection.execute("SELECT handle FROM retired_handles WHERE backend = ?", (backend,))
        return [handle for (handle,) in rows]

    def _authentic(self, query: str, values: tuple[int, ...]) -> list[Retired]:
        rows: list[Any] = self._connection.execute(query, values).fetchall()
        found = []
        for uri, version, handle, backend, moment, mac in rows:
            retired = Retired(KeyUri.parse(uri), version, handle, backend, moment)
            if version < 0 or moment < 0 or not hmac.compare_digest(mac, self._mac(retired)):
                raise handle_damaged(retired.key)
            found.append(retired)
        return found

    def _mac(self, retired: Retired) -> bytes:
        return self._root_key.mac(
            tlv(
                "cloister-retired-row-v1",
                str(retired.uri),
                retired.version,
                retired.handle,
                retired.backend,
                retired.retired_ms,
            )
        )
