# SPDX-License-Identifier: Apache-2.0
"""What the development server keeps: SQLite, with everything secret sealed under a key that lies beside it.

    DIR/ehsm.sqlite   users, keys, secrets, quote policies, requests seen
    DIR/domain.key    32 bytes, hexadecimal (0600)

Unlike at EHSM, a sealed value is bound to its row: to the key id, its owner, kind and usage.
"""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import apsw
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister import ehsm
from cloister.atomicfile import file_error, write_atomically
from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister.secret import SecretBytes
from cloister.tlv import tlv
from cloister_sim.ehsm.core import Material
from cloister_sim.ehsm.replay import Seen
from cloister_sim.ehsm.wire import Refused, bad_request

T = TypeVar("T")

DAY_MS: Final = 86_400_000
MAX_USERS: Final = 1000  # enrolment is open to anyone who reaches the port
MAX_KEYS: Final = 10_000  # as many as ListKey lists
_API_KEY_ALPHABET: Final = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnpqrstuvwxyz"
_API_KEY_SIZE: Final = 32
_NONCE: Final = 12

_MIGRATIONS: Final = (
    """
    CREATE TABLE users (appid TEXT PRIMARY KEY, created_ms INTEGER NOT NULL, api_key BLOB NOT NULL) STRICT;
    CREATE TABLE keys (
        keyid TEXT PRIMARY KEY, appid TEXT NOT NULL, keyspec TEXT NOT NULL, origin TEXT NOT NULL,
        keyusage TEXT NOT NULL, created_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL, enabled INTEGER NOT NULL,
        material BLOB, import_key BLOB
    ) STRICT;
    CREATE INDEX keys_of_user ON keys (appid);
    CREATE TABLE secrets (
        appid TEXT NOT NULL, name TEXT NOT NULL, description TEXT, created_ms INTEGER NOT NULL, deleted_ms INTEGER,
        keyid TEXT, rotation_ms INTEGER, PRIMARY KEY (appid, name)
    ) STRICT;
    CREATE TABLE secret_versions (
        appid TEXT NOT NULL, name TEXT NOT NULL, version INTEGER NOT NULL, created_ms INTEGER NOT NULL,
        data BLOB NOT NULL, PRIMARY KEY (appid, name, version)
    ) STRICT;
    CREATE TABLE policies (
        policyid TEXT PRIMARY KEY, appid TEXT NOT NULL, mr_enclave TEXT NOT NULL, mr_signer TEXT NOT NULL,
        created_ms INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE requests (
        appid TEXT NOT NULL, timestamp TEXT NOT NULL, nonce TEXT NOT NULL, sign TEXT NOT NULL,
        arrived_ms INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX requests_by_arrival ON requests (arrived_ms);
    """,
)


@dataclass(frozen=True, slots=True)
class KeyRow:
    """A customer's key (CMK) without its material."""

    keyid: str
    appid: str
    keyspec: str
    origin: str
    keyusage: str
    created_ms: int
    expires_ms: int
    enabled: bool


