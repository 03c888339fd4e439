# SPDX-License-Identifier: Apache-2.0
"""A job outlives the leases on its keys as long as the owner lets it, and ends when the owner does not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
from cloister.data.sample import generate_sample
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel
from fakes.signing import OWNER_KEY
from fakes.trainer_harness import Stack, client_of, pb, phase, running_stack, spec

ENDLESS = """
import time
while True:
    time.sleep(0.05)
"""


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as found:
        yield found


async def renewals(stack: Stack, key_uri: str) -> int:
    """Return how many renewals of leases on a key were granted."""
    credentials = await asyncio.to_thread(stack.user)
    async with open_channel(stack.endpoint("keybroker"), role=Role.KEYBROKER, credentials=credentials) as channel:
        answer = await invoke(
            keybroker_pb2_grpc.DecisionLogServiceStub(channel).ListDecisions,
            keybroker_pb2.ListDecisionsRequest(key_uri=key_uri),
            timeout_s=10,
            what="read the log",
        )
    return sum(decision.action == "renew" and decision.granted for decision in answer.decisions)


async def test_a_job_runs_past_its_leases_until_its_key_is_disabled(stack: Stack, tmp_path: Path) -> None:
    generate_sample(tmp_path / "data", rows=24)
    data = await asyncio.to_thread(stack.provision, tmp_path / "data", scripts=[ENDLESS.encode()], lease="5s")
    async with client_of(stack) as client:
        job = await client.submit(spec(ENDLESS, inputs=[data.input()]))
        await client.until(job.job_id, phase("running"))
        async with asyncio.timeout(30):
            while await renewals(stack, data.data_uri) < 2:
                await asyncio.sleep(0.1)
        endpoint = stack.endpoint("keybroker")
        owner = OwnerKeyClient(await asyncio.to_thread(stack.user), endpoint, signing_key=OWNER_KEY)
        await owner.disable(data.data_uri)
        async with asyncio.timeout(30):
            ended, _ = await client.to_the_end(job.job_id)
    assert ended.state == pb.JOB_STATE_FAILED
    assert "was not renewed" in ended.reason
    assert "key.state" in ended.reason
