# SPDX-License-Identifier: Apache-2.0
"""The life of a store: made, sealed, unsealed, sealed again, under another root key; and what never happens to it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState
from cloister.rootfile import read_root_file
from cloister.secret import SecretBytes
from cloister_keybroker import rekey
from cloister_keybroker.__main__ import init
from cloister_keybroker.keys import KeyVersion
from cloister_keybroker.rootkey import create_root_key, read_root_key, stage_root_key
from cloister_keybroker.sealrecord import SealRecord, Source
from cloister_keybroker.store import KeyStore
from cloister_keybroker.unsealing import NewRoot, new_root_from_passphrase, new_root_from_shares
from cloister_keybroker.vault import State
from fakes.keybroker_vault import ADA, GRACE, URI, AVault, a_vault, opens, operator, put_key

PASSPHRASE = SecretBytes(b"correct horse battery staple")


async def unsealed(vault: AVault) -> NewRoot:
    new = await vault.initialized()
    await vault.hand_in(*new.shares[:2])
    return new


async def refused(vault: AVault, secret: SecretBytes) -> Code:
    with pytest.raises(CloisterError) as caught:
        await vault.hand_in(secret)
    return caught.value.code


async def authenticators(vault: AVault) -> dict[str, list[Any]]:
    """Return every MAC, canary and handle of a store, by table and column."""

    def work(connection: apsw.Connection) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            for _, column, *_ in connection.execute(f"PRAGMA table_info({table})").fetchall():
                if column in ("mac", "canary", "handle"):
                    found[f"{table}.{column}"] = [row[0] for row in connection.execute(f"SELECT {column} FROM {table}")]
        return found

    assert vault.vault._database is not None
    return await vault.vault._database.read(work)


async def test_without_a_store_the_broker_waits_and_answers_nothing(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        assert (vault.state, await vault.answers(), vault.told) == (State.UNINITIALIZED, False, [])
        assert await refused(vault, SecretBytes(b"anything")) is Code.SEAL_STATE
        with pytest.raises(CloisterError) as caught:
            _ = vault.vault.opened
        assert caught.value.code is Code.BROKER_SEALED
    assert list(tmp_path.iterdir()) == []


async def test_a_new_store_is_sealed_until_its_shares_were_handed_in(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        new = await vault.initialized()
        assert (vault.state, await vault.answers()) == (State.SEALED, False)
        await vault.hand_in(new.shares[2])
        status = vault.vault.status()
        assert (status.state, status.have, status.need, status.source) == (State.SEALED, 1, 2, Source.SHARES)
        await vault.hand_in(new.shares[0], by=GRACE)
        assert (vault.state, await vault.answers(), vault.told) == (State.UNSEALED, True, [True])
        (entry,) = await vault.log()
        assert (entry.entry.action, entry.entry.caller) == ("unseal", str(GRACE))
        assert [(b.wanted, b.got) for b in entry.entry.blocks] == [("1", str(GRACE)), ("3", str(ADA))]
        assert await refused(vault, new.shares[1]) is Code.SEAL_STATE


async def test_a_restarted_broker_is_sealed_and_opens_with_any_shares(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        new = await unsealed(vault)
        wrapped = await put_key(vault.vault.opened.store, vault.vault.opened.backends)
    async with a_vault(tmp_path) as vault:
        assert (vault.state, await vault.answers()) == (State.SEALED, False)
        await vault.hand_in(*new.shares[1:])
        opened = vault.vault.opened
        assert len(await opens(opened.store, opened.backends, wrapped)) == 32


async def test_sealing_shuts_the_gate_and_what_was_open_is_of_no_use(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        new = await unsealed(vault)
        store, before = vault.vault.opened.store, vault.vault.status().nonce
        await vault.vault.seal(operator())
        assert (vault.state, await vault.answers(), vault.told) == (State.SEALED, False, [True, False])
        assert vault.vault.status().nonce != before
        for use in (store.read, store.write):
            with pytest.raises(CloisterError) as caught:
                await use(lambda transaction: transaction.key(URI))
            assert caught.value.code is Code.BROKER_SEALED
        await vault.vault.seal(operator())  # once more does nothing
        await vault.hand_in(*new.shares[:2])
        assert [entry.entry.action for entry in await vault.log()] == ["unseal", "seal", "unseal"]


async def test_refused_tries_stand_in_the_log_once_there_is_one(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        new, other = await vault.initialized(), new_root_from_shares(threshold=2, count=3)
        assert await refused(vault, other.shares[0]) is Code.SHARE_INVALID
        await vault.hand_in(*new.shares[:2])
        blocks = (await vault.log())[0].entry.blocks
        assert [(block.name, block.ok) for block in blocks] == [("share", True), ("share", True), ("unseal", False)]


async def test_an_unused_store_may_be_made_again_and_a_used_one_never(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        lost = await vault.initialized()
        new = await vault.initialized(threshold=3)
        assert await refused(vault, lost.shares[0]) is Code.SHARE_INVALID
        await vault.hand_in(*new.shares)
        for _ in range(2):
            with pytest.raises(CloisterError) as caught:
                await vault.initialized()
            assert caught.value.code is Code.SEAL_STATE
            await vault.vault.seal(operator())
        await vault.hand_in(*new.shares)


async def test_a_store_of_another_kind_than_configured_is_not_made(tmp_path: Path) -> None:
    async with a_vault(tmp_path, Source.PASSPHRASE) as vault:
        with pytest.raises(CloisterError) as caught:
            await vault.initialized()
        assert caught.value.code is Code.CONFIG_INVALID
        assert vault.state is State.UNINITIALIZED
        new = await unsealed_by_passphrase(vault)
        assert new.record.source is Source.PASSPHRASE
    with pytest.raises(CloisterError) as caught:
        async with a_vault(tmp_path):
            pass
    assert "the store's root key comes from: passphrase" in caught.value.why


async def unsealed_by_passphrase(vault: AVault) -> NewRoot:
    new = new_root_from_passphrase(PASSPHRASE)
    await vault.vault.initialize(new)
    await vault.hand_in(PASSPHRASE)
    return new


async def test_a_damaged_store_stays_sealed_and_says_so(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        new = await unsealed(vault)
        await put_key(vault.vault.opened.store, vault.vault.opened.backends)
    connection = sqlite3.connect(tmp_path / "store.sqlite")
    connection.execute("UPDATE keys SET owner = 'spiffe://cloister.test/ns/ops/user/eve'")
    connection.commit()
    connection.close()
    async with a_vault(tmp_path) as vault:
        await vault.hand_in(new.shares[0])
        assert await refused(vault, new.shares[1]) is Code.STORE_DAMAGED
        status = vault.vault.status()
        assert (status.state, status.have, await vault.answers()) == (State.SEALED, 0, False)


# Another root key.


async def test_another_root_key_takes_effect_when_its_shares_were_handed_in(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        old = await unsealed(vault)
        opened = vault.vault.opened
        wrapped = await put_key(opened.store, opened.backends)
        secret = await opens(opened.store, opened.backends, wrapped)
        new = new_root_from_shares(threshold=3, count=4)
        await vault.vault.begin_rekey(new)
        assert await refused(vault, new.shares[0]) is Code.SHARE_INVALID  # not before the present root key was shown
        status = vault.vault.status()
        assert (status.state, status.have, status.need) == (State.UNSEALED, 0, 2)
        await vault.hand_in(*old.shares[1:])
        assert await refused(vault, old.shares[0]) is Code.SHARE_INVALID
        await vault.hand_in(*new.shares[:2])
        status = vault.vault.status()
        assert (status.state, status.have, status.need) == (State.UNSEALED, 2, 3)
        before = await authenticators(vault)
        assert vault.vault.opened is opened
        await vault.hand_in(new.shares[3], by=GRACE)
        assert (vault.state, await vault.answers(), vault.told[-2:]) == (State.UNSEALED, True, [False, True])
        assert await opens(vault.vault.opened.store, vault.vault.opened.backends, wrapped) == secret
        with pytest.raises(CloisterError):  # whoever still holds the store of before
            await opened.store.read(lambda transaction: transaction.key(URI))
        entry = (await vault.log())[0].entry
        assert (entry.action, entry.caller) == ("rekey", str(GRACE))
        assert [(block.name, block.ok) for block in entry.blocks] == [
            *[("present_share", True)] * 2,
            ("unseal", False),  # a new share is none of the present ones
            *[("share", True)] * 3,
            ("unseal", False),  # and an old one none of the new
        ]
        after = await authenticators(vault)
        assert after.keys() == before.keys()
        for column, values in after.items():
            assert values or column == "log_segments.mac" or column.startswith("retired_handles."), column
            assert not set(values) & set(before[column]), f"{column} is as it was under the old root key"
    async with a_vault(tmp_path) as vault:
        assert await refused(vault, old.shares[0]) is Code.SHARE_INVALID
        await vault.hand_in(*new.shares[1:])
        assert await opens(vault.vault.opened.store, vault.vault.opened.backends, wrapped) == secret


async def test_a_root_key_that_was_not_handed_back_never_takes_effect(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        old = await unsealed(vault)
        await vault.vault.begin_rekey(new_root_from_shares(threshold=2, count=2))
    async with a_vault(tmp_path) as vault:
        await vault.hand_in(*old.shares[:2])
        first, second = (new_root_from_shares(threshold=2, count=2) for _ in range(2))
        await vault.rekey(first, *old.shares[:2])
        await vault.rekey(second, *old.shares[:2])
        assert await refused(vault, first.shares[0]) is Code.SHARE_INVALID
        await vault.vault.seal(operator())  # drops it, too
        await vault.hand_in(*old.shares[:2])


async def test_no_operator_replaces_the_root_key_by_his_own(tmp_path: Path) -> None:
    """Whoever knows a root key opens a copy of the store: shares of one's own are of no use without present ones."""
    async with a_vault(tmp_path) as vault:
        old = await unsealed(vault)
        canary = vault.vault.opened.root_key.canary()
        his = new_root_from_shares(threshold=2, count=2)
        await vault.rekey(his, old.shares[0])  # he may even hold one
        assert await refused(vault, old.shares[0]) is Code.SHARE_INVALID  # which does not count twice
        for share in his.shares:
            assert await refused(vault, share) is Code.SHARE_INVALID
        assert vault.vault.awaits_permission
        await vault.rekey(his)  # what was shown for one replacement does not count for the next
        assert vault.vault.status().have == 0
        assert vault.vault.opened.root_key.canary() == canary


