# SPDX-License-Identifier: Apache-2.0
"""What the gateway remembers: deployed models in SQLite, archives as files named after their digest.

Archives are ciphertext and handler code. Each tenant has its own directory: that somebody else uploaded the same bytes
is nobody's business, and removing one's model never touches another's.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import apsw

from cloister.atomicfile import file_error, sync_directory
from cloister.data.archive import LIMITS, Archive, read_archive
from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database
from cloister_serving.router import ModelRecord, State

MAX_CHUNK: Final = 1 << 20
_INCOMING: Final = "incoming"
_MIGRATIONS: Final = (
    """
    CREATE TABLE models (
        tenant TEXT NOT NULL,
        name TEXT NOT NULL,
        owner TEXT NOT NULL,
        archive_digest BLOB NOT NULL,
        cores TEXT NOT NULL,
        state TEXT NOT NULL,
        reason TEXT NOT NULL,
        created_unix_ms INTEGER NOT NULL,
        PRIMARY KEY (tenant, name)
    ) STRICT;
    """,
)
_COLUMNS: Final = "tenant, name, owner, archive_digest, cores, state, reason, created_unix_ms"


class ModelStore:
    """The table of deployed models."""

    def __init__(self, path: Path) -> None:
        self._database = Database.open(path, _MIGRATIONS)

    async def put(self, model: ModelRecord) -> None:
        """Write or replace a model; on disk when this returns."""
        cores = ",".join(map(str, model.cores))
        row = (model.tenant, model.name, model.owner, model.archive_digest, cores, model.state.value, model.reason)
        sql = f"INSERT OR REPLACE INTO models ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
        await self._database.write(lambda db: _run(db, sql, (*row, model.created_unix_ms)))

    async def delete(self, tenant: str, name: str) -> None:
        sql = "DELETE FROM models WHERE tenant = ? AND name = ?"
        await self._database.write(lambda db: _run(db, sql, (tenant, name)))

    async def all(self) -> list[ModelRecord]:
        sql = f"SELECT {_COLUMNS} FROM models ORDER BY created_unix_ms, tenant, name"  # noqa: S608 - constants
        return [_record(row) for row in await self._database.read(lambda db: list(db.execute(sql)))]

    def close(self) -> None:
        self._database.close()


class ArchiveStore:
    """Uploaded archives below one directory: <tenant>/<SHA-384>.mar."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, tenant: str, digest: bytes) -> Path:
        """Return where an archive lies, or would."""
        return self._directory / tenant / f"{digest.hex()}.mar"

    async def receive(self, tenant: str, chunks: AsyncIterator[bytes]) -> tuple[bytes, int]:
        """Store an upload whole or not at all; return its SHA-384 and its size.

        Raises CloisterError: MESSAGE_TOO_LARGE, ARCHIVE_INVALID, DISK_FULL.
        """
        staged = self._directory / tenant / _INCOMING / secrets.token_hex(8)
        digest, size = hashlib.sha384(), 0
        try:
            await asyncio.to_thread(staged.parent.mkdir, mode=0o700, parents=True, exist_ok=True)
            with staged.open("xb") as file:
                async for chunk in chunks:
                    size += len(chunk)
                    if len(chunk) > MAX_CHUNK or size > LIMITS.archive_bytes:
                        raise _too_large(len(chunk))
                    digest.update(chunk)
                    await asyncio.to_thread(file.write, chunk)
                await asyncio.to_thread(_sync, file)
            await asyncio.to_thread(_check, staged)
            # Its name says that it was checked and is whole: it gets it last.
            path = self.path(tenant, digest.digest())
            staged.rename(path)
            await asyncio.to_thread(sync_directory, path.parent)
        except OSError as error:
            raise file_error(error, what="the archive cannot be stored") from error
        finally:
            staged.unlink(missing_ok=True)
        return digest.digest(), size

    def read(self, tenant: str, digest: bytes) -> Archive:
        """Check a stored archive and return what it is; raise FILE_NOT_FOUND for one that was never uploaded."""
        try:
            return _check(self.path(tenant, digest))
        except FileNotFoundError:
            raise CloisterError(
                Code.FILE_NOT_FOUND,
                what=f"there is no archive {digest.hex()[:16]} of yours",
                why="it was not uploaded to this gateway, or its model was removed",
                todo="upload the archive first",
            ) from None

    def keep_only(self, wanted: Iterable[tuple[str, bytes]]) -> None:
        """Remove every archive that no model uses, and what unfinished uploads left."""
        kept = {self.path(tenant, digest) for tenant, digest in wanted}
        for path in self._directory.glob("*/*.mar"):
            if path not in kept:
                path.unlink(missing_ok=True)
        for incoming in self._directory.glob(f"*/{_INCOMING}"):
            shutil.rmtree(incoming, ignore_errors=True)
        for directory in self._directory.iterdir():
            with suppress(OSError):  # not empty: still in use
                directory.rmdir()

    def remove(self, tenant: str, digest: bytes) -> None:
        """Remove one archive, and its tenant's directory when it was the last."""
        path = self.path(tenant, digest)
        path.unlink(missing_ok=True)
        for directory in (path.parent / _INCOMING, path.parent):
            with suppress(OSError):  # not empty: still in use
                directory.rmdir()


def _check(path: Path) -> Archive:
    with path.open("rb") as file:
        return read_archive(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _run(connection: apsw.Connection, sql: str, values: tuple[Any, ...]) -> None:
    connection.execute(sql, values)


def _record(row: tuple[Any, ...]) -> ModelRecord:
    tenant, name, owner, digest, cores, state, reason, created = row
    return ModelRecord(
        tenant=tenant,
        name=name,
        owner=owner,
        archive_digest=digest,
        cores=tuple(int(core) for core in cores.split(",") if core),
        state=State(state),
        reason=reason,
        created_unix_ms=created,
    )


def _too_large(chunk: int) -> CloisterError:
    why = f"a chunk has {chunk} bytes; at most {MAX_CHUNK} are taken" if chunk > MAX_CHUNK else ""
    return CloisterError(
        Code.MESSAGE_TOO_LARGE,
        what="the archive is too large",
        why=why or f"at most {LIMITS.archive_bytes} bytes are taken",
        todo="send chunks of 1 MiB, or deploy a smaller model",
    )
