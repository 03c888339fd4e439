# SPDX-License-Identifier: Apache-2.0
"""A backup is the store at one moment, whole and genuine, or it is refused and nothing is put in a store's place."""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.secret import SecretBytes
from cloister_keybroker.backup import MAGIC, Trailer, backup, pending_trailer, unpack
from cloister_keybroker.restore import restore
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.unsealing import NewRoot, new_root_from_shares
from cloister_keybroker.vault import State
from fakes.keybroker_vault import AVault, a_vault, opens, put_key

ROOT = RootKey(SecretBytes(bytes(32)))
BROKER = "spiffe://cloister.test/service/keybroker"
STORE = "store.sqlite"
LATER = KeyUri.parse("cloister-key://hospital-a/made/later")


async def a_backup_of(vault: AVault) -> bytes:
    opened = vault.vault.opened
    chunks = backup(opened.database, opened.root_key, broker_id=BROKER, created_ms=1000)
    return b"".join([chunk async for chunk in chunks])


async def unsealed(vault: AVault) -> NewRoot:
    new = await vault.initialized()
    await vault.hand_in(*new.shares[:2])
    return new


async def refused(source: Path, store: Path, root_key: RootKey | None = None) -> Code:
    with pytest.raises(CloisterError) as caught:
        await restore(source, store, root_key)
    return caught.value.code


