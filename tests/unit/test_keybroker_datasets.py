# SPDX-License-Identifier: Apache-2.0
"""The broker remembers the newest version of a data set: whoever holds an older one gets no key for it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import apsw
import pytest

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes
from cloister_keybroker import datasets
from cloister_keybroker.datakeys import WrappedKey
from cloister_keybroker.datasets import Publication, Registry, data_key_digest
from fakes.keybroker_harness import KEY, OTHER_KEY, TENANT, Broker, Clock, a_broker, owner

MANIFESTS = [bytes([number]) * 48 for number in range(5)]  # of versions 1, 2, ... from index 1 on


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path, Clock()) as found:
        await found.create_key()
        yield found


async def refused(attempt: Any, code: Code) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt
    assert caught.value.code is code, caught.value
    return caught.value


async def publish(
    broker: Broker, wrapped: bytes, version: int, *, dataset: str = "reviews", parent: bytes | None = None, **key: Any
) -> None:
    """Publish a version of a data set whose manifest is the one of this number."""
    if parent is None:
        parent = MANIFESTS[version - 1] if version > 1 else b""
    await broker.data_keys.publish(
        owner(),
        WrappedKey(key.get("uri", KEY), key.get("key_version", 1), wrapped),
        Publication(dataset, version, MANIFESTS[version]),
        parent,
    )


async def release(broker: Broker, wrapped: bytes, *manifests: bytes, **changes: Any) -> SecretBytes:
    """Have a rank ask for a data key that has measured these manifests."""
    td = broker.td()
    return td.open(await td.release(wrapped=wrapped, ear={"workload": {"datasets": manifests}}, **changes))


async def test_a_rank_with_an_older_version_gets_no_key(broker: Broker) -> None:
    made, secret = await broker.generate()
    assert await release(broker, made.wrapped, MANIFESTS[1]) == secret  # nothing is published yet
    await publish(broker, made.wrapped, 1)
    assert await release(broker, made.wrapped, MANIFESTS[1]) == secret
    await publish(broker, made.wrapped, 2)
    error = await refused(release(broker, made.wrapped, MANIFESTS[1]), Code.RELEASE_DENIED)
    assert "block dataset.version" in error.what
    assert "version 2 of reviews" in error.why
    await refused(release(broker, made.wrapped), Code.RELEASE_DENIED)
    assert await release(broker, made.wrapped, MANIFESTS[2]) == secret
    assert await release(broker, made.wrapped, MANIFESTS[4], MANIFESTS[2]) == secret


async def test_an_older_version_does_not_come_back_under_a_newer_number(broker: Broker) -> None:
    """Publishing needs the owner's certificate only: who can have one made must not roll data back with it."""
    made, secret = await broker.generate()
    for version in (1, 2):
        await publish(broker, made.wrapped, version)
    again = Publication("reviews", 3, MANIFESTS[1])
    key = WrappedKey(KEY, 1, made.wrapped)
    error = await refused(broker.data_keys.publish(owner(), key, again, MANIFESTS[2]), Code.DATASET_VERSION)
    assert "was published before" in error.why
    await refused(release(broker, made.wrapped, MANIFESTS[1]), Code.RELEASE_DENIED)
    await publish(broker, made.wrapped, 3)  # one with a manifest of its own follows
    assert await release(broker, made.wrapped, MANIFESTS[3]) == secret


async def test_an_owner_opens_the_newest_version_only(broker: Broker) -> None:
    made, secret = await broker.generate()
    await publish(broker, made.wrapped, 1)
    await publish(broker, made.wrapped, 2)
    assert await broker.open_key(made.wrapped, manifest_digest=MANIFESTS[2]) == secret
    for older in (MANIFESTS[1], b""):
        error = await refused(broker.open_key(made.wrapped, manifest_digest=older), Code.RELEASE_DENIED)
        assert "dataset.version" in error.what


async def test_wrapping_a_data_key_again_is_no_way_around(broker: Broker) -> None:
    """It is the data key that is remembered, in whatever form it comes back."""
    made, secret = await broker.generate()
    before = await broker.data_keys.rewrap(owner(), WrappedKey(KEY, 1, made.wrapped))
    await publish(broker, made.wrapped, 1)
    await publish(broker, made.wrapped, 2)
    await broker.owners.rotate(owner(), KEY)
    after = await broker.data_keys.rewrap(owner(), WrappedKey(KEY, 1, made.wrapped))
    for key in (before, after):
        attempt = release(broker, key.wrapped, MANIFESTS[1], key_version=key.version)
        await refused(attempt, Code.RELEASE_DENIED)
        assert await release(broker, key.wrapped, MANIFESTS[2], key_version=key.version) == secret


async def test_an_older_data_key_of_a_data_set_demands_the_newest_version_too(broker: Broker) -> None:
    old, old_secret = await broker.generate()
    new, _ = await broker.generate()
    await publish(broker, old.wrapped, 1)
    await publish(broker, new.wrapped, 2)
    await refused(release(broker, old.wrapped, MANIFESTS[1]), Code.RELEASE_DENIED)
    assert await release(broker, old.wrapped, MANIFESTS[2]) == old_secret


async def test_versions_follow_each_other(broker: Broker) -> None:
    made, _ = await broker.generate()
    await publish(broker, made.wrapped, 1)
    await publish(broker, made.wrapped, 2)
    await publish(broker, made.wrapped, 2)  # said twice, after a lost answer
    for version, parent in ((1, b""), (3, MANIFESTS[1]), (3, MANIFESTS[3]), (4, MANIFESTS[3])):
        await refused(publish(broker, made.wrapped, version, parent=parent), Code.DATASET_VERSION)
    assert [logged.entry.action for logged in await broker.log()][:6] == ["publish"] * 6
    newest = (await broker.log())[0].entry
    assert (newest.granted, newest.blocks[0].name) == (False, "dataset.version")
    await publish(broker, made.wrapped, 3)


