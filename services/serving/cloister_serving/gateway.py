# SPDX-License-Identifier: Apache-2.0
"""The gateway's models: deploy, serve, notice the end, remove, and take up again after a restart.

What a user may see and do is decided in `router`; how a backend runs is `backend`'s; this holds them together. All of
it runs on one event loop; a deployment goes on when its caller leaves.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Protocol, TypeAlias

from cloister.data.archive import Archive
from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger
from cloister.tlv import sha384
from cloister_serving import router
from cloister_serving.backend import RunningBackend
from cloister_serving.router import ModelRecord, Prediction, State
from cloister_serving.store import ArchiveStore, ModelStore
from cloister_serving.worker import prediction_failed

_BACKEND_ID_BYTES: Final = 6


@dataclass(frozen=True, slots=True)
class Launch:
    """One backend about to start."""

    model: ModelRecord
    backend_id: str
    handler_name: str
    archive: Path
    directory: Path  # private; does not exist yet
    log: Path


# Makes a backend that is not started yet; the second argument is called when it ends unasked.
Launcher: TypeAlias = Callable[[Launch, Callable[[str], None]], RunningBackend]


class Registry(Protocol):
    """Where attest learns which measurements may become which backend."""

    async def register(self, launch: Launch, *, script_digest: bytes) -> None:
        """Announce a backend; raise CloisterError when attest refuses or is away."""

    async def close(self, launch: Launch) -> None:
        """Withdraw it; an attest that is away is no error, because the claim is worth nothing without the TD."""


@dataclass(slots=True)
class _Deployed:
    """A model and its backend."""

    record: ModelRecord
    launch: Launch | None = None
    backend: RunningBackend | None = None
    loading: asyncio.Task[None] | None = None
    error: CloisterError | None = None


class Gateway:
    """All deployed models of all tenants."""

    def __init__(
        self,
        *,
        models: ModelStore,
        archives: ArchiveStore,
        run_directory: Path,
        log_directory: Path,
        backend_cores: Sequence[int],
        launcher: Launcher,
        registry: Registry,
    ) -> None:
        self._models = models
        self.archives = archives
        self._run_directory = run_directory
        self._log_directory = log_directory
        self._backend_cores = tuple(backend_cores)
        self._launcher = launcher
        self._registry = registry
        self._deployed: dict[tuple[str, str], _Deployed] = {}
        self._changing = asyncio.Lock()  # admission and removal; never held while a model loads
        self._closing: set[asyncio.Task[None]] = set()

    def list(self, tenant: str) -> list[ModelRecord]:
        """Return the models of a tenant, by name."""
        found = [self._shown(one) for one in self._deployed.values() if one.record.tenant == tenant]
        return sorted(found, key=lambda record: record.name)

    async def deploy(
        self, *, tenant: str, owner: str, name: str, archive_digest: bytes, cores: Sequence[int]
    ) -> ModelRecord:
        """Return when the model answers; raise CloisterError with the reason when it does not."""
        async with self._changing:
            existing = self._deployed.get((tenant, name))
            router.check_deployment(name, archive_digest, existing.record if existing else None)
            archive = await asyncio.to_thread(self.archives.read, tenant, archive_digest)
            others = [one.record for one in self._deployed.values()]
            record = ModelRecord(
                tenant=tenant,
                name=name,
                owner=owner,
                archive_digest=archive_digest,
                cores=router.choose_cores(cores, backend_cores=self._backend_cores, models=others),
                created_unix_ms=time.time_ns() // 1_000_000,
            )
            await self._models.put(record)
            deployed = self._begin(record, archive)
        await asyncio.wait({_task_of(deployed)})
        if deployed.error is not None:
            raise deployed.error
        _task_of(deployed).result()  # an error of ours, for the guard to log
        return self._shown(deployed)

    async def remove(self, tenant: str, name: str) -> None:
        """Stop a model's backend and forget it, its archive too when no other model of the tenant uses it."""
        async with self._changing:
            deployed = self._deployed.pop((tenant, name), None)
            if deployed is None:
                raise router.not_found(name)
            await self._stop(deployed, "the model was removed")
            await self._models.delete(tenant, name)
            self._log_path(deployed.record).unlink(missing_ok=True)
            digest = deployed.record.archive_digest
            others = (one.record for one in self._deployed.values())
            if not any(other.tenant == tenant and other.archive_digest == digest for other in others):
                await asyncio.to_thread(self.archives.remove, tenant, digest)

    async def predict(
        self, tenant: str, name: str, texts: Sequence[str], *, request_id: str, deadline: float
    ) -> tuple[ModelRecord, tuple[Prediction, ...]]:
        """Answer texts with a tenant's model; the deadline is a time of the event loop."""
        deployed = self._deployed.get((tenant, name))
        record = router.route(deployed.record if deployed else None, name=name)
        router.check_texts(texts)
        backend = deployed.backend if deployed else None
        if backend is None:
            raise RuntimeError("a model that is ready has a backend")
        body = router.body_of(texts)
        answer = await backend.predict(body, request_id=request_id, deadline=deadline)
        try:
            return record, router.predictions_from(answer, count=len(texts))
        except ValueError as error:
            raise prediction_failed(str(error)) from None

    async def restore(self) -> None:
        """Deploy again what was deployed when the gateway last ended, and clear what it left behind."""
        await asyncio.to_thread(shutil.rmtree, self._run_directory, ignore_errors=True)
        records = await self._models.all()
        await asyncio.to_thread(self.archives.keep_only, [(one.tenant, one.archive_digest) for one in records])
        for record in records:
            fresh = replace(record, state=State.LOADING, reason="", process_id=0)
            try:
                archive = await asyncio.to_thread(self.archives.read, record.tenant, record.archive_digest)
                # The configuration may have changed since: cores that are gone cannot be given again.
                router.choose_cores(record.cores, backend_cores=self._backend_cores, models=())
            except CloisterError as error:
                failed = _Deployed(replace(fresh, state=State.FAILED, reason=_line(error)))
                self._deployed[record.key] = failed
                await self._models.put(failed.record)
                continue
            self._begin(fresh, archive)

    async def aclose(self) -> None:
        """Stop every backend; what is deployed stays on record for the next start."""
        async with self._changing:
            await asyncio.gather(*(self._stop(one, "the gateway is stopping") for one in self._deployed.values()))
            await asyncio.gather(*self._closing)
            self._deployed.clear()
            await asyncio.to_thread(shutil.rmtree, self._run_directory, ignore_errors=True)
            self._models.close()

    def _begin(self, record: ModelRecord, archive: Archive) -> _Deployed:
        backend_id = f"b{secrets.token_hex(_BACKEND_ID_BYTES)}"
        launch = Launch(
            model=record,
            backend_id=backend_id,
            handler_name=archive.handler_name,
            archive=self.archives.path(record.tenant, record.archive_digest),
            directory=self._run_directory / backend_id,
            log=self._log_path(record),
        )
        deployed = _Deployed(record, launch)
        self._deployed[record.key] = deployed
        deployed.loading = asyncio.create_task(self._load(deployed, launch, sha384(archive.handler_source)))
        return deployed

    async def _load(self, deployed: _Deployed, launch: Launch, script_digest: bytes) -> None:
        try:
            await self._registry.register(launch, script_digest=script_digest)
            deployed.backend = self._launcher(launch, lambda reason: self._went_down(deployed, reason))
            await deployed.backend.start()
            if deployed.record.state is State.LOADING:  # it may have ended between its answer and here
                deployed.record = replace(deployed.record, state=State.READY)
        except CloisterError as error:
            deployed.error = error
            deployed.record = replace(deployed.record, state=State.FAILED, reason=_line(error))
            await self._end_backend(deployed)
        finally:
            if deployed.record.state is State.LOADING:  # cancelled, or an error of ours: never half deployed
                deployed.record = replace(deployed.record, state=State.FAILED, reason="the deployment was interrupted")
                await self._end_backend(deployed)
        get_logger().info(
            "model deployed" if deployed.error is None else "model failed",
            model=launch.model.name,
            tenant=launch.model.tenant,
            backend=launch.backend_id,
            reason=deployed.record.reason,
            timings_s=deployed.backend.timings_s if deployed.backend else {},
        )
        if self._deployed.get(deployed.record.key) is deployed:
            await self._models.put(deployed.record)

    def _went_down(self, deployed: _Deployed, reason: str) -> None:
        """A ready backend ended: say so at once, clean up behind."""
        get_logger().warning("backend down", model=deployed.record.name, tenant=deployed.record.tenant, reason=reason)
        deployed.record = replace(deployed.record, state=State.FAILED, reason=reason)
        task = asyncio.get_running_loop().create_task(self._after_down(deployed))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _after_down(self, deployed: _Deployed) -> None:
        await self._end_backend(deployed)
        if self._deployed.get(deployed.record.key) is deployed:
            await self._models.put(deployed.record)

    async def _stop(self, deployed: _Deployed, reason: str) -> None:
        deployed.record = replace(deployed.record, state=State.FAILED, reason=reason)
        if deployed.loading is not None and not deployed.loading.done():
            deployed.error = CloisterError(
                Code.MODEL_LOAD_FAILED,
                what=f"the model {deployed.record.name} was not deployed",
                why=reason,
                todo="deploy it again",
            )
            deployed.loading.cancel()
            await asyncio.wait({deployed.loading})
        await self._end_backend(deployed)

    async def _end_backend(self, deployed: _Deployed) -> None:
        if deployed.backend is not None:
            await deployed.backend.stop()
        if deployed.launch is not None:
            launch, deployed.launch = deployed.launch, None
            await self._registry.close(launch)

    def _log_path(self, record: ModelRecord) -> Path:
        # Neither name holds a dot, so two models never share a file.
        return self._log_directory / f"{record.tenant}.{record.name}.log"

    @staticmethod
    def _shown(deployed: _Deployed) -> ModelRecord:
        backend = deployed.backend
        if backend is None:
            return deployed.record
        process = backend.process_id if deployed.record.state is State.READY else 0
        return replace(deployed.record, process_id=process, timings_s=backend.timings_s)


def _task_of(deployed: _Deployed) -> asyncio.Task[None]:
    if deployed.loading is None:
        raise RuntimeError("a deployment that began has a task")
    return deployed.loading


def _line(error: CloisterError) -> str:
    return f"{error.code.text}: {error.what}" + (f"; {error.why}" if error.why else "")
