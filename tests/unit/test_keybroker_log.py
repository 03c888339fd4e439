# SPDX-License-Identifier: Apache-2.0
"""The decision log only grows, proves what it holds, and does not start when somebody was at it."""

from __future__ import annotations

from pathlib import Path

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.merkle import root_of, verify_consistency, verify_inclusion
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.entry import LoggedEntry
from cloister.transparency.start import Start
from cloister_keybroker import logcheck, logkey
from cloister_keybroker.logcheck import grant_tag, key_tag
from cloister_keybroker.logreading import read_whole_log
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.transaction import Transaction
from fakes.certs import TRUST_DOMAIN
from fakes.keybroker_harness import KEY, OTHER_KEY, TENANT, Broker, a_broker, owner
from fakes.log_material import BROKER, DROP_GUARDS, ROOT_KEY, Log, an_entry, edit, tenant_of

LONG = logcheck.SEGMENT + 3


def blob(data: bytes) -> str:
    return f"x'{data.hex()}'"


async def tokens(broker: Broker) -> int:
    def count(connection: apsw.Connection) -> int:
        return int(str(connection.execute("SELECT count(*) FROM evidence").get))

    return await broker.store._database.read(count)


async def a_used_store(directory: Path) -> Path:
    async with a_broker(directory) as broker:
        await broker.create_key()
        await broker.create_key(uri=OTHER_KEY)
        await broker.td().release()
    return directory / "store.sqlite"


# Evidence.


