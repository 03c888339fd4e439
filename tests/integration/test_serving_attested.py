# SPDX-License-Identifier: Apache-2.0
"""A sealed model, served by an attested backend: it answers, its plaintext is nowhere, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.api.serving.v1 import serving_pb2
from cloister.errors import CloisterError, Code
from cloister.tlv import sha384
from cloister_serving.pinning import cores_of_threads
from fakes.serving_stack import HANDLER, Stack, running_stack, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="gateway and backend need a core each"),
]


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with running_stack(tmp_path / "state") as stack:
        await stack.start_gateway()
        yield stack


def children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(10):
        while any(alive(pid) for pid in pids):
            await asyncio.sleep(0.02)


def places_of(marker: bytes, directory: Path, pids: list[int]) -> list[str]:
    """Files below the directory, and environments and arguments of the processes, that hold the bytes."""
    files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    files += [Path(f"/proc/{pid}/{what}") for pid in pids for what in ("environ", "cmdline") if alive(pid)]
    found = []
    for path in files:
        with contextlib.suppress(FileNotFoundError):
            if marker in path.read_bytes():
                found.append(str(path))
    return found


async def test_a_sealed_model_is_served_and_its_plaintext_is_nowhere(stack: Stack) -> None:
    handler, files = HANDLER.read_bytes(), tiny_model()
    await stack.create_key(handler)
    archive, data_key = await stack.sealed_archive(files, handler)
    model = await stack.deploy(archive)
    assert model.state == serving_pb2.MODEL_STATE_READY
    assert list(model.timings_s) != []
    assert {"unpacked", "measured", "enrolled", "key-released", "key-handed-over", "ready"} == set(model.timings_s)
    answer = await stack.predict("这家酒店很好", "bad " * 500)
    assert [one.label in {"negative", "positive"} for one in answer.predictions] == [True, True]
    assert all(0.5 <= one.probability <= 1 for one in answer.predictions)

    gateway, worker = stack.processes["gateway"].pid, model.backend_process_id
    (agent,) = children(gateway)
    assert children(agent) == [worker]
    assert set(cores_of_threads(gateway).values()) == {frozenset({0})}
    assert set(cores_of_threads(worker).values()) == {frozenset({1})}

    root, pids = stack.state.root, [gateway, agent, worker]
    markers = [files["model.safetensors"][-256:], files["vocab.txt"][:60], data_key, data_key.hex().encode()]
    assert [place for marker in markers for place in places_of(marker, root, pids)] == []
    # The scan finds what is there: the handler is in the clear.
    assert places_of(handler[:200], root, pids) != []

    os.kill(worker, signal.SIGKILL)
    await until_gone(worker, agent)
    with pytest.raises(CloisterError) as caught:
        await stack.predict("x")
    assert caught.value.code is Code.BACKEND_DOWN
    assert [place for marker in markers for place in places_of(marker, root, [gateway])] == []

    again = await stack.deploy(archive)
    os.kill(again.backend_process_id, signal.SIGSTOP)  # a worker that does not react is ended all the same
    await stack.call("ModelService", "RemoveModel", serving_pb2.RemoveModelRequest(name="reviews"))
    assert not alive(again.backend_process_id)
    assert children(gateway) == []
    left = [path for path in stack.state.service_directory("gateway").rglob("*") if path.is_file()]
    assert {path.name for path in left if "sqlite" not in path.name} == set()


async def test_a_gateway_that_was_killed_leaves_no_process_and_serves_again_after_its_restart(stack: Stack) -> None:
    handler = HANDLER.read_bytes()
    await stack.create_key(handler)
    archive, _ = await stack.sealed_archive(tiny_model(), handler)
    model = await stack.deploy(archive)
    before = await stack.predict("这家酒店很好")
    (agent,) = children(stack.processes["gateway"].pid)
    stack.stop("gateway", signal.SIGKILL)
    await until_gone(agent, model.backend_process_id)
    await stack.start_gateway()
    async with asyncio.timeout(60):
        while (await stack.call("ModelService", "ListModels", serving_pb2.ListModelsRequest())).models[0].state == (
            serving_pb2.MODEL_STATE_LOADING
        ):
            await asyncio.sleep(0.05)
    assert await stack.predict("这家酒店很好") == before
    pids = [*children(stack.processes["gateway"].pid), stack.processes["gateway"].pid]
    stack.stop("gateway", signal.SIGTERM)
    await until_gone(*pids)


async def test_a_key_that_the_policy_does_not_release_is_the_reason_the_user_reads(stack: Stack) -> None:
    handler = HANDLER.read_bytes()
    await stack.create_key(handler)
    other = handler + b"# another handler than the policy names\n"
    archive, _ = await stack.sealed_archive(tiny_model(), other)
    with pytest.raises(CloisterError) as caught:
        await stack.deploy(archive)
    assert caught.value.code is Code.RELEASE_DENIED
    assert "script" in caught.value.what
    listed = (await stack.call("ModelService", "ListModels", serving_pb2.ListModelsRequest())).models
    assert [model.state for model in listed] == [serving_pb2.MODEL_STATE_FAILED]
    assert children(stack.processes["gateway"].pid) == []

    training_only = "cloister-key://demo/models/training-only"
    await stack.create_key(handler, purposes=("train",), uri=training_only)
    archive, _ = await stack.sealed_archive(tiny_model(), handler, uri=training_only)
    with pytest.raises(CloisterError) as caught:
        await stack.deploy(archive)
    assert caught.value.code is Code.RELEASE_DENIED


async def test_an_archive_that_was_swapped_in_the_store_is_noticed(stack: Stack) -> None:
    handler = HANDLER.read_bytes()
    await stack.create_key(handler)
    archive, _ = await stack.sealed_archive(tiny_model(), handler)
    other, _ = await stack.sealed_archive(tiny_model(), handler)
    await stack.deploy(archive, "first")
    (stored,) = stack.state.service_directory("gateway").rglob("*.mar")
    stored.write_bytes(other)
    request = serving_pb2.DeployModelRequest(name="second", archive_digest=sha384(archive))
    with pytest.raises(CloisterError) as caught:
        await stack.call("ModelService", "DeployModel", request)
    assert caught.value.code is Code.ARCHIVE_INVALID
    assert "not the one that was uploaded" in caught.value.what


async def test_a_model_that_is_not_whole_says_which_file_it_lacks(stack: Stack) -> None:
    handler, files = HANDLER.read_bytes(), tiny_model()
    del files["vocab.txt"]
    await stack.create_key(handler)
    archive, _ = await stack.sealed_archive(files, handler)
    with pytest.raises(CloisterError) as caught:
        await stack.deploy(archive)
    assert caught.value.code is Code.MODEL_LOAD_FAILED
    assert "the model lacks vocab.txt" in caught.value.why
