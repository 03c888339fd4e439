# SPDX-License-Identifier: Apache-2.0
"""The gate: every service of the broker's protocol but one is shut until it is opened, and shut again at once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.errors import CloisterError, Code
from cloister.runtime.server import Mounted
from cloister_keybroker.gate import BROKER_SERVICE, Gate

KEYS = "cloister.api.keybroker.v1.KeyOwnerService"
LOG = "cloister.api.keybroker.v1.DecisionLogService"


class Keys:
    def __init__(self) -> None:
        self.release = asyncio.Event()

    async def GetKey(self, request: Any, context: Any) -> str:
        await self.release.wait()
        return f"{request} {context}"


class Log:
    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def FollowDecisions(self, request: Any, context: Any) -> AsyncIterator[int]:
        try:
            for number in (1, 2):
                yield number
            await asyncio.Event().wait()
        finally:
            self.ended.set()

    async def ExportLog(self, request: Any, context: Any) -> AsyncIterator[int]:
        for number in (1, 2, 3):
            yield number


def stand_ins(gate: Gate) -> dict[str, Any]:
    return {mounted.descriptor: mounted.servicer for mounted in gate.mounted()}


def opened(gate: Gate) -> tuple[Keys, Log]:
    keys, log = Keys(), Log()
    gate.open([Mounted(KEYS, lambda *_: None, keys), Mounted(LOG, lambda *_: None, log)])
    return keys, log


def test_every_service_of_the_protocol_is_behind_it_but_the_one_that_opens_it() -> None:
    everything = {service.full_name for service in pb.DESCRIPTOR.services_by_name.values()}
    assert set(Gate().names) == everything - {BROKER_SERVICE}
    for name, servicer in stand_ins(Gate()).items():
        for method in pb.DESCRIPTOR.services_by_name[name.rpartition(".")[2]].methods:
            is_stream = inspect.isasyncgenfunction(getattr(servicer, method.name))
            assert is_stream == method.server_streaming, method.full_name


async def test_a_shut_gate_answers_nothing_and_says_why() -> None:
    gate = Gate()
    for name, servicer in stand_ins(gate).items():
        for method in pb.DESCRIPTOR.services_by_name[name.rpartition(".")[2]].methods:
            call = getattr(servicer, method.name)(None, None)
            with pytest.raises(CloisterError) as caught:
                await (anext(call) if method.server_streaming else call)
            assert caught.value.code is Code.BROKER_SEALED
    await gate.shut("nobody has given it its root key")
    with pytest.raises(CloisterError) as caught:
        await stand_ins(gate)[KEYS].GetKey(None, None)
    assert caught.value.why == "nobody has given it its root key"


async def test_an_open_gate_lets_calls_through_to_what_was_opened_only() -> None:
    gate = Gate()
    services = stand_ins(gate)
    keys, _ = opened(gate)
    keys.release.set()
    assert await services[KEYS].GetKey("question", "context") == "question context"
    assert [number async for number in services[LOG].ExportLog("question", "context")] == [1, 2, 3]
    with pytest.raises(CloisterError) as caught:
        await services["cloister.api.keybroker.v1.KeyReleaseService"].Release(None, None)
    assert caught.value.code is Code.BROKER_SEALED


async def test_shutting_waits_for_calls_in_flight_and_ends_streams() -> None:
    gate = Gate()
    services = stand_ins(gate)
    keys, log = opened(gate)
    stream = services[LOG].FollowDecisions(None, None)
    assert [await anext(stream), await anext(stream)] == [1, 2]
    waiting = asyncio.ensure_future(anext(stream))
    call = asyncio.ensure_future(services[KEYS].GetKey("question", "context"))
    await asyncio.sleep(0)
    shutting = asyncio.ensure_future(gate.shut("an operator sealed it"))
    with pytest.raises(CloisterError) as caught:
        await waiting
    assert (caught.value.code, caught.value.why) == (Code.BROKER_SEALED, "an operator sealed it")
    assert log.ended.is_set()
    assert not shutting.done()
    keys.release.set()
    assert await call == "question context"
    await shutting
    with pytest.raises(CloisterError):
        await services[KEYS].GetKey("question", "context")


async def test_a_stream_that_nobody_reads_any_more_does_not_hold_the_gate() -> None:
    gate = Gate()
    stream = stand_ins(gate)[LOG].FollowDecisions(None, None)
    _, log = opened(gate)
    assert await anext(stream) == 1
    await stream.aclose()
    await asyncio.wait_for(gate.shut("an operator sealed it"), 1)
    assert log.ended.is_set()
