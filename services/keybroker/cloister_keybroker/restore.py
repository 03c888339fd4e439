# SPDX-License-Identifier: Apache-2.0
"""Put a backup in a store's place, on the broker's machine, while the broker does not run.

What can be judged without the root key is judged here: the backup is whole, SQLite finds no fault, and the log has the
size and root that the trailer names. The trailer itself stays beside the store until a root key is there that can
judge it; the broker then logs the restoration, so that everybody who reads the log sees where it went back.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any, Final

import apsw

from cloister.atomicfile import file_error, sync_directory, write_atomically
from cloister.errors import CloisterError, Code
from cloister.merkle import Frontier, MerkleError
from cloister.release.blocks import Block
from cloister.tlv import tlv
from cloister.transparency.entry import Entry
from cloister_keybroker import mark
from cloister_keybroker.backup import Trailer, invalid, pending_trailer, unpack
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.store import KeyStore

_MAX_TRAILER: Final = 4096


async def restore(source: Path, store: Path, root_key: RootKey | None) -> Trailer:
    """Make the store of a backup; with the root key verify all of it. Return what the backup says of itself.

    Raises CloisterError: FILE_EXISTS when there is a store, BACKUP_INVALID, STORE_DAMAGED, DISK_FULL. Whatever is
    raised, no store is left behind.
    """
    if store.exists() or store.with_name(f"{store.name}-wal").exists():
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"there is a store at {store}",
            why="a backup in its place would lose what was done since",
            todo="move the store away, with the files beside it, and keep it",
        )
    unfinished = store.with_name(f".{store.name}.{secrets.token_hex(8)}")
    try:
        trailer = await asyncio.to_thread(_unpack, source, unfinished)
        await _verify(unfinished, trailer, root_key, name=source.name)
        write_atomically(pending_trailer(store), trailer.to_bytes())
        os.link(unfinished, store)
        sync_directory(store.parent)
    except OSError as error:
        raise file_error(error, what=f"cannot restore {store}") from None
    finally:
        for suffix in ("", "-wal", "-journal"):
            unfinished.with_name(f"{unfinished.name}{suffix}").unlink(missing_ok=True)
    return trailer


async def judged(store: Path, root_key: RootKey) -> Entry | None:
    """Return what the log is to remember of a restoration, or None when there was none.

    Raises STORE_DAMAGED when the backup was not made under this root key.
    """
    try:
        data = pending_trailer(store).read_bytes()[: _MAX_TRAILER + 1]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise file_error(error, what=f"{pending_trailer(store)} cannot be read") from None
    try:
        trailer = Trailer.parse(data)
    except ValueError:
        raise _not_ours("what it says about itself is malformed") from None
    if not trailer.is_of(root_key):
        raise _not_ours("it was made under another root key, or by somebody else")
    # Of no tenant: every tenant may read it, because every tenant's keys and counts went back.
    return Entry(
        action="restore",
        tenant="",
        key_uri="",
        caller=trailer.broker_id,
        granted=True,
        blocks=(Block("log.size", True, str(trailer.log_size), str(trailer.log_size)),),
        detail=tlv("cloister-restore-v1", trailer.created_ms, trailer.log_size, trailer.log_root, trailer.digest),
    )


def settled(store: Path) -> None:
    """Forget the trailer, after its entry is in the log."""
    pending_trailer(store).unlink(missing_ok=True)


def _unpack(source: Path, target: Path) -> Trailer:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file, source.open("rb") as data:
        trailer = unpack(data, file, name=source.name)
        file.flush()
        os.fsync(file.fileno())
    return trailer


async def _verify(path: Path, trailer: Trailer, root_key: RootKey | None, *, name: str) -> None:
    if root_key is not None and not trailer.is_of(root_key):
        raise invalid(name, "it was made under another root key, or by somebody else")
    database = KeyStore.open_file(path)
    try:
        await database.read(lambda connection: _look(connection, trailer, name))
        if root_key is not None:
            await KeyStore.unsealed(database, root_key, whole=True)
    finally:
        database.close()


def _look(connection: apsw.Connection, trailer: Trailer, name: str) -> None:
    try:
        found = connection.execute("PRAGMA integrity_check").fetchall()
        row: Any = connection.execute("SELECT size, peaks FROM log_head").fetchone()
        head = Frontier.from_bytes(*row) if row else Frontier()
    except (apsw.Error, MerkleError) as error:
        raise invalid(name, f"it is damaged inside: {error}") from None
    if found != [("ok",)]:
        raise invalid(name, "SQLite finds faults in it")
    if (head.size, head.root()) != (trailer.log_size, trailer.log_root):
        raise invalid(name, "its log is not the one that its trailer names")
    mark.read(connection)


def _not_ours(why: str) -> CloisterError:
    return CloisterError(
        Code.STORE_DAMAGED,
        what="the store comes from a backup that is not this broker's",
        why=why,
        todo="restore a backup that was made under this root key",
    )
