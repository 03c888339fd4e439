# SPDX-License-Identifier: Apache-2.0
"""What was acknowledged is there, whatever happens to the process or the disk."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.runtime.database import Database

SCHEMA = ("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT",)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "items.db"


@pytest.fixture
def database(path: Path) -> Iterator[Database]:
    opened = Database.open(path, SCHEMA)
    yield opened
    opened.close()


def insert(name: str) -> object:
    return lambda connection: connection.execute("INSERT INTO item (name) VALUES (?)", (name,)).fetchall()


def count(connection: apsw.Connection) -> int:
    return int(connection.execute("SELECT count(*) FROM item").fetchone()[0])  # type: ignore[index]


def names(connection: apsw.Connection) -> list[str]:
    return [str(row[0]) for row in connection.execute("SELECT name FROM item ORDER BY id")]


WRITER = """
import sys
from pathlib import Path
from cloister.runtime.database import Database
database = Database.open(Path(sys.argv[1]), [sys.argv[2]])
for number in range(1_000_000):
    database.write_sync(lambda c: c.execute("INSERT INTO item (name) VALUES (?)", (str(number),)).fetchall())
    print(number, flush=True)
"""


def test_kill_9_loses_no_acknowledged_write(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), SCHEMA[0]], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        acknowledged = -1
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged == 30:
                writer.send_signal(signal.SIGKILL)
    assert acknowledged >= 30, "what was printed before the end was acknowledged, too"
    database = Database.open(path, SCHEMA)
    stored = database.read_sync(names)
    database.close()
    assert stored[: acknowledged + 1] == [str(number) for number in range(acknowledged + 1)]
    assert len(stored) <= acknowledged + 2, "at most the write in flight is there as well"


async def test_many_writers_share_commits_and_each_gets_its_own_answer(database: Database) -> None:
    results = await asyncio.gather(
        *(database.write(insert(f"n{number % 150}")) for number in range(200)),  # type: ignore[arg-type]
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, apsw.ConstraintError)]
    assert len(refused) == 50, "the second of each equal pair is refused, and only it"
    assert await database.read(count) == 150


async def test_a_failed_piece_of_work_leaves_nothing_of_itself(database: Database) -> None:
    def half(connection: apsw.Connection) -> None:
        connection.execute("INSERT INTO item (name) VALUES ('half')")
        raise LookupError("changed my mind")

    neighbours = asyncio.gather(database.write(insert("a")), database.write(insert("b")))  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="changed my mind"):
        await database.write(half)
    await neighbours
    assert await database.read(names) == ["a", "b"]


async def test_a_read_sees_every_write_asked_for_before_it(database: Database) -> None:
    write = asyncio.ensure_future(database.write(insert("a")))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    assert await database.read(count) == 1
    await write


def test_work_of_many_threads_is_done_on_one(database: Database) -> None:
    seen: set[int] = set()

    def work() -> None:
        database.write_sync(lambda _: seen.add(threading.get_ident()))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1


def test_the_file_is_private_and_the_settings_are_the_safe_ones(database: Database, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600
    found = database.read_sync(
        lambda c: [c.pragma(name) for name in ("journal_mode", "synchronous", "foreign_keys", "temp_store")]
    )
    assert found == ["wal", 2, 1, 2]


def test_strict_tables_refuse_the_wrong_type(database: Database) -> None:
    with pytest.raises(apsw.ConstraintError, match="cannot store"):
        database.write_sync(lambda c: c.execute("INSERT INTO item (name) VALUES (x'00')").fetchall())


def test_migrations_run_once_and_in_order(path: Path) -> None:
    Database.open(path, SCHEMA).close()
    more = (*SCHEMA, "ALTER TABLE item ADD COLUMN size_bytes INTEGER", "CREATE INDEX size ON item (size_bytes)")
    for _ in range(2):
        database = Database.open(path, more)
        assert database.read_sync(lambda c: c.pragma("user_version")) == 3
        database.close()


def test_a_migration_that_fails_leaves_the_version_before_it(path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        Database.open(path, (*SCHEMA, "CREATE TABLE other (id INTEGER) STRICT; CREATE TABLE item (id INTEGER)"))
    assert caught.value.code is Code.IO_FAILED
    database = Database.open(path, SCHEMA)
    tables = database.read_sync(lambda c: [row[0] for row in c.execute("SELECT name FROM sqlite_schema")])
    database.close()
    assert "other" not in tables


def test_a_database_of_a_newer_release_is_not_touched(path: Path) -> None:
    Database.open(path, (*SCHEMA, "CREATE TABLE newer (id INTEGER) STRICT")).close()
    with pytest.raises(CloisterError) as caught:
        Database.open(path, SCHEMA)
    assert "newer release" in caught.value.what
    assert "version 2" in caught.value.why


def test_a_database_has_one_owner(database: Database, path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        Database.open(path, SCHEMA)
    assert caught.value.code is Code.STACK_RUNNING
    assert str(path) in caught.value.what


def test_a_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "file.db"
    path.write_bytes(b"not a database " * 100)
    with pytest.raises(CloisterError) as caught:
        Database.open(path, SCHEMA)
    assert caught.value.code is Code.IO_FAILED
    assert str(path) in caught.value.what
    with pytest.raises(CloisterError):
        Database.open(tmp_path, SCHEMA)


def test_a_full_disk_is_an_error_and_what_was_there_stays(database: Database) -> None:
    database.write_sync(insert("kept"))  # type: ignore[arg-type]
    pages = int(database.read_sync(lambda c: c.pragma("page_count")))
    database.read_sync(lambda c: c.pragma("max_page_count", pages))  # SQLite answers SQLITE_FULL beyond it
    with pytest.raises(CloisterError) as caught:
        database.write_sync(insert("x" * 100_000))  # type: ignore[arg-type]
    assert caught.value.code is Code.DISK_FULL
    database.read_sync(lambda c: c.pragma("max_page_count", 1_000_000))
    database.write_sync(insert("after"))  # type: ignore[arg-type]
    assert database.read_sync(names) == ["kept", "after"]


def test_close_finishes_what_was_asked_for_and_refuses_the_rest(path: Path) -> None:
    database = Database.open(path, SCHEMA)
    writers = [
        threading.Thread(target=lambda n=n: database.write_sync(insert(str(n))))  # type: ignore[misc,arg-type]
        for n in range(5)
    ]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    database.close()
    database.close()
    with pytest.raises(CloisterError):
        database.read_sync(count)
    again = Database.open(path, SCHEMA)
    assert again.read_sync(count) == 5
    again.close()


# Snapshots.


async def restored(path: Path, snapshot_bytes: bytes) -> list[str]:
    path.write_bytes(snapshot_bytes)
    copy = Database.open(path, SCHEMA, create=False)
    try:
        assert await copy.read(lambda c: c.execute("PRAGMA integrity_check").fetchall()) == [("ok",)]
        return await copy.read(names)
    finally:
        copy.close()


async def test_a_snapshot_is_the_moment_it_was_taken_at_while_writes_go_on(database: Database, tmp_path: Path) -> None:
    for number in range(300):
        await database.write(insert(f"before-{number}"))
    data = b""
    async with database.snapshot(count) as snapshot:
        assert snapshot.found == 300
        async for chunk in snapshot.chunks(4096):
            data += chunk
            # More than the thousand pages after which SQLite would write into the file by itself.
            await database.write(insert(f"meanwhile-{len(data)}" + "x" * 1_000_000))
    assert len(data) == snapshot.size_bytes
    assert await database.read(count) > 305
    assert await restored(tmp_path / "copy.db", data) == [f"before-{number}" for number in range(300)]
    async with database.snapshot(count) as later:
        whole = b"".join([chunk async for chunk in later.chunks(1 << 20)])
    assert len(await restored(tmp_path / "later.db", whole)) == later.found > 305


async def test_after_a_snapshot_the_log_is_brought_into_the_file_again(database: Database, path: Path) -> None:
    async with database.snapshot(count):
        pass
    for number in range(30):
        await database.write(insert(f"{number}" + "x" * 200_000))
    assert path.stat().st_size > 4_000_000


async def test_a_snapshot_that_is_interrupted_says_so_and_lets_go(database: Database) -> None:
    await database.write(insert("one"))

    async def read_while_it_closes() -> None:
        async with database.snapshot(count) as snapshot:
            chunks = snapshot.chunks(512)
            await anext(chunks)
            await asyncio.to_thread(database.close)
            await anext(chunks)

    with pytest.raises(CloisterError) as caught:
        await read_while_it_closes()
    assert caught.value.code is Code.IO_FAILED
    with pytest.raises(CloisterError):
        async with database.snapshot(count):
            pass


async def test_the_file_stays_locked_after_a_snapshot(database: Database, path: Path) -> None:
    """Closing any descriptor of a file ends every lock that the process has on it."""
    async with database.snapshot(count) as snapshot:
        _ = [chunk async for chunk in snapshot.chunks(1 << 20)]
    program = "import sys; from pathlib import Path; from cloister.runtime.database import Database\n"
    program += "Database.open(Path(sys.argv[1]), [sys.argv[2]])"
    second = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", program, str(path), SCHEMA[0]], capture_output=True, text=True
    )
    assert second.returncode == 1
    assert "CLO-1008" in second.stderr


@pytest.mark.parametrize("content", [None, b""])
def test_a_database_that_has_to_be_there_is_not_made(path: Path, content: bytes | None) -> None:
    path.parent.mkdir()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CloisterError) as caught:
        Database.open(path, SCHEMA, create=False)
    assert caught.value.code is (Code.FILE_NOT_FOUND if content is None else Code.IO_FAILED)
    assert list(path.parent.iterdir()) == ([] if content is None else [path])