async def test_the_present_passphrase_lets_another_one_in_and_cannot_be_guessed_faster_like_this(
    tmp_path: Path,
) -> None:
    async with a_vault(tmp_path, Source.PASSPHRASE) as vault:
        await unsealed_by_passphrase(vault)
        another = SecretBytes(b"quite another passphrase")
        new = new_root_from_passphrase(another)
        await vault.vault.begin_rekey(new)
        assert await refused(vault, another) is Code.UNSEAL_REFUSED
        await vault.vault.begin_rekey(new)
        assert await refused(vault, PASSPHRASE) is Code.RATE_LIMITED
        vault.clock.now_s += 1
        await vault.hand_in(PASSPHRASE, another)
        assert vault.vault.opened.root_key.canary() == new.root_key.canary()


async def test_a_sealed_broker_gets_no_other_root_key(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        await vault.initialized()
        with pytest.raises(CloisterError) as caught:
            await vault.vault.begin_rekey(new_root_from_shares(threshold=2, count=2))
        assert caught.value.code is Code.BROKER_SEALED


async def test_a_damaged_row_is_not_authenticated_anew_and_the_old_root_key_stays(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        old = await unsealed(vault)
        opened = vault.vault.opened
        wrapped = await put_key(opened.store, opened.backends)
        database = vault.vault._database
        assert database is not None
        await database.write(lambda c: c.execute("UPDATE policies SET yaml = x'00'").fetchall())
        new = new_root_from_shares(threshold=2, count=2)
        await vault.rekey(new, *old.shares[:2])
        await vault.hand_in(new.shares[0])
        assert await refused(vault, new.shares[1]) is Code.STORE_DAMAGED
        assert (vault.state, await vault.answers()) == (State.UNSEALED, True)
        assert len(await opens(vault.vault.opened.store, vault.vault.opened.backends, wrapped)) == 32
    async with a_vault(tmp_path) as vault:
        await vault.hand_in(*old.shares[:2])


async def test_a_handle_that_changed_after_it_was_made_again_undoes_the_replacement(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        await unsealed(vault)
        opened = vault.vault.opened
        await put_key(opened.store, opened.backends)
        new = new_root_from_shares(threshold=2, count=2)
        handles = await rekey.remade_handles(opened.store, opened.backends, new.root_key, {})
        changed = KeyVersion(1, b"another", "embedded", 1)
        await opened.store.write(lambda transaction: transaction.put_version(URI, changed))
        database = vault.vault._database
        assert database is not None
        before = await authenticators(vault)
        with pytest.raises(CloisterError) as caught:
            await database.write(
                lambda connection: rekey.replace(
                    connection,
                    old=opened.root_key,
                    new=new.root_key,
                    record=new.record,
                    handles=handles,
                    entry=operator().entry("rekey"),
                    time_ms=1,
                )
            )
        assert caught.value.code is Code.SEAL_STATE
        assert await authenticators(vault) == before


async def test_handles_that_did_not_change_are_made_again_once_only(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        await unsealed(vault)
        opened = vault.vault.opened
        await put_key(opened.store, opened.backends)
        root_key = new_root_from_shares(threshold=2, count=2).root_key
        first = await rekey.remade_handles(opened.store, opened.backends, root_key, {})
        assert len(first) == 2
        assert await rekey.remade_handles(opened.store, opened.backends, root_key, first) == first


async def test_a_disabled_key_stays_disabled_under_another_root_key(tmp_path: Path) -> None:
    async with a_vault(tmp_path) as vault:
        old = await unsealed(vault)
        opened = vault.vault.opened
        wrapped = await put_key(opened.store, opened.backends, state=KeyState.DISABLED)
        new = new_root_from_shares(threshold=2, count=2)
        await vault.rekey(new, *old.shares[:2])
        await vault.hand_in(*new.shares)
        opened = vault.vault.opened
        stored = await opened.store.read(lambda transaction: transaction.key(URI))
        assert stored is not None
        assert stored.record.state is KeyState.DISABLED
        assert len(await opens(opened.store, opened.backends, wrapped)) == 32


# A root key in a file.


def made_by_file(directory: Path) -> None:
    create_root_key(directory / "root.key")


async def a_file_store(directory: Path) -> None:
    made_by_file(directory)
    (await KeyStore.create(directory / "store.sqlite", read_root_key(directory / "root.key"), SealRecord())).close()


async def test_a_root_key_file_opens_the_store_at_once_and_again_after_sealing(tmp_path: Path) -> None:
    await a_file_store(tmp_path)
    async with a_vault(tmp_path, Source.FILE) as vault:
        assert (vault.state, await vault.answers()) == (State.UNSEALED, True)
        await vault.vault.seal(operator())
        assert (vault.state, await vault.answers()) == (State.SEALED, False)
        assert await refused(vault, SecretBytes(b"something")) is Code.SEAL_STATE
        await vault.hand_in(SecretBytes(b""))
        assert (vault.state, await vault.answers()) == (State.UNSEALED, True)


async def test_a_root_key_file_is_replaced_with_the_store(tmp_path: Path) -> None:
    await a_file_store(tmp_path)
    old = (tmp_path / "root.key").read_bytes()
    async with a_vault(tmp_path, Source.FILE) as vault:
        opened = vault.vault.opened
        wrapped = await put_key(opened.store, opened.backends)
        await vault.vault.rekey_file(operator())
        assert (tmp_path / "root.key").read_bytes() != old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root.key", "store.sqlite"]
    async with a_vault(tmp_path, Source.FILE) as vault:
        assert len(await opens(vault.vault.opened.store, vault.vault.opened.backends, wrapped)) == 32
    (tmp_path / "root.key").write_bytes(old)
    with pytest.raises(CloisterError, match="under another root key"):
        async with a_vault(tmp_path, Source.FILE):
            pass


@pytest.mark.parametrize("store_changed", [True, False])
async def test_a_replacement_that_was_interrupted_is_finished_or_forgotten(tmp_path: Path, store_changed: bool) -> None:
    """Killed before or after the store's one transaction: the file that the store is under is the one that counts."""
    await a_file_store(tmp_path)
    old = (tmp_path / "root.key").read_bytes()
    if store_changed:
        async with a_vault(tmp_path, Source.FILE) as vault:
            await vault.vault.rekey_file(operator())
        (tmp_path / "root.key").rename(tmp_path / "root.key.next")
        (tmp_path / "root.key").write_bytes(old)
        (tmp_path / "root.key").chmod(0o600)
    else:
        stage_root_key(tmp_path / "root.key")
    async with a_vault(tmp_path, Source.FILE) as vault:
        assert vault.state is State.UNSEALED
    assert ((tmp_path / "root.key").read_bytes() == old) == (not store_changed)


async def test_from_a_file_to_shares(tmp_path: Path) -> None:
    await a_file_store(tmp_path)
    async with a_vault(tmp_path, Source.FILE) as vault:
        new = new_root_from_shares(threshold=2, count=3)
        await vault.vault.begin_rekey(new)
        for wrong in (SecretBytes(b""), SecretBytes(b"\x00" * 32), new.shares[0]):
            assert await refused(vault, wrong) is Code.UNSEAL_REFUSED
        await vault.hand_in(read_root_file(tmp_path / "root.key"), *new.shares[:2])
        assert vault.vault.status().source is Source.SHARES
    with pytest.raises(CloisterError) as caught:
        async with a_vault(tmp_path, Source.FILE):
            pass
    assert caught.value.code is Code.CONFIG_INVALID
    async with a_vault(tmp_path, Source.SHARES) as vault:
        with pytest.raises(CloisterError) as caught:
            await vault.vault.rekey_file(operator())
        assert caught.value.code is Code.CONFIG_INVALID
        await vault.hand_in(*new.shares[1:])


def test_init_makes_a_store_for_a_root_key_file(tmp_path: Path) -> None:
    assert init(["--root-key-file", str(tmp_path / "root.key"), "--state-dir", str(tmp_path / "state")]) == 0