async def test_the_evidence_of_a_decision_is_kept_once(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await broker.replace_policy(evidence={"max_age": "5m", "nonce": "verifier"})
        td = broker.td()
        token = td.token()
        for _ in range(3):
            await broker.releases.release(td.workload, td.asked(await td.begin(), token))
        entries = [logged.entry for logged in await broker.log() if logged.entry.action == "generate"]
        assert {entry.evidence_digest for entry in entries} == {sha384(token.encode())}
        assert await broker.store.read(lambda t: t.evidence(entries[0].evidence_digest)) == token
        assert await tokens(broker) == 1


async def test_denials_keep_their_evidence_and_garbage_is_not_kept(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        td = broker.td()
        with pytest.raises(CloisterError):
            await td.release(ear={"workload": {"script": bytes(48)}})
        assert await tokens(broker) == 1
        with pytest.raises(CloisterError):
            await broker.releases.release(td.workload, td.asked(await td.begin(), "garbage " * 2000))
        assert await tokens(broker) == 1
        assert await broker.store.read(lambda t: t.evidence(sha384(b"never seen"))) is None


def test_an_entry_keeps_no_token_but_its_own() -> None:
    log = Log.begin()
    with pytest.raises(ValueError, match="its own"):
        log.log.append(an_entry(evidence_digest=sha384(b"one")), time_ms=1, token="another")
    assert log.log.head().size == 0


def test_an_edited_token_is_refused_when_it_is_read() -> None:
    log, digest = Log.begin(), sha384(b"token")
    log.log.append(an_entry(evidence_digest=digest), time_ms=1, token="token")
    assert log.log.evidence(digest) == "token"
    log.connection.execute("UPDATE evidence SET token = 'kinder'")
    with pytest.raises(CloisterError, match="edited"):
        log.log.evidence(digest)


# What stands in the log.


async def test_the_receipt_holds_the_root_of_the_log_that_ends_with_the_decision(tmp_path: Path) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        td = broker.td()
        for _ in range(3):
            place = (await td.release()).data_key.receipt.place
            tree, leaf = await broker.store.read(lambda t: (t.proofs.newest(), t.proofs.entry(t.log.head().size - 1)))
            assert (place.index + 1, place.root) == (tree.size, tree.root)
            assert LoggedEntry.parse(leaf[0]).entry.action == "generate"


async def test_a_tenant_sees_its_own_log(tmp_path: Path) -> None:
    await a_used_store(tmp_path)
    async with a_broker(tmp_path) as broker:
        store = broker.store
        mine = await store.read(lambda t: t.newest_entries(TENANT, key_uri="", limit=2))
        assert [logged.entry.action for logged in mine] == ["generate", "create-key"]
        one = await store.read(lambda t: t.newest_entries(TENANT, key_uri=str(OTHER_KEY), limit=9))
        assert [logged.entry.key_uri for logged in one] == [str(OTHER_KEY)]
        assert await store.read(lambda t: t.newest_entries("hospital-b", key_uri="", limit=9)) == []


def test_entries_are_followed_from_an_index_on() -> None:
    log = Log.begin(entries=9)
    assert [logged.index for logged in log.log.following(TENANT, first=3, limit=2)] == [3, 5]
    assert [logged.index for logged in log.log.following(TENANT, key_uri=str(KEY), first=6, limit=9)] == [7]
    assert list(log.log.following(TENANT, key_uri=str(OTHER_KEY), first=0, limit=9)) == []


def test_an_entry_relabelled_under_a_running_broker_is_not_shown_to_another_tenant() -> None:
    log = Log.begin(entries=4)
    log.connection.execute("; ".join((*DROP_GUARDS, "UPDATE decisions SET tenant = 'hospital-c' WHERE idx = 2")))
    with pytest.raises(CloisterError, match="relabelled"):
        list(log.log.newest("hospital-c", limit=9))


def test_equal_entries_have_leaf_hashes_that_tell_nothing() -> None:
    """Every tenant sees the hashes of all entries: guessing what an entry says must not be confirmed by its hash."""
    log = Log.begin()
    for _ in range(3):
        log.log.append(an_entry(), time_ms=1)
    salts = [LoggedEntry.parse(log.proofs.entry(index)[0]).salt for index in range(3)]
    assert len(set(salts)) == 3


# Proofs.


@pytest.mark.parametrize("entries", [1, 2, 7, 64, 65])
def test_every_entry_is_proven_at_every_size(entries: int) -> None:
    log = Log.begin(entries=entries)
    leaves = log.leaves()
    for size in range(1, entries + 1):
        assert log.proofs.tree(size).root == root_of(leaves[:size])
    for index in range(entries):
        for size in {index + 1, entries}:
            leaf, proven = log.proofs.inclusion(index, size=size)
            root = root_of(leaves[:size])
            verify_inclusion(leaf=leaf, index=index, size=size, proof=proven.proof, root=root)
            assert (leaf, proven.tree.root) == (leaves[index], root)


def test_the_log_of_today_continues_the_log_of_any_day() -> None:
    log = Log.begin(entries=21)
    leaves = log.leaves()
    for old in range(22):
        for new in (old, 21):
            proven = log.proofs.consistency(old, new_size=new)
            root = root_of(leaves[: proven.tree.size])
            verify_consistency(
                old_size=old,
                old_root=root_of(leaves[:old]),
                new_size=proven.tree.size,
                new_root=root,
                proof=proven.proof,
            )


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        (lambda p: p.entry(5), Code.DECISION_NOT_FOUND),
        (lambda p: p.inclusion(3, size=3), Code.DECISION_NOT_FOUND),
        (lambda p: p.inclusion(0, size=6), Code.ARGUMENT_INVALID),
        (lambda p: p.consistency(6), Code.ARGUMENT_INVALID),
        (lambda p: p.consistency(4, new_size=3), Code.ARGUMENT_INVALID),
        (lambda p: p.tree(6), Code.ARGUMENT_INVALID),
    ],
)
def test_what_is_not_there_is_not_proven(ask: object, code: Code) -> None:
    with pytest.raises(CloisterError) as caught:
        ask(Log.begin(entries=5).proofs)  # type: ignore[operator]
    assert caught.value.code is code


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = x'00' WHERE idx = 2",
        "UPDATE entries SET entry = (SELECT entry FROM entries WHERE idx = 1) WHERE idx = 2",
        "DELETE FROM entries WHERE idx = 2",
        "UPDATE log_nodes SET hash = zeroblob(32) WHERE position IN (0, 2, 3, 5, 6)",
        "DELETE FROM log_nodes",
        "UPDATE log_head SET mac = x'00'",
        "UPDATE log_head SET size = 3, peaks = zeroblob(64)",
    ],
)
def test_nothing_is_proven_of_what_was_edited_under_a_running_broker(statement: str) -> None:
    log = Log.begin(entries=5)
    log.connection.execute("; ".join((*DROP_GUARDS, statement)))
    with pytest.raises(CloisterError) as caught:
        log.proofs.entry(2)
    assert caught.value.code is Code.STORE_DAMAGED


