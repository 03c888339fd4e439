# SPDX-License-Identifier: Apache-2.0
"""State in SQLite: one connection, one thread, and a commit that is on disk before anyone is told.

The thread takes all waiting work at once and commits it together (a commit costs an fsync, the work almost nothing).
Each piece of work runs in a savepoint of its own: one that raises undoes itself and leaves its neighbours alone.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

import apsw

from cloister.errors import CloisterError, Code

_T = TypeVar("_T")
_MAX_BATCH: Final = 256  # pieces of work that share one fsync; bounds how long the first of them waits

_AUTOCHECKPOINT: Final = 1000  # pages in the write-ahead log, SQLite's own default

_PRAGMAS: Final = (
    # One process per file: a second broker on the same store would be a second truth.
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA journal_mode = WAL",
    # FULL: an acknowledged commit survives power loss. NORMAL would not.
    "PRAGMA synchronous = FULL",
    "PRAGMA foreign_keys = ON",
    "PRAGMA trusted_schema = OFF",
    "PRAGMA secure_delete = ON",
    f"PRAGMA wal_autocheckpoint = {_AUTOCHECKPOINT}",
    # Sorting must not spill rows into a temporary file.
    "PRAGMA temp_store = MEMORY",
    # KiB: the indexes over a million rows stay in memory, and with SQLite's own 2 MiB every insertion reads and writes.
    "PRAGMA cache_size = -32768",
)


# What says something about the disk, and nothing about the work that met it.
_OF_THE_DISK: Final = (
    apsw.FullError,
    apsw.IOError,
    apsw.CorruptError,
    apsw.NotADBError,
    apsw.ReadOnlyError,
    apsw.CantOpenError,
)


@dataclass(slots=True)
class _Work:
    run: Callable[[apsw.Connection], Any]
    writes: bool
    done: Future[Any]
    bare: bool = False  # outside of any transaction


@dataclass(frozen=True, slots=True)
class Snapshot(Generic[_T]):
    """The database file as it was at one moment, readable while writes go on."""

    found: _T  # what was looked up at that moment
    size_bytes: int
    _read: Callable[[int, int], Awaitable[bytes]]

    async def chunks(self, size_bytes: int) -> AsyncIterator[bytes]:
        """Yield the whole file; raise CloisterError(IO_FAILED) when it cannot be read to its end."""
        for offset in range(0, self.size_bytes, size_bytes):
            yield await self._read(offset, min(size_bytes, self.size_bytes - offset))


class Database:
    """A database file. Functions given to `read` and `write` run on its thread: keep them short, let them only query.

    Tables are declared STRICT by the migrations. Cancelling an `await write(...)` does not undo the write.
    """

    def __init__(self, connection: apsw.Connection, path: Path, descriptor: int) -> None:
        self._connection = connection
        self._path = path
        # For snapshots. It is opened once and closed last: closing any descriptor of the file ends SQLite's lock on it.
        self._descriptor = descriptor
        self._snapshot = asyncio.Lock()
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._reading = threading.Lock()  # the file is not closed under a reader
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name=f"database {path.name}", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, path: Path, migrations: Sequence[str], *, create: bool = True) -> Self:
        """Open or create the file (0600) and apply the migrations it has not seen; raise CloisterError.

        Without `create` the file has to be there, and not be empty: SQLite would make a new database of an empty file.
        """
        try:
            if create:
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise _failed(path, error) from error
        try:
            if not (create or os.fstat(descriptor).st_size):
                raise _empty(path)
            connection = _connect(path, migrations)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(connection, path, descriptor)

    async def write(self, function: Callable[[apsw.Connection], _T]) -> _T:
        """Run `function` in a transaction; when this returns, what it wrote is on disk."""
        return await asyncio.wrap_future(self._submit(function, writes=True))

    async def read(self, function: Callable[[apsw.Connection], _T]) -> _T:
        """Run `function`; it sees every write that was asked for before it."""
        return await asyncio.wrap_future(self._submit(function, writes=False))

    def write_sync(self, function: Callable[[apsw.Connection], _T]) -> _T:
        """Do what `write` does, blocking this thread."""
        return self._submit(function, writes=True).result()

    def read_sync(self, function: Callable[[apsw.Connection], _T]) -> _T:
        """Do what `read` does, blocking this thread."""
        return self._submit(function, writes=False).result()

    async def fold(self) -> None:
        """Bring what was written into the file and cut the log beside it: what was deleted is in neither any more.

        Waits for a snapshot that is being read, since that would see the file change.
        """

        def checkpoint(connection: apsw.Connection) -> None:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

        async with self._snapshot:
            await asyncio.wrap_future(self._submit(checkpoint, bare=True))

    @asynccontextmanager
    async def snapshot(self, look: Callable[[apsw.Connection], _T]) -> AsyncIterator[Snapshot[_T]]:
        """Give the file as it is now, and what `look` found in it; one at a time, others wait.

        All that was written is brought into the file first; until the end of the block, writes go to the log beside
        it alone, which grows by them. Nobody is kept waiting but for that first step.
        """

        def hold(connection: apsw.Connection) -> tuple[_T, int]:
            checkpoint = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if checkpoint is None or checkpoint[0]:
                raise apsw.BusyError("the file is in use")
            connection.execute("PRAGMA wal_autocheckpoint = 0").fetchall()
            return look(connection), os.fstat(self._descriptor).st_size

        def let_go(connection: apsw.Connection) -> None:
            connection.execute(f"PRAGMA wal_autocheckpoint = {_AUTOCHECKPOINT}").fetchall()

        async with self._snapshot:
            try:
                found, size = await asyncio.wrap_future(self._submit(hold, bare=True))
                yield Snapshot(found, size, self._read_file)
            finally:
                if not self._closed:
                    await asyncio.wrap_future(self._submit(let_go, bare=True))

    async def _read_file(self, offset: int, size: int) -> bytes:
        data = await asyncio.to_thread(self._pread, offset, size)
        # Closing brings the log into the file: what was read since may be of another moment.
        if self._closed or len(data) != size:
            raise CloisterError(
                Code.IO_FAILED,
                what=f"{self._path.name} could not be read to its end",
                why="the process is stopping" if self._closed else "the file is shorter than it was",
                todo="try again",
            )
        return data

    def _pread(self, offset: int, size: int) -> bytes:
        with self._reading:
            return b"" if self._closed else os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Finish what was asked for, then close; a second call does nothing."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        self._thread.join()
        with self._reading:
            os.close(self._descriptor)

    def _submit(
        self, function: Callable[[apsw.Connection], _T], *, writes: bool = False, bare: bool = False
    ) -> Future[_T]:
        work = _Work(function, writes, Future(), bare)
        with self._closing:  # so that nothing is queued behind the end
            if self._closed:
                raise CloisterError(Code.IO_FAILED, what=f"{self._path.name} is closed", why="the process is stopping")
            self._queue.put(work)
        return work.done

    def _serve(self) -> None:
        open_ended = True
        while open_ended:
            batch, open_ended = self._take()
            for work in batch:
                if work.bare:
                    self._run_bare(work)
            batch = [work for work in batch if not work.bare]
            if batch:
                self._run(batch)
        self._connection.close()

    def _take(self) -> tuple[list[_Work], bool]:
        """Wait for work, then take all there is; the second value is False when the end was reached."""
        batch: list[_Work] = []
        found = self._queue.get()
        while found is not None:
            # A caller that has gone away before its work began does not get it done.
            if found.done.set_running_or_notify_cancel():
                batch.append(found)
            if len(batch) >= _MAX_BATCH:
                return batch, True
            try:
                found = self._queue.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _run_bare(self, work: _Work) -> None:
        try:
            result = work.run(self._connection)
        except apsw.Error as error:
            work.done.set_exception(_failed(self._path, error))
        except BaseException as error:  # noqa: BLE001 - belongs to the caller, whatever it is
            work.done.set_exception(error)
        else:
            work.done.set_result(result)

    def _run(self, batch: list[_Work]) -> None:
        """Run a batch in one transaction and tell the callers once it is on disk."""
        connection = self._connection
        outcomes: list[Callable[[], None]] = []
        try:
            if any(work.writes for work in batch):
                connection.execute("BEGIN IMMEDIATE")
            outcomes = [self._run_one(work) for work in batch]
            if connection.in_transaction:
                connection.execute("COMMIT")
        except apsw.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            for work in batch:
                work.done.set_exception(_failed(self._path, error))
            return
        for tell in outcomes:
            tell()

    def _run_one(self, work: _Work) -> Callable[[], None]:
        """Run one piece of work in its savepoint; return how to tell its caller."""
        connection = self._connection
        connection.execute("SAVEPOINT work")
        try:
            result = work.run(connection)
        except BaseException as error:  # belongs to the caller, whatever it is
            caught = _failed(self._path, error) if isinstance(error, _OF_THE_DISK) else error
            # A full disk may have ended the transaction already; then the whole batch fails below.
            if not connection.in_transaction:
                raise apsw.FullError("the transaction was rolled back") from error
            connection.execute("ROLLBACK TO work")
            connection.execute("RELEASE work")
            return lambda: work.done.set_exception(caught)
        connection.execute("RELEASE work")
        return lambda: work.done.set_result(result)


def _connect(path: Path, migrations: Sequence[str]) -> apsw.Connection:
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
    except apsw.Error as error:
        raise _failed(path, error) from error
    try:
        for pragma in _PRAGMAS:
            connection.execute(pragma).fetchall()
        _migrate(connection, path, migrations)
    except apsw.Error as error:
        connection.close()
        raise _failed(path, error) from error
    except CloisterError:
        connection.close()
        raise
    return connection


def _migrate(connection: apsw.Connection, path: Path, migrations: Sequence[str]) -> None:
    """Bring the schema to `len(migrations)`, one transaction per step, numbered in user_version."""
    version = int(connection.pragma("user_version"))
    if version > len(migrations):
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what=f"{path} was written by a newer release",
            why=f"its schema is version {version}, this release knows {len(migrations)}",
            todo="install the newer release, or restore a backup made before the upgrade",
        )
    # Also takes the exclusive lock, so that a second process fails here and not at its first write.
    connection.execute("BEGIN IMMEDIATE; COMMIT")
    for number, sql in enumerate(migrations[version:], start=version + 1):
        with connection:
            connection.execute(sql)
            connection.execute(f"PRAGMA user_version = {number}")


def _missing(path: Path) -> CloisterError:
    return CloisterError(
        Code.FILE_NOT_FOUND,
        what=f"there is no database at {path}",
        why="it was moved or lost, or was never made; another is not made in its place",
        todo="restore it from a backup",
    )


def _empty(path: Path) -> CloisterError:
    return CloisterError(
        Code.IO_FAILED,
        what=f"{path} is empty",
        why="it was cut to nothing; another database is not made in its place",
        todo="restore it from a backup",
    )


def _failed(path: Path, error: BaseException) -> CloisterError:
    if isinstance(error, apsw.FullError):
        return CloisterError(
            Code.DISK_FULL,
            what=f"{path} could not be written",
            why="the disk is full; what was there before is unchanged",
            todo="make room and try again",
        )
    if isinstance(error, apsw.BusyError | apsw.LockedError):
        return CloisterError(
            Code.STACK_RUNNING,
            what=f"{path} is in use",
            why="another process has it open, and a database has one owner",
            todo="stop that process",
        )
    if isinstance(error, apsw.CorruptError | apsw.NotADBError):
        return CloisterError(
            Code.IO_FAILED,
            what=f"{path} is damaged",
            why=f"SQLite: {error}; nothing in it was changed",
            todo="keep it for an investigation, and restore a backup",
        )
    return CloisterError(
        Code.IO_FAILED,
        what=f"{path} cannot be used as a database",
        why=str(error),
        todo="check the path, its permissions and the disk",
    )
