# SPDX-License-Identifier: Apache-2.0
"""A served model outlives the leases on its key as long as its owner lets it, and is down when the owner does not."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
from cloister.api.serving.v1 import serving_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from fakes.serving_stack import HANDLER, KEY_URI, Stack, running_stack, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="gateway and backend need a core each"),
]


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path / "state") as stack:
        await stack.start_gateway()
        yield stack


async def until_renewed(stack: Stack, times: int) -> None:
    """Follow the log until so many leases were renewed."""
    endpoint = stack.endpoints["keybroker"]["grpc"]
    credentials = stack.credentials
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=credentials) as channel, asyncio.timeout(60):
        method = keybroker_pb2_grpc.DecisionLogServiceStub(channel).ListDecisions
        request = keybroker_pb2.ListDecisionsRequest(key_uri=KEY_URI)
        renewed = 0
        while renewed < times:
            answer = await invoke(method, request, timeout_s=10, what="read the log")
            renewed = sum(decision.action == "renew" and decision.granted for decision in answer.decisions)
            await asyncio.sleep(0.1)


async def test_a_model_is_served_past_its_leases_until_its_key_is_disabled(stack: Stack) -> None:
    handler = HANDLER.read_bytes()
    await stack.create_key(handler, lease="5s")
    archive, _ = await stack.sealed_archive(tiny_model(), handler)
    await stack.deploy(archive)
    await until_renewed(stack, 2)
    assert (await stack.predict("good")).predictions
    await stack.owner.disable(KEY_URI)
    async with asyncio.timeout(30):
        while True:
            (model,) = (await stack.call("ModelService", "ListModels", serving_pb2.ListModelsRequest())).models
            if model.state != serving_pb2.MODEL_STATE_READY:
                break
            await asyncio.sleep(0.1)
    assert "key.state" in model.reason
    with pytest.raises(CloisterError) as caught:
        await stack.predict("good")
    assert caught.value.code is Code.BACKEND_DOWN
