# SPDX-License-Identifier: Apache-2.0
"""The gateway with real workers: deploy, predict, lose a worker, restart, remove; each tenant for itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.tlv import sha384
from cloister_serving.router import Prediction, State
from fakes.serving_gateway import CLASSIFIER, StartedGateway, archive_bytes, chunks, running_gateway

BROKEN = b"class H:\n  def initialize(self, c): raise ValueError('x')\n  def handle(self, d, c): pass\n"


@pytest.fixture
async def started(tmp_path: Path) -> AsyncIterator[StartedGateway]:
    async with running_gateway(tmp_path) as started:
        yield started


async def predict(started: StartedGateway, texts: Sequence[str], *, tenant: str = "hospital-a") -> list[Prediction]:
    deadline = asyncio.get_running_loop().time() + 30
    _, found = await started.gateway.predict(tenant, "reviews", texts, request_id="r", deadline=deadline)
    return list(found)


async def code_of_prediction(started: StartedGateway, *texts: str, tenant: str = "hospital-a") -> Code:
    with pytest.raises(CloisterError) as caught:
        await predict(started, texts, tenant=tenant)
    assert "secret" not in str(caught.value)
    return caught.value.code


async def test_a_deployed_model_answers_its_tenant_alone(started: StartedGateway) -> None:
    await started.deploy()
    assert await predict(started, ["好", "a long text indeed"]) == [Prediction("short", 0.75), Prediction("long", 0.75)]
    assert await code_of_prediction(started, "a", tenant="hospital-b") is Code.MODEL_NOT_FOUND
    (model,) = started.gateway.list("hospital-a")
    assert (model.state, model.cores, model.process_id) == (State.READY, (1,), started.backends[0].process_id)
    assert started.gateway.list("hospital-b") == []
    with pytest.raises(CloisterError) as caught:
        await started.gateway.remove("hospital-b", "reviews")
    assert caught.value.code is Code.MODEL_NOT_FOUND
    assert list(started.registry.open.values()) == [sha384(CLASSIFIER)]


async def test_a_handlers_failure_is_one_requests_failure(started: StartedGateway) -> None:
    await started.deploy()
    assert await code_of_prediction(started, "raise") is Code.PREDICTION_FAILED
    assert await code_of_prediction(started, "nonsense") is Code.PREDICTION_FAILED
    assert await code_of_prediction(started, "") is Code.ARGUMENT_INVALID
    assert len(await predict(started, ["a"])) == 1


async def test_a_killed_worker_makes_the_model_unavailable_at_once_and_it_can_be_deployed_again(
    started: StartedGateway,
) -> None:
    await started.deploy()
    fifo = started.directory / "fifo"
    os.mkfifo(fifo)
    running = asyncio.create_task(code_of_prediction(started, f"wait:{fifo}"))
    while not Path(f"{fifo}.started").exists():
        await asyncio.sleep(0.01)
    os.kill(started.backends[0].process_id, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert await running is Code.BACKEND_DOWN
        assert await code_of_prediction(started, "a") is Code.BACKEND_DOWN
        while started.registry.open:
            await asyncio.sleep(0.01)
    (model,) = started.gateway.list("hospital-a")
    assert (model.state, model.reason, model.process_id) == (State.FAILED, "the worker ended", 0)
    await started.deploy()
    assert len(await predict(started, ["a"])) == 1


async def test_a_model_that_does_not_load_says_so_and_stays_listed_with_the_reason(started: StartedGateway) -> None:
    with pytest.raises(CloisterError) as caught:
        await started.deploy(source=BROKEN)
    assert caught.value.code is Code.MODEL_LOAD_FAILED
    (model,) = started.gateway.list("hospital-a")
    assert model.state is State.FAILED
    assert "CLO-1603" in model.reason
    assert started.registry.open == {}


async def test_a_name_in_use_is_not_taken_twice(started: StartedGateway) -> None:
    digest = await started.upload()
    arguments = {"tenant": "hospital-a", "owner": "o", "name": "reviews", "archive_digest": digest, "cores": ()}
    outcomes = await asyncio.gather(*(started.gateway.deploy(**arguments) for _ in range(2)), return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, CloisterError)]
    assert [error.code for error in refused] == [Code.MODEL_EXISTS]
    assert len(started.backends) == 1


async def test_attest_away_is_the_reason_a_deployment_fails(started: StartedGateway) -> None:
    started.registry.refuse = True
    with pytest.raises(CloisterError) as caught:
        await started.deploy()
    assert caught.value.code is Code.UNREACHABLE
    assert started.backends == []


async def test_a_deployment_goes_on_when_its_caller_leaves(started: StartedGateway) -> None:
    leaving = asyncio.create_task(started.deploy())
    while not started.gateway.list("hospital-a"):
        await asyncio.sleep(0.01)
    leaving.cancel()
    await asyncio.wait({leaving})
    async with asyncio.timeout(60):
        while started.gateway.list("hospital-a")[0].state is State.LOADING:
            await asyncio.sleep(0.02)
    assert len(await predict(started, ["a"])) == 1


async def test_removing_a_model_ends_its_worker_and_leaves_no_file(started: StartedGateway) -> None:
    await started.deploy()
    process = started.backends[0].process
    await started.gateway.remove("hospital-a", "reviews")
    assert process is not None
    assert process.returncode == -signal.SIGKILL
    assert await code_of_prediction(started, "a") is Code.MODEL_NOT_FOUND
    assert list((started.directory / "archives").iterdir()) == []
    assert started.registry.open == {}


async def test_removing_a_model_while_it_loads_ends_the_deployment(started: StartedGateway) -> None:
    deploying = asyncio.create_task(started.deploy())
    while not (started.backends and started.backends[0].process_id):
        await asyncio.sleep(0.01)
    await started.gateway.remove("hospital-a", "reviews")
    with pytest.raises(CloisterError) as caught:
        await deploying
    assert caught.value.code is Code.MODEL_LOAD_FAILED
    assert "removed" in caught.value.why
    assert started.gateway.list("hospital-a") == []


async def test_removing_one_of_two_models_of_an_archive_keeps_the_archive(started: StartedGateway) -> None:
    await asyncio.gather(started.deploy("reviews"), started.deploy("other"))
    await started.gateway.remove("hospital-a", "other")
    assert len(await predict(started, ["a"])) == 1
    assert len(list((started.directory / "archives").rglob("*.mar"))) == 1


async def test_a_gateway_that_starts_again_serves_what_it_served(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as first:
        await first.deploy()
        orphan = await first.upload("hospital-b", CLASSIFIER + b"# never deployed")
        (tmp_path / "run" / "left-behind").mkdir(parents=True)
    async with running_gateway(tmp_path) as second:
        assert not (tmp_path / "run" / "left-behind").exists()
        assert not second.gateway.archives.path("hospital-b", orphan).exists()
        async with asyncio.timeout(60):
            while second.gateway.list("hospital-a")[0].state is State.LOADING:
                await asyncio.sleep(0.02)
        assert len(await predict(second, ["a"])) == 1


async def test_a_gateway_that_starts_on_other_cores_says_which_model_it_cannot_place(tmp_path: Path) -> None:
    async with running_gateway(tmp_path) as first:
        await first.deploy()
    async with running_gateway(tmp_path, backend_cores=(0,)) as second:
        (model,) = second.gateway.list("hospital-a")
        assert model.state is State.FAILED
        assert "core 1 is not a backend core" in model.reason


async def test_an_upload_is_named_by_its_digest_and_another_tenant_does_not_have_it(started: StartedGateway) -> None:
    data = archive_bytes()
    digest, size = await started.gateway.archives.receive("hospital-a", chunks(data, 1000))
    assert (digest, size) == (sha384(data), len(data))
    with pytest.raises(CloisterError) as caught:
        await started.gateway.deploy(tenant="hospital-b", owner="o", name="m", archive_digest=digest, cores=())
    assert caught.value.code is Code.FILE_NOT_FOUND


@pytest.mark.parametrize(
    ("data", "size", "code"),
    [
        (b"not an archive", 100, Code.ARCHIVE_INVALID),
        (b"", 100, Code.ARCHIVE_INVALID),
        (bytes(2 << 20), 2 << 20, Code.MESSAGE_TOO_LARGE),
    ],
)
async def test_an_upload_that_cannot_be_served_leaves_nothing(
    started: StartedGateway, data: bytes, size: int, code: Code
) -> None:
    with pytest.raises(CloisterError) as caught:
        await started.gateway.archives.receive("hospital-a", chunks(data, size))
    assert caught.value.code is code
    assert [path for path in (started.directory / "archives").rglob("*") if path.is_file()] == []


async def test_an_upload_that_breaks_off_leaves_nothing(started: StartedGateway) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield archive_bytes()[:100]
        raise ConnectionError

    with pytest.raises((ConnectionError, CloisterError)):
        await started.gateway.archives.receive("hospital-a", broken())
    assert [path for path in (started.directory / "archives").rglob("*") if path.is_file()] == []
