# SPDX-License-Identifier: Apache-2.0
"""A gateway with real stock workers but without attestation: its backends need no key, and its registry is a list."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloister.data.archive import read_archive
from cloister.errors import CloisterError, Code
from cloister_serving import stockworker
from cloister_serving.gateway import Gateway, Launch
from cloister_serving.store import ArchiveStore, ModelStore
from cloister_serving.worker import Worker
from fakes.serving_archives import good_entries, packed

# Labels by length; some texts are orders.
CLASSIFIER = b"""
import json, os

class Classifier:
    def initialize(self, context):
        if os.path.exists(os.path.join(context.system_properties["model_dir"], "refuse-to-load")):
            raise ValueError("told not to load")

    def handle(self, data, context):
        return [self.one(json.loads(bytes(request["body"]))["texts"]) for request in data]

    def one(self, texts):
        if "raise" in texts:
            raise ValueError("a secret of the request")
        if "nonsense" in texts:
            return "nonsense"
        for text in texts:
            if text.startswith("wait:"):
                open(text[5:] + ".started", "w").close()
                open(text[5:]).read()
        return json.dumps([{"label": "long" if len(t) > 10 else "short", "probability": 0.75} for t in texts])
"""


class WorkerBackend:
    """A stock worker without an agent."""

    def __init__(self, launch: Launch, on_down: Callable[[str], None]) -> None:
        self._launch, self._on_down = launch, on_down
        self.process: asyncio.subprocess.Process | None = None
        self.worker: Worker | None = None
        self.timings_s = {"ready": 0.0}
        self._stopping = False

    @property
    def process_id(self) -> int:
        return self.process.pid if self.process else 0

    async def start(self) -> None:
        directory = self._launch.directory
        directory.mkdir(parents=True, mode=0o700)
        with self._launch.archive.open("rb") as file:
            archive = read_archive(file)
        handler = stockworker.handler_memfd(archive.handler_name, archive.handler_source)
        self.process = await stockworker.start(directory, handler_fd=handler, cores=os.sched_getaffinity(0), threads=1)
        os.close(handler)
        assert self.process.stdout is not None
        self._draining = asyncio.create_task(stockworker.OutputTail().drain(self.process.stdout))
        self.worker = await Worker.connect(
            directory, stockworker.SOCKET_NAME, pid=self.process.pid, timeout_s=60, on_down=self._down
        )
        await self.worker.load(name="m", path=str(directory), handler=archive.handler_name, timeout_s=60)

    async def predict(self, body: bytes, *, request_id: str, deadline: float) -> bytes:
        assert self.worker is not None
        return await self.worker.predict(body, request_id=request_id, deadline=deadline)

    async def stop(self) -> None:
        self._stopping = True
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            await self._draining

    def _down(self, reason: str) -> None:
        if not self._stopping:
            self._on_down(reason)


@dataclass
class ListRegistry:
    """What was announced to attest and not withdrawn."""

    open: dict[str, bytes] = field(default_factory=dict)
    refuse: bool = False

    async def register(self, launch: Launch, *, script_digest: bytes) -> None:
        if self.refuse:
            raise CloisterError(Code.UNREACHABLE, what="could not register the backend", why="attest is away")
        self.open[launch.backend_id] = script_digest

    async def close(self, launch: Launch) -> None:
        self.open.pop(launch.backend_id, None)


@dataclass
class StartedGateway:
    gateway: Gateway
    registry: ListRegistry
    backends: list[WorkerBackend]
    directory: Path

    async def upload(self, tenant: str = "hospital-a", source: bytes = CLASSIFIER) -> bytes:
        digest, _ = await self.gateway.archives.receive(tenant, chunks(archive_bytes(source)))
        return digest

    async def deploy(self, name: str = "reviews", *, tenant: str = "hospital-a", source: bytes = CLASSIFIER) -> None:
        digest = await self.upload(tenant, source)
        await self.gateway.deploy(tenant=tenant, owner=f"{tenant}'s", name=name, archive_digest=digest, cores=())


def archive_bytes(source: bytes = CLASSIFIER) -> bytes:
    return packed(good_entries() | {"h.py": source}).getvalue()


async def chunks(data: bytes, size: int = 1 << 20) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@contextlib.asynccontextmanager
async def running_gateway(directory: Path, backend_cores: Sequence[int] = (1,)) -> AsyncIterator[StartedGateway]:
    """A gateway over a directory; what an earlier one left there is taken up."""
    backends: list[WorkerBackend] = []

    def launch(about: Launch, on_down: Callable[[str], None]) -> WorkerBackend:
        backends.append(WorkerBackend(about, on_down))
        return backends[-1]

    registry = ListRegistry()
    gateway = Gateway(
        models=ModelStore(directory / "models.sqlite"),
        archives=ArchiveStore(directory / "archives"),
        run_directory=directory / "run",
        log_directory=directory / "logs",
        backend_cores=backend_cores,
        launcher=launch,
        registry=registry,
    )
    try:
        await gateway.restore()
        yield StartedGateway(gateway, registry, backends, directory)
    finally:
        await gateway.aclose()