async def test_a_restored_store_is_the_one_of_the_backup_and_says_so_in_its_log(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with a_vault(tmp_path / "a") as vault:
        new = await unsealed(vault)
        opened = vault.vault.opened
        wrapped = await put_key(opened.store, opened.backends)
        secret = await opens(opened.store, opened.backends, wrapped)
        saved = tmp_path / "backup"
        saved.write_bytes(await a_backup_of(vault))
        await put_key(opened.store, opened.backends, LATER)
        size = (await opened.store.read(lambda t: t.log.head())).size
    trailer = await restore(saved, tmp_path / "b" / STORE, new.root_key)
    assert (trailer.broker_id, trailer.created_ms, trailer.log_size) == (BROKER, 1000, size - 1)
    async with a_vault(tmp_path / "b") as vault:
        assert vault.state is State.SEALED
        await vault.hand_in(*new.shares[1:])
        opened = vault.vault.opened
        assert await opens(opened.store, opened.backends, wrapped) == secret
        assert await opened.store.read(lambda transaction: transaction.key(LATER)) is None
        (first,) = await opened.store.read(lambda t: t.newest_entries("", key_uri="", limit=1))
        assert (first.entry.action, first.index, first.entry.blocks[0].got) == ("restore", size - 1, str(size - 1))
    assert not pending_trailer(tmp_path / "b" / STORE).exists()
    async with a_vault(tmp_path / "b") as vault:
        await vault.hand_in(*new.shares[1:])
        found = await vault.vault.opened.store.read(lambda t: t.newest_entries("", key_uri="", limit=10))
        assert len(found) == 1  # once, not at every start


async def test_a_backup_is_not_put_over_a_store_or_over_the_remains_of_one(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        await unsealed(vault)
        (tmp_path / "backup").write_bytes(await a_backup_of(vault))
    before = (tmp_path / STORE).read_bytes()
    assert await refused(tmp_path / "backup", tmp_path / STORE) is Code.FILE_EXISTS
    assert (tmp_path / STORE).read_bytes() == before
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / f"{STORE}-wal").write_bytes(b"remains")
    assert await refused(tmp_path / "backup", tmp_path / "c" / STORE) is Code.FILE_EXISTS


async def test_a_backup_that_was_touched_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with a_vault(tmp_path / "a") as vault:
        new = await unsealed(vault)
        saved = await a_backup_of(vault)
    source, store = tmp_path / "backup", tmp_path / "b" / STORE
    database_ends = 24 + int.from_bytes(saved[16:24], "big")
    for name, data in {
        "empty": b"",
        "another file": b"SQLite format 3\x00" + saved,
        "a byte of the file": saved[:5000] + bytes([saved[5000] ^ 1]) + saved[5001:],
        "a byte of the digest": saved[:-150] + bytes([saved[-150] ^ 1]) + saved[-149:],
        "cut in the file": saved[:9000],
        "cut before the trailer": saved[:database_ends],
        "cut in the trailer": saved[:-1],
        "something behind it": saved + b"x",
        "another length": saved[:16] + (2**63).to_bytes(8, "big") + saved[24:],
    }.items():
        source.write_bytes(data)
        assert await refused(source, store) is Code.BACKUP_INVALID, name
    assert list(store.parent.iterdir()) == []
    # The MAC itself is judged as soon as there is a root key.
    forged = saved[:-1] + bytes([saved[-1] ^ 1])
    source.write_bytes(forged)
    assert await refused(source, store, new.root_key) is Code.BACKUP_INVALID
    await restore(source, store, None)
    async with a_vault(tmp_path / "b") as vault:
        await vault.hand_in(new.shares[0])
        with pytest.raises(CloisterError, match="a backup that is not this broker's"):
            await vault.hand_in(new.shares[1])
        assert vault.state is State.SEALED


async def test_a_backup_under_another_root_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with a_vault(tmp_path / "a") as vault:
        old = await unsealed(vault)
        saved = await a_backup_of(vault)
        new = new_root_from_shares(threshold=2, count=2)
        await vault.rekey(new, *old.shares[:2])
        await vault.hand_in(*new.shares)
    (tmp_path / "backup").write_bytes(saved)
    assert await refused(tmp_path / "backup", tmp_path / "b" / STORE, new.root_key) is Code.BACKUP_INVALID
    await restore(tmp_path / "backup", tmp_path / "b" / STORE, old.root_key)


async def test_two_backups_at_once_wait_for_each_other_and_writes_for_neither(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    async with a_vault(tmp_path / "a") as vault:
        new = await unsealed(vault)
        opened = vault.vault.opened
        first = backup(opened.database, opened.root_key, broker_id=BROKER, created_ms=1)
        pieces = [await anext(first), await anext(first)]
        await put_key(opened.store, opened.backends, LATER)
        pieces += [chunk async for chunk in first]
        second = await a_backup_of(vault)
    for name, data, found in (("one", b"".join(pieces), False), ("two", second, True)):
        (tmp_path / name).write_bytes(data)
        await restore(tmp_path / name, tmp_path / f"of-{name}" / STORE, new.root_key)
        async with a_vault(tmp_path / f"of-{name}") as vault:
            await vault.hand_in(*new.shares[:2])
            key = await vault.vault.opened.store.read(lambda transaction: transaction.key(LATER))
            assert (key is not None) == found


async def test_a_backup_that_cannot_be_read_or_written_says_why(tmp_path: Path) -> None:
    assert await refused(tmp_path / "nothing", tmp_path / STORE) is Code.FILE_NOT_FOUND
    assert list(tmp_path.iterdir()) == []


# The format.


def packed(trailer: Trailer, data: bytes = b"a file") -> bytes:
    return MAGIC + len(data).to_bytes(8, "big") + data + trailer.to_bytes()


def a_trailer(data: bytes = b"a file") -> Trailer:
    return Trailer(1, BROKER, len(data), hashlib.sha384(data).digest(), 3, os.urandom(32)).sealed(ROOT)


def test_the_root_key_answers_for_every_field() -> None:
    trailer = a_trailer()
    assert trailer.is_of(ROOT)
    assert not trailer.is_of(RootKey(SecretBytes(b"\x01" * 32)))
    for changed in (
        replace(trailer, created_ms=2),
        replace(trailer, broker_id=BROKER + "s"),
        replace(trailer, size_bytes=7),
        replace(trailer, digest=bytes(48)),
        replace(trailer, log_size=4),
        replace(trailer, log_root=bytes(32)),
        replace(trailer, mac=bytes(48)),
    ):
        assert not changed.is_of(ROOT)


@given(st.binary(max_size=400))
def test_noise_is_no_trailer_and_no_backup(noise: bytes) -> None:
    with pytest.raises(ValueError):
        Trailer.parse(noise)
    for data in (noise, MAGIC + noise, packed(a_trailer())[:24] + noise):
        with pytest.raises(CloisterError) as caught:
            unpack(io.BytesIO(data), io.BytesIO(), name="backup")
        assert caught.value.code is Code.BACKUP_INVALID


def test_a_good_one_unpacks() -> None:
    target = io.BytesIO()
    trailer = a_trailer()
    assert unpack(io.BytesIO(packed(trailer)), target, name="backup") == trailer
    assert target.getvalue() == b"a file"
    with pytest.raises(CloisterError):
        unpack(io.BytesIO(packed(replace(trailer, size_bytes=5))), io.BytesIO(), name="backup")