class Vault:
    """The server's storage. Every method is one transaction."""

    def __init__(self, database: Database, domain: SecretBytes) -> None:
        self._database = database
        self._cipher = AESGCM(domain.reveal())
        self._api_keys: dict[str, SecretBytes] = {}

    @classmethod
    def open(cls, directory: Path) -> Vault:
        """Open or make the directory; raise CloisterError."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise file_error(error, what=f"{directory} cannot be used") from error
        return cls(Database.open(directory / "ehsm.sqlite", _MIGRATIONS), _domain_key(directory / "domain.key"))

    def close(self) -> None:
        self._database.close()

    async def read(self, function: Callable[[apsw.Connection], T]) -> T:
        return await self._database.read(function)

    async def write(self, function: Callable[[apsw.Connection], T]) -> T:
        return await self._database.write(function)

    def seal(self, secret: bytes, *place: str | int) -> bytes:
        """Seal for one place in one table."""
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, secret, tlv("ehsm-sim-v1", *place))

    def unseal(self, sealed: bytes, *place: str | int) -> bytes:
        """Open what was sealed for this place; raise Refused when the row was edited."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], tlv("ehsm-sim-v1", *place))
        except InvalidTag:
            raise Refused(500, "Server exception.", by_core=True) from None

    # users

    async def enroll(self, now_ms: int) -> tuple[str, str]:
        """Make a user; return its appid and API key. Raise Refused when there are too many."""
        appid = str(uuid.uuid4())
        api_key = "".join(secrets.choice(_API_KEY_ALPHABET) for _ in range(_API_KEY_SIZE))

        def insert(db: apsw.Connection) -> None:
            if int(db.execute("SELECT count(*) FROM users").get) >= MAX_USERS:
                raise Refused(500, "enroll user info failed")
            sealed = self.seal(api_key.encode(), "users", appid)
            db.execute("INSERT INTO users VALUES (?, ?, ?)", (appid, now_ms, sealed))

        await self.write(insert)
        return appid, api_key

    async def api_key(self, appid: str) -> SecretBytes | None:
        if appid in self._api_keys:  # users never change
            return self._api_keys[appid]
        row = await self.read(lambda db: db.execute("SELECT api_key FROM users WHERE appid = ?", (appid,)).get)
        if row is None:
            return None
        self._api_keys[appid] = SecretBytes(self.unseal(row, "users", appid))
        return self._api_keys[appid]

    # requests seen

    async def requests(self, now_ms: int) -> list[Seen]:
        """Return what was saved of the last twenty minutes."""
        query = "SELECT * FROM requests WHERE arrived_ms >= ? ORDER BY arrived_ms"
        rows: list[Any] = await self.read(lambda db: db.execute(query, (now_ms - ehsm.REPLAY_WINDOW_MS,)).fetchall())
        return [Seen(*row) for row in rows]

    async def save_requests(self, seen: Sequence[Seen], now_ms: int) -> None:
        """Save what was seen, and forget what is too old to matter."""

        def insert(db: apsw.Connection) -> None:
            db.execute("DELETE FROM requests WHERE arrived_ms < ?", (now_ms - ehsm.REPLAY_WINDOW_MS,))
            rows = [(one.appid, one.timestamp, one.nonce, one.sign, one.arrived_ms) for one in seen]
            db.executemany("INSERT INTO requests VALUES (?, ?, ?, ?, ?)", rows)

        await self.write(insert)

    # keys

    async def add_key(self, row: KeyRow, material: bytes | None) -> None:
        sealed = None if material is None else self.seal(material, *_key_place(row, "material"))

        def insert(db: apsw.Connection) -> None:
            if int(db.execute("SELECT count(*) FROM keys WHERE appid = ?", (row.appid,)).get) >= MAX_KEYS:
                raise bad_request("create cmk failed")
            db.execute(
                "INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    row.keyid,
                    row.appid,
                    row.keyspec,
                    row.origin,
                    row.keyusage,
                    row.created_ms,
                    row.expires_ms,
                    int(row.enabled),
                    sealed,
                ),
            )

        await self.write(insert)

    async def key(self, appid: str, keyid: str, now_ms: int) -> tuple[KeyRow, bytes | None]:
        """Return a usable key and its sealed material; raise Refused in EHSM's words."""
        found: list[Any] = await self.read(
            lambda db: db.execute("SELECT * FROM keys WHERE keyid = ?", (keyid,)).fetchall()
        )
        if not found:
            raise bad_request("keyid error")
        row = _row(found[0])
        if row.appid != appid:
            raise bad_request("appid error")
        if not row.enabled:
            raise bad_request("keyid is disabled")
        if now_ms > row.expires_ms:
            raise bad_request("keyid expire")
        return row, found[0][8]

    async def material(self, appid: str, keyid: str, now_ms: int) -> Material:
        """Return an opened key; raise Refused."""
        row, sealed = await self.key(appid, keyid, now_ms)
        if sealed is None:  # an external key before its import
            raise Refused(500, "Server exception.", by_core=True)
        return Material(row.keyspec, row.keyusage, self.unseal(sealed, *_key_place(row, "material")))

    async def set_material(self, row: KeyRow, material: bytes) -> None:
        """Store imported material, once, and forget the key it came under; raise Refused the second time."""
        sealed = self.seal(material, *_key_place(row, "material"))
        query = "UPDATE keys SET material = ?, import_key = NULL WHERE keyid = ? AND material IS NULL"
        await self._fill(query, row.keyid, sealed, "ImportKeyMaterial failed.")

    async def set_import_key(self, row: KeyRow, import_key: bytes) -> None:
        """Store the key that material comes under; raise Refused when material is there, which it would replace."""
        sealed = self.seal(import_key, *_key_place(row, "import"))
        query = "UPDATE keys SET import_key = ? WHERE keyid = ? AND material IS NULL"
        await self._fill(query, row.keyid, sealed, "GetParametersForImport failed.")

    async def _fill(self, query: str, keyid: str, sealed: bytes, refusal: str) -> None:
        def update(db: apsw.Connection) -> None:
            db.execute(query, (sealed, keyid))
            if not db.changes():
                raise Refused(500, refusal, by_core=True)

        await self.write(update)

    async def import_key(self, row: KeyRow) -> bytes | None:
        sealed = await self.read(lambda db: db.execute("SELECT import_key FROM keys WHERE keyid = ?", (row.keyid,)).get)
        return None if sealed is None else self.unseal(sealed, *_key_place(row, "import"))

    async def keys_of(self, appid: str) -> list[KeyRow]:
        rows = await self.read(
            lambda db: db.execute(
                "SELECT * FROM keys WHERE appid = ? ORDER BY created_ms LIMIT ?", (appid, MAX_KEYS)
            ).fetchall()
        )
        return [_row(row) for row in rows]

    async def set_enabled(self, appid: str, keyid: str, *, enabled: bool) -> None:
        def update(db: apsw.Connection) -> None:
            db.execute("UPDATE keys SET enabled = ? WHERE keyid = ? AND appid = ?", (int(enabled), keyid, appid))
            if not db.changes():
                raise bad_request("not find this keyid")

        await self.write(update)

    async def delete_keys(self, appid: str, keyid: str | None = None) -> None:
        """Delete one key, or all; of an unknown or foreign one nothing is said, as at EHSM."""
        if keyid is None:
            await self.write(lambda db: db.execute("DELETE FROM keys WHERE appid = ?", (appid,)))
        else:
            await self.write(lambda db: db.execute("DELETE FROM keys WHERE appid = ? AND keyid = ?", (appid, keyid)))

    async def sweep(self, now_ms: int) -> int:
        """Do what EHSM does every night: delete keys ten days before they expire, and secrets whose time has come."""
        early = (ehsm.KEY_LIFE_DAYS - ehsm.KEY_SWEPT_AFTER_DAYS) * DAY_MS

        def delete(db: apsw.Connection) -> int:
            db.execute("DELETE FROM keys WHERE expires_ms < ?", (now_ms + early,))
            swept = db.changes()
            db.execute(
                "DELETE FROM secret_versions WHERE (appid, name) IN "
                "(SELECT appid, name FROM secrets WHERE deleted_ms <= ?)",
                (now_ms,),
            )
            db.execute("DELETE FROM secrets WHERE deleted_ms <= ?", (now_ms,))
            return swept

        return await self.write(delete)


def _row(columns: Sequence[Any]) -> KeyRow:
    keyid, appid, keyspec, origin, keyusage, created_ms, expires_ms, enabled = columns[:8]
    return KeyRow(keyid, appid, keyspec, origin, keyusage, created_ms, expires_ms, bool(enabled))


def _key_place(row: KeyRow, what: str) -> tuple[str, ...]:
    return ("keys", what, row.keyid, row.appid, row.keyspec, row.origin, row.keyusage)


def _domain_key(path: Path) -> SecretBytes:
    try:
        if not path.exists():
            write_atomically(path, secrets.token_hex(32).encode() + b"\n", mode=0o600)
        return SecretBytes(_hex32(path.read_text("ascii").strip()))
    except OSError as error:
        raise file_error(error, what=f"{path} cannot be read") from error
    except ValueError:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{path} holds no key",
            why="it should be 64 hexadecimal digits",
            todo="restore it, or remove the whole directory",
        ) from None


def _hex32(text: str) -> bytes:
    data = bytes.fromhex(text)
    if len(data) != 32:
        raise ValueError("not 32 bytes")
    return data
