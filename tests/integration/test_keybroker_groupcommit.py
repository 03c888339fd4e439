# SPDX-License-Identifier: Apache-2.0
"""Releases that wait together become durable together: syncs are counted where SQLite asks the system for them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from fakes.keybroker_harness import Broker, a_broker

RELEASES = 64
SYNC_S = 0.01  # as a disk takes that really writes


class CountedFile(apsw.VFSFile):
    """A file of SQLite's that counts how often it is synced, and takes its time for it."""

    def __init__(self, counted: CountedVfs, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__(counted.base, name, flags)  # type: ignore[arg-type]
        self._counted = counted

    def xSync(self, flags: int) -> None:
        self._counted.syncs += 1
        time.sleep(SYNC_S)
        super().xSync(flags)


class CountedVfs(apsw.VFS):
    """The system's files, counted."""

    def __init__(self) -> None:
        self.syncs = 0
        self.base = apsw.vfs_names()[0]
        super().__init__("counted", self.base, makedefault=True)

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> CountedFile:
        return CountedFile(self, name or "", flags)


@pytest.fixture
def counted() -> Iterator[CountedVfs]:
    before = apsw.vfs_names()[0]
    vfs = CountedVfs()
    yield vfs
    vfs.unregister()
    assert apsw.vfs_names()[0] == before


async def release(broker: Broker) -> None:
    await broker.td().release()


async def test_a_release_is_synced_before_it_is_answered(tmp_path: Path, counted: CountedVfs) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        for _ in range(3):
            before = counted.syncs
            await release(broker)
            assert counted.syncs > before


async def test_one_sync_serves_many_releases(tmp_path: Path, counted: CountedVfs) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await release(broker)
        before, size = counted.syncs, (await broker.store.read(lambda t: t.log.head())).size
        await asyncio.gather(*(release(broker) for _ in range(RELEASES)))
        assert (await broker.store.read(lambda t: t.log.head())).size == size + RELEASES
        assert 0 < counted.syncs - before <= RELEASES // 4