def test_an_older_root_is_not_believed_when_stored_subtrees_were_edited() -> None:
    """Otherwise the broker could be made to sign a checkpoint that contradicts another."""
    log = Log.begin(entries=6)
    log.connection.execute("UPDATE log_nodes SET hash = zeroblob(32) WHERE position = 2")
    with pytest.raises(CloisterError, match="do not lead to its root"):
        log.proofs.tree(3)


def test_leaves_are_whole_for_their_tenant_and_bare_for_others() -> None:
    log = Log.begin(entries=6)
    log.log.append(an_entry(tenant="", action="start"), time_ms=7)
    leaves = list(log.proofs.leaves(TENANT, 1, 7))
    assert [leaf.hash for leaf in leaves] == log.leaves()[1:]
    assert [bool(leaf.entry) for leaf in leaves] == [True, False, True, False, True, True]


# A start.


@pytest.fixture(scope="module")
def long_log(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A log with one complete segment, as a file's bytes."""
    path = tmp_path_factory.mktemp("log") / "log.sqlite"
    Log.begin(path, LONG).connection.close()
    return path.read_bytes()


@pytest.fixture
def copied(long_log: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "log.sqlite"
    path.write_bytes(long_log)
    return path


def test_a_log_that_nobody_was_at_verifies(copied: Path) -> None:
    log = Log(copied)
    records = log.log.verify(whole=True)
    newest = {key_tag(tenant_of(number), str(KEY)): bytes([number % 256]) for number in (LONG - 2, LONG - 1)}
    assert log.log.verify() == records == newest
    assert log.connection.execute("SELECT count(*) FROM log_segments").get == 1


@pytest.mark.parametrize("idx", [7, LONG - 2])  # in the complete segment, and behind it
@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM decisions WHERE idx = {idx}",
        "DELETE FROM decisions WHERE idx >= {idx}; DELETE FROM entries WHERE idx >= {idx}",
        "UPDATE decisions SET grant_tag = x'' WHERE idx = {idx}",
        "UPDATE decisions SET grant_tag = zeroblob(16) WHERE idx = {idx}",
        "UPDATE decisions SET tenant = 'x' WHERE idx = {idx}",
        "UPDATE decisions SET tenant = CAST(CAST(tenant AS BLOB) || x'0062' AS TEXT) WHERE idx = {idx}",
        "UPDATE decisions SET key_tag = zeroblob(16) WHERE idx = {idx}",
        "UPDATE decisions SET record_digest = x'' WHERE idx = {idx}",
        "UPDATE decisions SET idx = -1 WHERE idx = {idx}",
    ],
)
def test_a_log_whose_columns_were_rewritten_stops_the_broker(copied: Path, statement: str, idx: int) -> None:
    edit(copied, *DROP_GUARDS, statement.format(idx=idx))
    with pytest.raises(CloisterError) as caught:
        Log(copied).log.verify()
    assert caught.value.code is Code.STORE_DAMAGED


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = CAST(substr(entry, 1, length(entry) - 1) || x'21' AS BLOB) WHERE idx = {idx}",
        "UPDATE entries SET entry = (SELECT entry FROM entries WHERE idx = {idx} - 2) WHERE idx = {idx}",
        "UPDATE entries SET entry = x'00' WHERE idx = {idx}",
        "DELETE FROM entries WHERE idx = {idx}",
    ],
)
def test_an_edited_entry_behind_the_last_segment_stops_the_broker(copied: Path, statement: str) -> None:
    edit(copied, *DROP_GUARDS, statement.format(idx=LONG - 2))
    with pytest.raises(CloisterError):
        Log(copied).log.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET entry = (SELECT entry FROM entries WHERE idx = 5) WHERE idx = 7",
        "DELETE FROM entries WHERE idx = 7",
    ],
)
def test_an_edited_entry_of_a_complete_segment_is_found_by_its_proof_and_by_a_whole_check(
    copied: Path, statement: str
) -> None:
    edit(copied, *DROP_GUARDS, statement)
    log = Log(copied)
    log.log.verify()
    with pytest.raises(CloisterError, match="missing or was changed"):
        log.proofs.entry(7)
    with pytest.raises(CloisterError) as caught:
        log.log.verify(whole=True)
    assert caught.value.code is Code.STORE_DAMAGED


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM log_segments",
        "UPDATE log_segments SET number = 1",
        "UPDATE log_segments SET mac = zeroblob(48)",
        "UPDATE log_segments SET columns = zeroblob(48)",
        "UPDATE log_segments SET root = zeroblob(32)",
        "INSERT INTO log_segments SELECT 1, root, columns, mac FROM log_segments",
        "DELETE FROM log_head",
        "UPDATE log_head SET size = 0, peaks = x''",
        "UPDATE log_head SET mac = x'00'",
    ],
)
def test_a_log_whose_marks_were_edited_stops_the_broker(copied: Path, statement: str) -> None:
    edit(copied, statement)
    with pytest.raises(CloisterError) as caught:
        Log(copied).log.verify()
    assert caught.value.code is Code.STORE_DAMAGED


