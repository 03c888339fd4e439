# SPDX-License-Identifier: Apache-2.0
"""The store knows its own: another root key, an edited row, a rewritten log or a lost key stops the broker."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.backends.wrapping import WRAPPED_SIZE
from cloister_keybroker.config import STORE_FILE
from cloister_keybroker.rootkey import create_root_key, read_root_key
from cloister_keybroker.sealrecord import SealRecord
from cloister_keybroker.store import KeyStore
from fakes.keybroker_harness import KEY, OTHER_KEY, a_broker, owner


async def a_used_store(directory: Path) -> Path:
    """Make a store with two keys, one disabled, and a few decisions; return the file."""
    async with a_broker(directory) as broker:
        await broker.create_key()
        await broker.create_key(uri=OTHER_KEY)
        await broker.td().release()
        await broker.owners.set_state(owner(), OTHER_KEY, KeyState.DISABLED)
    return directory / "store.sqlite"


async def refused(directory: Path) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        async with a_broker(directory):
            pass
    assert caught.value.code is Code.STORE_DAMAGED
    return caught.value


def edit(path: Path, *statements: str) -> None:
    """Do what an operator with the file can do."""
    connection = apsw.Connection(str(path))
    for statement in statements:
        connection.execute(statement)
    connection.close()


async def test_a_store_continues_where_it_was(tmp_path: Path) -> None:
    await a_used_store(tmp_path)
    async with a_broker(tmp_path) as broker:
        await broker.td().release()
        keys = await broker.owners.list(owner(), after="", limit=10)
        assert [(key.record.uri, key.record.state) for key in keys] == [
            (KEY, KeyState.ENABLED),
            (OTHER_KEY, KeyState.DISABLED),
        ]
        assert [logged.index for logged in await broker.log()] == [6, 4, 3, 2, 1]


async def test_another_root_key_is_recognised_and_changes_nothing(tmp_path: Path) -> None:
    await a_used_store(tmp_path)
    (tmp_path / "root.key").rename(tmp_path / "right.key")
    error = await refused(tmp_path)
    assert "another root key" in error.what
    (tmp_path / "right.key").replace(tmp_path / "root.key")
    async with a_broker(tmp_path):
        pass


@pytest.mark.parametrize(
    "statement",
    [
        f"UPDATE keys SET state = 'enabled' WHERE uri = '{OTHER_KEY}'",
        "UPDATE keys SET owner = 'spiffe://cloister.test/ns/hospital-a/user/intern'",
        "UPDATE keys SET purposes = 'export,train'",
        "UPDATE keys SET policy_version = 0, policy_digest = x''",
        "UPDATE keys SET newest = 2",
        "UPDATE keys SET state = 'open'",
        "UPDATE keys SET signer = 'did:key:z6Mk'",
        "UPDATE keys SET min_version = 0",
        "UPDATE keys SET destroy_at_ms = -1",
        "UPDATE keys SET imported = 1",
        "UPDATE keys SET policy_withdrawn = 1",
        "UPDATE keys SET publications = 1",
        "UPDATE keys SET published = x'00'",
        "UPDATE keys SET mac = x'00'",
        "UPDATE key_versions SET handle = CAST(handle || x'00' AS BLOB)",
        "UPDATE key_versions SET version = version + 1",
        "UPDATE key_versions SET backend = 'ehsm'",
        "UPDATE key_versions SET created_ms = -1",
        "INSERT INTO key_versions SELECT uri, 2, handle, backend, created_ms, mac FROM key_versions",
        "DELETE FROM key_versions",
        f"INSERT INTO publications VALUES ('{KEY}', 1, 'reviews', 1, x'00', x'00')",
        "DELETE FROM key_versions; DELETE FROM policies; DELETE FROM keys",
        "DELETE FROM store",
        "UPDATE store SET canary = x'00'",
        "UPDATE store SET record = x'00'",
        "UPDATE store SET mac = x'00'",
        "DELETE FROM log_head",
        "UPDATE log_head SET size = 0, peaks = x''",
        "UPDATE log_head SET mac = x'00'",
    ],
)
async def test_an_edited_row_stops_the_broker(tmp_path: Path, statement: str) -> None:
    edit(await a_used_store(tmp_path), "PRAGMA foreign_keys = OFF", statement)
    await refused(tmp_path)


async def test_an_old_row_put_back_is_found_by_the_log(tmp_path: Path) -> None:
    """The row is genuine, MAC and all: it is what the key was before its owner disabled it."""
    path = tmp_path / "store.sqlite"
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
    connection = apsw.Connection(str(path))
    (state, mac) = connection.execute("SELECT state, mac FROM keys").fetchall()[0]
    (handle,) = connection.execute("SELECT handle FROM key_versions").fetchall()[0]
    connection.close()
    async with a_broker(tmp_path) as broker:
        await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE keys SET state = ?, mac = ?", (state, mac))
    connection.execute("UPDATE key_versions SET handle = ?", (handle,))
    connection.close()
    assert "decision log" in (await refused(tmp_path)).why


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE policies SET yaml = CAST(replace(CAST(yaml AS TEXT), 'deny', 'none') AS BLOB)",
        "DELETE FROM policies",
        "UPDATE policies SET mac = x'00'",
    ],
)
async def test_an_edited_policy_is_refused_when_it_is_used(tmp_path: Path, statement: str) -> None:
    edit(await a_used_store(tmp_path), statement)
    async with a_broker(tmp_path) as broker:
        with pytest.raises(CloisterError) as caught:
            await broker.td().release()
        assert caught.value.code is Code.STORE_DAMAGED


async def test_a_file_that_is_no_database_is_not_created_anew(tmp_path: Path) -> None:
    (tmp_path / "store.sqlite").write_bytes(b"not a database" * 1000)
    with pytest.raises(CloisterError) as caught:
        async with a_broker(tmp_path):
            pass
    assert caught.value.code in (Code.IO_FAILED, Code.STORE_DAMAGED)
    assert (tmp_path / "store.sqlite").read_bytes().startswith(b"not a database")


async def test_a_failed_change_leaves_nothing_behind(tmp_path: Path) -> None:
    """Key and log entry are one transaction."""
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        with pytest.raises(CloisterError):
            await broker.create_key()
        assert len(await broker.log()) == 1


# Root key files.


def test_a_root_key_file_is_made_once_and_for_its_user_only(tmp_path: Path) -> None:
    path = tmp_path / "root.key"
    create_root_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 65
    before = path.read_bytes()
    with pytest.raises(CloisterError) as caught:
        create_root_key(path)
    assert caught.value.code is Code.FILE_EXISTS
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["root.key"]
    assert read_root_key(path).canary() == read_root_key(path).canary()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_root_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "root.key"
    create_root_key(path)
    path.chmod(mode)
    with pytest.raises(CloisterError, match="others may read it") as caught:
        read_root_key(path)
    assert "chmod 600" in caught.value.todo


@pytest.mark.parametrize("data", [b"", b"00" * 31, b"00" * 33, b"zz" * 32, b"00" * 32 + b"\n\n", bytes(32), b"AB" * 32])
def test_a_root_key_of_another_size_or_form_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "root.key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(CloisterError, match="not 64 hexadecimal digits") as caught:
        read_root_key(path)
    assert data == b"" or data.decode().strip() not in str(caught.value)


def test_a_missing_root_key_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        read_root_key(tmp_path / "root.key")
    assert caught.value.code is Code.FILE_NOT_FOUND
    assert "cloister_keybroker init --root-key-file" in caught.value.todo


def test_a_root_key_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    create_root_key(tmp_path / "real.key")
    (tmp_path / "link.key").symlink_to("real.key")
    (tmp_path / "directory.key").mkdir()
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    for name in ("link.key", "directory.key", "pipe.key"):
        with pytest.raises(CloisterError) as caught:
            read_root_key(tmp_path / name)
        assert caught.value.code is Code.CONFIG_INVALID


def test_init_makes_root_key_and_store_and_refuses_to_overwrite_either(tmp_path: Path) -> None:
    key, store = tmp_path / "root.key", tmp_path / "state" / STORE_FILE

    def init(root_key: Path = key) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cloister_keybroker", "init"]
        command += ["--root-key-file", str(root_key), "--state-dir", str(store.parent)]
        return subprocess.run(command, capture_output=True, text=True)

    assert init().returncode == 0
    assert (stat.S_IMODE(key.stat().st_mode), stat.S_IMODE(store.stat().st_mode)) == (0o600, 0o600)
    before = key.read_bytes(), store.read_bytes()
    again = init()
    assert (again.returncode, "CLO-1004" in again.stderr) == (6, True)
    assert key.read_text().strip() not in again.stdout + again.stderr
    assert (key.read_bytes(), store.read_bytes()) == before
    assert sorted(path.name for path in store.parent.iterdir()) == [STORE_FILE]

    key.rename(tmp_path / "kept.key")
    beside = init()  # another root key for a store that is there would be of no use
    assert (beside.returncode, key.exists()) == (5, False)
    (tmp_path / "kept.key").rename(key)
    store.unlink()
    assert init().returncode == 0  # a human said so: an empty store under the same root key
    assert key.read_bytes() == before[0]
    store.unlink()
    nowhere = init(tmp_path / "no" / "root.key")
    assert (nowhere.returncode, "CLO-1006" in nowhere.stderr) == (1, True)


async def test_a_store_is_not_made_over_the_remains_of_another(tmp_path: Path) -> None:
    """A write-ahead log that was left behind would be read into the new file."""
    create_root_key(tmp_path / "root.key")
    (tmp_path / f"{STORE_FILE}-wal").write_bytes(b"remains")
    with pytest.raises(CloisterError) as caught:
        await KeyStore.create(tmp_path / STORE_FILE, read_root_key(tmp_path / "root.key"), SealRecord())
    assert caught.value.code is Code.FILE_EXISTS
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{STORE_FILE}-wal", "root.key"]


# The embedded back end.


def a_backend(tmp_path: Path) -> EmbeddedBackend:
    path = tmp_path / "root.key"
    if not path.exists():
        create_root_key(path)
    return EmbeddedBackend(read_root_key(path))


async def test_a_handle_is_bound_to_key_version_and_state(tmp_path: Path) -> None:
    backend, ref = a_backend(tmp_path), KeyRef(KEY, 1, KeyState.ENABLED, frozenset())
    handle = await backend.create(ref)
    fresh = await backend.generate(ref, handle)
    assert len(fresh.wrapped) == WRAPPED_SIZE
    assert await backend.unwrap(ref, handle, fresh.wrapped) == fresh.secret
    for other in (
        KeyRef(OTHER_KEY, 1, KeyState.ENABLED, frozenset()),
        KeyRef(KEY, 2, KeyState.ENABLED, frozenset()),
        KeyRef(KEY, 1, KeyState.DISABLED, frozenset()),
    ):
        with pytest.raises(CloisterError) as caught:
            await backend.unwrap(other, handle, fresh.wrapped)
        assert caught.value.code is Code.STORE_DAMAGED
    disabled = await backend.restate(ref, handle, KeyState.DISABLED)
    back = await backend.restate(KeyRef(KEY, 1, KeyState.DISABLED, frozenset()), disabled, KeyState.ENABLED)
    assert await backend.unwrap(ref, back, fresh.wrapped) == fresh.secret
    await backend.check()


async def test_neither_keys_nor_data_keys_repeat(tmp_path: Path) -> None:
    backend, ref = a_backend(tmp_path), KeyRef(KEY, 1, KeyState.ENABLED, frozenset())
    handle = await backend.create(ref)
    assert await backend.create(ref) != handle
    first, second = await backend.generate(ref, handle), await backend.generate(ref, handle)
    assert first.secret != second.secret
    assert first.wrapped != second.wrapped


async def test_no_key_stands_in_the_store_in_plain(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        td = broker.td()
        secret = td.open(await td.release()).reveal()
    root = bytes.fromhex((tmp_path / "root.key").read_text())
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert secret not in data
        assert secret.hex().encode() not in data
        assert root not in data


async def test_keys_are_listed_in_pages(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await broker.create_key(uri=OTHER_KEY)
        first = await broker.owners.list(owner(), after="", limit=1)
        rest = await broker.owners.list(owner(), after=str(first[0].record.uri), limit=5)
        assert [key.record.uri for key in (*first, *rest)] == [KEY, OTHER_KEY]
