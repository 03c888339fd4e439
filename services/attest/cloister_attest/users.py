# SPDX-License-Identifier: Apache-2.0
"""Who people and programs outside of TDs are: public keys that the configuration or an administrator registered.

The first ones stand in attest's configuration, which is measured: nobody who operates the machines can become one of
them unseen. They register others, each within its own tenant only: a tenant's name is its administrators' to give.
Registered users live as long as the CA (castate.py), and their table is authenticated (tableseal.py).
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.identity import SpiffeId
from cloister.runtime.database import Database
from cloister.runtime.logging import get_logger
from cloister_attest.tableseal import TableSealer

MAX_USERS: Final = 10_000
MIGRATION: Final = """
CREATE TABLE users (
    spki_sha256 BLOB PRIMARY KEY,
    spiffe_id TEXT NOT NULL UNIQUE,
    standing TEXT NOT NULL,
    added_by TEXT NOT NULL,
    added_unix_ms INTEGER NOT NULL
) STRICT;
"""


class Standing(enum.StrEnum):
    """What a user may do at attest; each may do what those before may."""

    USER = "user"
    ADMINISTRATOR = "administrator"  # identities of its own tenant
    OPERATOR = "operator"  # denials, epochs, workloads of all; identities of its own tenant

    def covers(self, other: Standing) -> bool:
        order = tuple(Standing)
        return order.index(self) >= order.index(other)


@dataclass(frozen=True, slots=True)
class User:
    """One registered public key."""

    spiffe_id: SpiffeId
    spki_sha256: bytes  # 32 bytes
    standing: Standing
    added_by: str  # SPIFFE id; empty for those of the configuration
    added: datetime | None

    @property
    def configured(self) -> bool:
        return not self.added_by


class UserRegister:
    """All users. Held in memory: the database is where they come from at the start, and no more."""

    def __init__(self, database: Database, sealer: TableSealer, configured: Iterable[User] = ()) -> None:
        """`configured` are told apart by key and by name already. Use `load` or `begin` before anything else."""
        self._database = database
        self._sealer = sealer
        self._one_at_a_time = asyncio.Lock()
        self._by_key: dict[bytes, User] = {}
        self._by_id: dict[SpiffeId, User] = {}
        for user in configured:
            self._put(user)

    async def load(self) -> None:
        """Take up the registered users of this CA, whose table the sealer has checked.

        Who was registered and stands in the configuration now is what the configuration says.
        """
        rows: Any = await self._database.read(lambda connection: connection.execute("SELECT * FROM users").fetchall())
        for key, spiffe_id, standing, added_by, added_ms in rows:
            user = User(SpiffeId.parse(spiffe_id), key, Standing(standing), added_by, _time(added_ms))
            if user.spiffe_id not in self._by_id and key not in self._by_key:
                self._put(user)

    async def begin(self) -> None:
        """Begin with those of the configuration alone, before the sealer seals: this is a new CA."""

        def work(connection: apsw.Connection) -> int:
            connection.execute("DELETE FROM users")
            return connection.changes()

        dropped = await self._database.write(work)
        if dropped:
            get_logger().warning("users were registered under another CA, and are not any more", users=dropped)

    def by_key(self, spki_sha256: bytes) -> User | None:
        """Return whose key this is."""
        return self._by_key.get(spki_sha256)

    def by_id(self, spiffe_id: SpiffeId) -> User | None:
        """Return who is registered under this name."""
        return self._by_id.get(spiffe_id)

    def all(self, *, tenant: str | None = None) -> Sequence[User]:
        """Return the users of a tenant, or of all, by name."""
        found = (user for user in self._by_key.values() if tenant in (None, user.spiffe_id.tenant))
        return sorted(found, key=lambda user: str(user.spiffe_id))

    async def add(self, user: User, *, replace: bool) -> None:
        """Register a user; raise CloisterError(IDENTITY_EXISTS) when name or key is another's, or is configured.

        With `replace`, the key takes the place of the name's present one.
        """
        async with self._one_at_a_time:
            await self._add(user, replace)

    async def _add(self, user: User, replace: bool) -> None:
        present, holder = self.by_id(user.spiffe_id), self.by_key(user.spki_sha256)
        if holder is not None and holder.spiffe_id != user.spiffe_id:
            raise _exists("this key is registered already", "one key is one identity", "make a new key")
        if present is not None and (present.configured or not replace):
            raise _exists(
                f"{user.spiffe_id} is registered already",
                "in attest's configuration" if present.configured else "with this key or another one",
                "change the configuration" if present.configured else "to change key or standing, say so: --replace",
            )
        if present is None and len(self._by_key) >= MAX_USERS:
            raise CloisterError(
                Code.RATE_LIMITED, what=f"{MAX_USERS} users are registered", why="that is as many as can be"
            )
        added_ms = int(user.added.timestamp() * 1000) if user.added else 0
        row = (user.spki_sha256, str(user.spiffe_id), str(user.standing), user.added_by, added_ms)

        def work(connection: apsw.Connection) -> None:
            with self._sealer.change(connection, "users"):
                connection.execute("DELETE FROM users WHERE spiffe_id = ?", (str(user.spiffe_id),))
                connection.execute("INSERT INTO users VALUES (?, ?, ?, ?, ?)", row)

        await self._database.write(work)
        if present is not None:
            self._by_key.pop(present.spki_sha256, None)
        self._put(user)

    async def remove(self, spiffe_id: SpiffeId) -> None:
        """Strike a user; raise CloisterError(IDENTITY_NOT_FOUND), or ARGUMENT_INVALID for one of the configuration."""
        async with self._one_at_a_time:
            await self._remove(spiffe_id)

    async def _remove(self, spiffe_id: SpiffeId) -> None:
        present = self.by_id(spiffe_id)
        if present is None:
            raise CloisterError(
                Code.IDENTITY_NOT_FOUND,
                what=f"{spiffe_id} is not registered",
                why="nobody registered it, or it was removed",
                todo="`cloister identity list` shows who is",
            )
        if present.configured:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{spiffe_id} stands in attest's configuration",
                why="what is measured is not changed from outside",
                todo="revoke it (`cloister identity revoke identity`), and change the configuration",
            )

        def work(connection: apsw.Connection) -> None:
            with self._sealer.change(connection, "users"):
                connection.execute("DELETE FROM users WHERE spiffe_id = ?", (str(spiffe_id),))

        await self._database.write(work)
        self._by_key.pop(present.spki_sha256, None)
        self._by_id.pop(spiffe_id, None)

    def _put(self, user: User) -> None:
        self._by_key[user.spki_sha256] = user
        self._by_id[user.spiffe_id] = user


def configured_users(entries: Mapping[bytes, tuple[SpiffeId, Standing]]) -> list[User]:
    """Return the users of the configuration, by the SHA-256 of their keys."""
    return [User(who, key, standing, "", None) for key, (who, standing) in entries.items()]


def _exists(what: str, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.IDENTITY_EXISTS, what=what, why=why, todo=todo)


def _time(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)