async def test_another_version_of_the_same_number_is_a_fork(broker: Broker) -> None:
    made, _ = await broker.generate()
    await publish(broker, made.wrapped, 1)
    fork = Publication("reviews", 1, MANIFESTS[4])
    attempt = broker.data_keys.publish(owner(), WrappedKey(KEY, 1, made.wrapped), fork, b"")
    await refused(attempt, Code.DATASET_VERSION)


async def test_a_data_key_belongs_to_one_data_set(broker: Broker) -> None:
    made, _ = await broker.generate()
    await publish(broker, made.wrapped, 1)
    error = await refused(publish(broker, made.wrapped, 1, dataset="others"), Code.DATASET_VERSION)
    assert "that of reviews" in error.why
    other, _ = await broker.generate()
    await publish(broker, other.wrapped, 1, dataset="others")


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 0},
        {"version": 2**53},
        {"dataset_id": ""},
        {"dataset_id": "x" * 256},
        {"dataset_id": "a\nb"},
        {"manifest_digest": bytes(47)},
    ],
)
async def test_what_cannot_be_a_version_is_refused(broker: Broker, changes: dict[str, Any]) -> None:
    made, _ = await broker.generate()
    publication = replace(Publication("reviews", 1, MANIFESTS[1]), **changes)
    attempt = broker.data_keys.publish(owner(), WrappedKey(KEY, 1, made.wrapped), publication, b"")
    await refused(attempt, Code.ARGUMENT_INVALID)
    for version, parent in ((1, MANIFESTS[1]), (2, b""), (2, bytes(3))):
        await refused(publish(broker, made.wrapped, version, parent=parent), Code.ARGUMENT_INVALID)


async def test_only_a_data_key_of_the_key_is_published_under_it(broker: Broker) -> None:
    await broker.create_key(uri=OTHER_KEY)
    made, _ = await broker.generate(OTHER_KEY)
    await refused(publish(broker, made.wrapped, 1), Code.WRAPPED_KEY_INVALID)
    await refused(publish(broker, made.wrapped, 1, uri=OTHER_KEY, key_version=2), Code.WRAPPED_KEY_INVALID)
    await publish(broker, made.wrapped, 1, uri=OTHER_KEY)


async def test_a_key_has_a_largest_number_of_publications(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "MAX_PUBLICATIONS", 2)
    made, _ = await broker.generate()
    await publish(broker, made.wrapped, 1)
    await publish(broker, made.wrapped, 2)
    await refused(publish(broker, made.wrapped, 3), Code.KEY_QUOTA)


async def a_store_with_versions(directory: Path) -> tuple[Path, bytes, SecretBytes]:
    async with a_broker(directory, Clock()) as broker:
        await broker.create_key()
        await broker.create_key(uri=OTHER_KEY)
        made, secret = await broker.generate()
        await publish(broker, made.wrapped, 1)
        await publish(broker, made.wrapped, 2)
    return directory / "store.sqlite", made.wrapped, secret


async def test_versions_are_remembered_across_restarts(tmp_path: Path) -> None:
    _, wrapped, secret = await a_store_with_versions(tmp_path)
    async with a_broker(tmp_path, Clock()) as broker:
        await refused(release(broker, wrapped, MANIFESTS[1]), Code.RELEASE_DENIED)
        assert await release(broker, wrapped, MANIFESTS[2]) == secret


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM publications",
        "DELETE FROM publications WHERE number = 2",
        "DELETE FROM publications WHERE number = 1",
        "UPDATE publications SET version = 3 WHERE number = 2",
        "UPDATE publications SET version = -1 WHERE number = 2",
        "UPDATE publications SET dataset_id = 'others'",
        "UPDATE publications SET manifest_digest = x'00' WHERE number = 1",
        "UPDATE publications SET data_key_digest = x'00' WHERE number = 1",
        "UPDATE publications SET number = number + 2; UPDATE publications SET number = 7 - number - 2",
        "INSERT INTO publications SELECT uri, 3, dataset_id, 3, x'00', x'00' FROM publications WHERE number = 1",
        f"UPDATE publications SET uri = 'cloister-key://{TENANT}/models/reviews'",
    ],
)
async def test_an_edited_version_stops_the_broker(tmp_path: Path, statement: str) -> None:
    path, _, _ = await a_store_with_versions(tmp_path)
    connection = apsw.Connection(str(path))
    connection.execute(statement)
    connection.close()
    with pytest.raises(CloisterError) as caught:
        async with a_broker(tmp_path, Clock()):
            pass
    assert caught.value.code is Code.STORE_DAMAGED


def test_a_registry_knows_data_sets_and_their_data_keys() -> None:
    one, two = SecretBytes(b"\x01" * 32), SecretBytes(b"\x02" * 32)
    first = Publication("a", 1, MANIFESTS[1], data_key_digest(one))
    second = Publication("a", 2, MANIFESTS[2], data_key_digest(two))
    registry = Registry([first, second])
    assert (registry.size, registry.newest("a"), registry.newest("b")) == (2, second, None)
    assert registry.demanded(one) == registry.demanded(two) == second
    assert registry.demanded(SecretBytes(bytes(32))) is None
    assert registry.head == second.chained(first.chained(b"")) != Registry([second, first]).head
    assert one.reveal() not in data_key_digest(one)