def test_an_index_that_does_not_follow_its_table_stops_the_broker(copied: Path) -> None:
    """max_per_job counts through an index: one that lies about an untouched table must be noticed."""
    edit(copied, *DROP_GUARDS, f"UPDATE decisions SET grant_tag = {blob(grant_tag(str(KEY), 'x', b''))}")
    connection = apsw.Connection(str(copied))
    found = connection.execute("SELECT * FROM sqlite_schema WHERE name = 'grants_by_job'").get
    connection.close()
    edit(copied, "PRAGMA writable_schema = ON", "DELETE FROM sqlite_schema WHERE name = 'grants_by_job'")
    tags = [blob(grant_tag(str(KEY), f"j-{number}", b"")) for number in range(3)]
    edit(copied, *(f"UPDATE decisions SET grant_tag = {tag} WHERE idx % 3 = {n}" for n, tag in enumerate(tags)))
    connection = apsw.Connection(str(copied))
    connection.execute("PRAGMA writable_schema = ON")
    connection.execute("INSERT INTO sqlite_schema VALUES (?, ?, ?, ?, ?)", found)
    connection.close()
    log = Log(copied)
    assert log.log.released_to_job(job="j-1", key_uri=str(KEY), policy_digest=b"") == 0
    assert log.log.released_to_job(job="x", key_uri=str(KEY), policy_digest=b"") == LONG
    with pytest.raises(CloisterError, match="its indexes"):
        log.log.verify()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE decisions SET grant_tag = x'01'",
        "DELETE FROM decisions WHERE idx = 0",
        "INSERT OR REPLACE INTO decisions SELECT * FROM decisions WHERE idx = 0",
        f"INSERT INTO decisions VALUES ({LONG + 1}, '', x'', x'', x'')",
        "UPDATE entries SET entry = x'00'",
        "DELETE FROM entries",
    ],
)
def test_the_log_only_grows(copied: Path, statement: str) -> None:
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        edit(copied, statement)
    Log(copied).log.verify()


async def test_a_rewritten_log_stops_the_broker(tmp_path: Path) -> None:
    edit(await a_used_store(tmp_path), *DROP_GUARDS, "UPDATE decisions SET grant_tag = x''")
    with pytest.raises(CloisterError) as caught:
        async with a_broker(tmp_path):
            pass
    assert caught.value.code is Code.STORE_DAMAGED


# The log's key, and a broker's lives.


