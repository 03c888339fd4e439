# SPDX-License-Identifier: Apache-2.0
"""A back end that fails is noticed before a release is: in health, in the metric, in what operators see."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import prometheus_client
import pytest
from grpc_health.v1 import health_pb2

from cloister.runtime.health import HealthState
from cloister.secret import SecretBytes
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.backends.remote import RemoteBackend
from cloister_keybroker.backends.watch import BackendWatch, backend_gauge
from cloister_keybroker.rootkey import RootKey
from fakes.custodian_in_memory import MemoryCustodian, Moments

RELEASES = "cloister.api.keybroker.v1.KeyReleaseService"


class Watched:
    """An embedded back end and one behind a custodian, watched."""

    def __init__(self, directory: Path) -> None:
        root = RootKey(SecretBytes(secrets.token_bytes(32)))
        self.custodian = MemoryCustodian()
        remote = RemoteBackend(self.custodian, root, clock=Moments(), canary_file=directory / "canary")
        self.registry, self.told = prometheus_client.CollectorRegistry(), list[bool]()
        self.watch = BackendWatch(
            [remote, EmbeddedBackend(root)], on_change=self._changed, gauge=backend_gauge(self.registry)
        )

    async def _changed(self, well: bool) -> None:
        self.told.append(well)

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value("cloister_keybroker_backend_healthy", {"backend": name})


async def test_a_failed_canary_is_told_once_and_so_is_its_recovery(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    assert await watched.watch.look()
    watched.custodian.away = True
    assert not await watched.watch.look()
    assert not await watched.watch.look()
    memory, embedded = watched.watch.statuses
    assert (memory.name, memory.healthy, embedded.healthy) == ("memory", False, True)
    assert "CLO-1340" in memory.problem
    assert (watched.metric("memory"), watched.metric("embedded")) == (0.0, 1.0)
    watched.custodian.away = False
    assert await watched.watch.look()
    assert watched.watch.statuses[0].problem == ""
    assert watched.metric("memory") == 1.0
    assert watched.told == [True, False, True]


async def test_a_custodian_that_lost_its_keys_is_not_healthy_though_it_answers(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    await watched.watch.look()
    watched.custodian.keys.clear()
    assert not await watched.watch.look()
    assert "CLO-1342" in watched.watch.statuses[0].problem


async def test_nothing_is_claimed_before_the_first_look(tmp_path: Path) -> None:
    assert Watched(tmp_path).watch.statuses == []


async def test_it_keeps_looking_until_it_is_cancelled(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    looked = asyncio.Event()

    async def changed(_well: bool) -> None:
        looked.set()

    watched.watch._on_change = changed
    task = asyncio.ensure_future(watched.watch.keep_looking())
    await looked.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert task.cancelled()


async def test_one_service_can_be_unable_while_the_process_serves() -> None:
    health = HealthState()

    def shown(name: str) -> int:
        return int(health.servicer._server_status[name])

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    await health.set_able(RELEASES, False)  # found out before the process serves
    await health.set_serving(True, [RELEASES, "other"])
    assert [shown(name) for name in ("", "other", RELEASES)] == [serving, serving, not_serving]
    await health.set_able(RELEASES, True)
    assert shown(RELEASES) == serving
    await health.set_serving(False)
    await health.set_able(RELEASES, True)
    assert [shown(name) for name in ("", "other", RELEASES)] == [not_serving] * 3


async def test_an_error_of_the_code_is_no_problem_of_a_back_end(tmp_path: Path) -> None:
    """What is no CloisterError ends the watch, loudly, instead of passing for an outage."""

    class Broken(MemoryCustodian):
        async def probe(self) -> None:
            raise ZeroDivisionError

    watched = Watched(tmp_path)
    broken = RemoteBackend(
        Broken(), RootKey(SecretBytes(b"\x01" * 32)), clock=Moments(), canary_file=tmp_path / "canary-2"
    )
    watched.watch._backends = [broken]
    with pytest.raises(ZeroDivisionError):
        await watched.watch.look()
