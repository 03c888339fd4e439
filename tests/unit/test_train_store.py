# SPDX-License-Identifier: Apache-2.0
"""torch.distributed works on our store: torch's own test of Python stores, a process group, and errors that say why."""

import asyncio
import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from cloister.errors import CloisterError, Code
from cloister.train.store import RendezvousStore, join_process_group
from cloister_trainer.rendezvous import KeySpace


class Direct:
    """The coordinator's key space without a network in between."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.space = KeySpace()
        self.calls: list[str] = []

    def _run(self, name: str, *args: object, timeout_s: float) -> object:
        self.calls.append(name)

        async def bounded() -> object:
            async with asyncio.timeout(timeout_s):
                return await getattr(self.space, name)(*args)

        try:
            return asyncio.run_coroutine_threadsafe(bounded(), self.loop).result()
        except TimeoutError:
            raise CloisterError(Code.DEADLINE_EXCEEDED, what="no answer in time", why="nobody set the key") from None

    def set(self, key: str, value: bytes, *, timeout_s: float) -> None:
        self._run("set", key, value, timeout_s=timeout_s)

    def get(self, key: str, *, timeout_s: float) -> bytes:
        return self._run("get", key, timeout_s=timeout_s)  # type: ignore[return-value]

    def wait(self, keys: list[str], *, timeout_s: float) -> None:
        self._run("wait", keys, timeout_s=timeout_s)

    def add(self, key: str, amount: int, *, timeout_s: float) -> int:
        return self._run("add", key, amount, timeout_s=timeout_s)  # type: ignore[return-value]

    def check(self, keys: list[str], *, timeout_s: float) -> bool:
        return self._run("check", keys, timeout_s=timeout_s)  # type: ignore[return-value]

    def compare_set(self, key: str, expected: bytes, desired: bytes, *, timeout_s: float) -> bytes:
        return self._run("compare_set", key, expected, desired, timeout_s=timeout_s)  # type: ignore[return-value]

    def delete_key(self, key: str, *, timeout_s: float) -> bool:
        return self._run("delete", key, timeout_s=timeout_s)  # type: ignore[return-value]

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def rendezvous() -> Iterator[Direct]:
    direct = Direct()
    yield direct
    direct.close()


def test_the_store_passes_torchs_own_test_of_python_stores(rendezvous: Direct) -> None:
    torch._C._distributed_c10d._test_python_store(RendezvousStore(rendezvous, timedelta(seconds=5)))


def test_a_process_group_works_on_the_store_and_listens_on_loopback_only(rendezvous: Direct) -> None:
    join_process_group(rendezvous, rank=0, world_size=1, timeout=timedelta(seconds=10))
    try:
        total = torch.ones(3)
        dist.all_reduce(total)
        assert total.tolist() == [1, 1, 1]
        assert "set" in rendezvous.calls
        assert all(address.startswith("0100007F:") for address in listening())
    finally:
        dist.destroy_process_group()


def test_a_key_that_nobody_sets_ends_in_a_store_error_that_says_how_long(rendezvous: Direct) -> None:
    store = RendezvousStore(rendezvous, timedelta(milliseconds=80))
    with pytest.raises(dist.DistStoreError, match=r"did not come within 0\.08 s: nobody set the key"):
        store.get("absent")


def test_text_and_numbers_round_trip(rendezvous: Direct) -> None:
    store = RendezvousStore(rendezvous, timedelta(seconds=5))
    store.set("text", "房间")
    assert store.get("text").decode() == "房间"
    assert store.add("n", 3) == 3
    assert store.add("n", -1) == 2
    assert store.check(["text", "n"])
    assert not store.check(["text", "other"])
    assert store.compare_set("n", "2", "9") == b"9"
    assert store.compare_set("n", "2", "7") == b"9"
    assert store.delete_key("n")
    assert not store.delete_key("n")


def listening() -> list[str]:
    """Return local addresses (hex, as the kernel prints them) of this process's listening TCP sockets."""
    own = {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
