# SPDX-License-Identifier: Apache-2.0
"""The handler of text classifiers in the stock worker, with the test as its agent."""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter
from cloister.train.classifier import load_classifier
from cloister_serving.keysocket import KeySocket, key_message
from cloister_serving.stockworker import KEY_SOCKET_NAME, ProcessIdentity
from fakes.serving_archives import data_key
from fakes.serving_harness import StartedWorker, running_worker
from fakes.serving_stack import HANDLER, tiny_model


def seal(directory: Path, files: dict[str, bytes], key: DataKey, version: int = 1) -> bytes:
    """Return the manifest's digest."""
    writer = SealedDirectoryWriter(directory, data_key=key, dataset="model", version=version)
    for name, content in files.items():
        writer.add(name, content)
    writer.finish()
    return SealedDirectory.peek(directory).manifest_digest


async def serve(
    stack: AsyncExitStack, directory: Path, *, sealed: Path, key: DataKey, manifest: bytes
) -> StartedWorker:
    """Start the worker and hand it the key; raise what its load raises."""
    directory.mkdir(mode=0o700)
    key_socket = KeySocket(directory, KEY_SOCKET_NAME)
    stack.callback(key_socket.close)
    started = await stack.enter_async_context(running_worker(directory, HANDLER.read_bytes(), loaded=False))
    message = key_message(
        data_key=key.secret,
        wrapped=key.wrapped,
        key_uri=key.key_uri,
        key_version=key.key_version,
        manifest=manifest,
    )
    handing = asyncio.create_task(key_socket.hand_out(ProcessIdentity.of(started.process.pid), message))
    stack.callback(handing.cancel)
    await started.worker.load(name="m", path=str(sealed), handler="handler_under_test.py", timeout_s=60)
    return started


async def predict(started: StartedWorker, texts: list[str]) -> list[dict[str, Any]]:
    deadline = asyncio.get_running_loop().time() + 30
    body = json.dumps({"texts": texts}).encode()
    found: list[dict[str, Any]] = json.loads(await started.worker.predict(body, request_id="r", deadline=deadline))
    return found


async def reason(started: StartedWorker) -> str:
    await started.process.wait()
    async with asyncio.timeout(5):
        while not started.tail.last_exception():
            await asyncio.sleep(0.01)
    return started.tail.last_exception()


async def test_the_handler_answers_what_the_model_answers_in_the_order_of_the_texts(tmp_path: Path) -> None:
    key, files = data_key(), tiny_model()
    manifest = seal(tmp_path / "sealed", files, key)
    texts = [f"{'这家酒店很好' * (i % 7)} good {'bad ' * (i % 50)}" for i in range(80)]
    async with AsyncExitStack() as stack:
        started = await serve(stack, tmp_path / "run", sealed=tmp_path / "sealed", key=key, manifest=manifest)
        found = await predict(started, texts)
        assert list((tmp_path / "run").glob(KEY_SOCKET_NAME)) == []
    expected = load_classifier(files).predict(texts)
    assert [one["label"] for one in found] == [label for label, _ in expected]
    assert [one["probability"] for one in found] == pytest.approx([value for _, value in expected], abs=1e-5)


async def test_a_model_of_another_manifest_under_the_same_key_is_not_opened(tmp_path: Path) -> None:
    key, files = data_key(), tiny_model()
    measured = seal(tmp_path / "measured", files, key, version=2)
    seal(tmp_path / "older", files, key, version=1)
    async with AsyncExitStack() as stack:
        with pytest.raises(CloisterError) as caught:
            await serve(stack, tmp_path / "run", sealed=tmp_path / "older", key=key, manifest=measured)
        assert caught.value.code is Code.MODEL_LOAD_FAILED


async def test_a_worker_without_the_right_key_opens_nothing(tmp_path: Path) -> None:
    manifest = seal(tmp_path / "sealed", tiny_model(), data_key())
    async with AsyncExitStack() as stack:
        with pytest.raises(CloisterError) as caught:
            await serve(stack, tmp_path / "run", sealed=tmp_path / "sealed", key=data_key(), manifest=manifest)
        assert caught.value.code is Code.MODEL_LOAD_FAILED


async def test_a_worker_that_the_agent_denies_says_so(tmp_path: Path) -> None:
    seal(tmp_path / "sealed", tiny_model(), data_key())
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    key_socket = KeySocket(directory, KEY_SOCKET_NAME)
    async with running_worker(directory, HANDLER.read_bytes(), loaded=False) as started:
        somebody_else = ProcessIdentity(pid=1, start_time=0, uid=0)
        key = data_key()
        message = key_message(data_key=key.secret, wrapped=b"w", key_uri=key.key_uri, key_version=1, manifest=bytes(48))
        handing = asyncio.create_task(key_socket.hand_out(somebody_else, message))
        with pytest.raises(CloisterError):
            await started.worker.load(
                name="m", path=str(tmp_path / "sealed"), handler="handler_under_test.py", timeout_s=60
            )
        assert await reason(started) == "RuntimeError: the agent did not give this process the model's key"
        handing.cancel()
