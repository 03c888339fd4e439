# SPDX-License-Identifier: Apache-2.0
"""Releases that wait together become durable together: syncs are counted where SQLite asks the system for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from fakes.keybroker_harness import Broker, a_broker

RELEASES = 64


class CountedFile(apsw.VFSFile):
    """A file of SQLite's that counts how often it is synced."""

    def __init__(self, counted: CountedVfs, name: str | apsw.URIFilename, flags: list[int]) -> None:
        super().__init__(counted.base, name, flags)  # type: ignore[arg-type]
        self._counted = counted

    def xSync(self, flags: int) -> None:
        self._counted.syncs += 1
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


async def test_one_sync_serves_all_releases_that_wait_for_it(tmp_path: Path, counted: CountedVfs) -> None:
    async with a_broker(tmp_path) as broker:
        await broker.create_key()
        await release(broker)
        size = (await broker.store.read(lambda t: t.log.head())).size
        begun, over, waiting = threading.Event(), threading.Event(), broker.store._database._queue
        disk = asyncio.ensure_future(broker.store.read(lambda t: (begun.set(), over.wait(20))))
        await asyncio.to_thread(begun.wait, 20)
        releases = asyncio.gather(*(release(broker) for _ in range(RELEASES)))
        while waiting.qsize() < RELEASES:
            await asyncio.sleep(0.01)
        before = counted.syncs
        over.set()
        await releases
        await disk
        assert (await broker.store.read(lambda t: t.log.head())).size == size + RELEASES
        assert 1 <= counted.syncs - before <= 4  # the commit, and what SQLite may do with a full write-ahead log