def test_the_log_keeps_its_key_and_signs_checkpoints_with_it() -> None:
    log = Log.begin()
    key = logkey.load_or_create(log.connection, ROOT_KEY, BROKER)
    again = logkey.load_or_create(log.connection, ROOT_KEY, BROKER)
    assert again.note_key == key.note_key
    assert key.note_key.name.startswith(f"{TRUST_DOMAIN}/keybroker/")
    note = again.checkpoint(size=3, root=bytes(32))
    assert Checkpoint.open(note, key.note_key) == Checkpoint(key.note_key.name, 3, bytes(32))
    assert key.private.private_bytes_raw() not in log.connection.serialize("main")


@pytest.mark.parametrize(
    "statement",
    ["UPDATE log_key SET name = 'cloister.test/keybroker/other'", "UPDATE log_key SET sealed = zeroblob(60)"],
)
def test_an_edited_key_of_the_log_is_refused(statement: str) -> None:
    log = Log.begin()
    logkey.load_or_create(log.connection, ROOT_KEY, BROKER)
    log.connection.execute(statement)
    with pytest.raises(CloisterError) as caught:
        logkey.load(log.connection, ROOT_KEY)
    assert caught.value.code is Code.STORE_DAMAGED


def test_a_store_of_another_trust_domain_is_refused() -> None:
    log = Log.begin()
    logkey.load_or_create(log.connection, ROOT_KEY, BROKER)
    with pytest.raises(CloisterError, match="another trust domain"):
        logkey.load_or_create(log.connection, ROOT_KEY, SpiffeId.service("elsewhere.test", Role.KEYBROKER))


def test_another_root_key_keeps_the_logs_key() -> None:
    log, new = Log.begin(), RootKey(SecretBytes(b"\x06" * 32))
    key = logkey.load_or_create(log.connection, ROOT_KEY, BROKER)
    logkey.rekey(log.connection, ROOT_KEY, new)
    found = logkey.load(log.connection, new)
    assert found is not None
    assert found.note_key == key.note_key
    with pytest.raises(CloisterError):
        logkey.load(log.connection, ROOT_KEY)


async def test_every_life_of_the_broker_begins_with_its_receipt_key(tmp_path: Path) -> None:
    starts = []
    for _ in range(2):
        async with a_broker(tmp_path) as broker:
            entries = await broker.store.read(lambda t: list(t.log.newest("", limit=9)))
            starts.append(Start.of(entries[0]))
            assert starts[-1].receipt_public == broker.receipt_key.public_key().public_bytes_raw()
            if len(starts) == 1:
                await broker.create_key()
    assert starts[0].log == starts[1].log
    assert starts[0].receipt_public != starts[1].receipt_public
    assert [start.size for start in starts] == [0, 2]


async def test_a_disabled_key_is_logged_with_its_record(tmp_path: Path) -> None:
    await a_used_store(tmp_path)
    async with a_broker(tmp_path) as broker:
        record = (await broker.owners.get(owner(), KEY)).record
        logged = await broker.store.read(lambda t: t.log.verify(whole=True))
        assert logged[key_tag(TENANT, str(KEY))] == record.digest()


# The whole log, again.


async def a_long_store(directory: Path) -> Path:
    async with a_broker(directory) as broker:
        await broker.create_key()

        def fill(transaction: Transaction) -> None:
            for number in range(LONG):
                transaction.append(an_entry(job=f"j-{number}"), time_ms=number)

        await broker.store.write(fill)
    return directory / "store.sqlite"


async def test_a_running_broker_reads_its_whole_log_and_goes_on(tmp_path: Path) -> None:
    await a_long_store(tmp_path)
    async with a_broker(tmp_path) as broker:
        await read_whole_log(broker.store, pause_s=0)
        await broker.td().release()


async def test_a_running_broker_that_finds_an_old_entry_changed_does_nothing_more(tmp_path: Path) -> None:
    edit(await a_long_store(tmp_path), *DROP_GUARDS, "UPDATE entries SET entry = zeroblob(9) WHERE idx = 9")
    async with a_broker(tmp_path) as broker:
        await broker.td().release()
        await read_whole_log(broker.store, pause_s=0)
        with pytest.raises(CloisterError) as caught:
            await broker.td().release()
        assert caught.value.code is Code.STORE_DAMAGED
