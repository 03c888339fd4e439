# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  (RPCs keep the names that the protocol gives them)
"""gRPC in and out for operators: epochs of the CA, and the workloads that services have announced."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any, Final

from cryptography.hazmat.primitives.serialization import Encoding

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.guard import CallerTable
from cloister.runtime.logging import get_logger
from cloister.runtime.server import Mounted
from cloister_attest.authority import Authority
from cloister_attest.ca import WorkloadCa
from cloister_attest.config import Kept
from cloister_attest.epochs import Epochs
from cloister_attest.identities import Callers
from cloister_attest.registry import Registry
from cloister_attest.users import Standing

_SERVICE: Final = "cloister.api.attest.v1.OperatorService"
_METHODS: Final = ("ListEpochs", "StartEpoch", "RetireEpoch", "ListWorkloads", "CloseWorkload")
OPERATOR_CALLERS: Final[CallerTable] = {f"/{_SERVICE}/{method}": frozenset({Role.USER}) for method in _METHODS}


class OperatorServicer(attest_pb2_grpc.OperatorServiceServicer):
    """Epochs and workloads."""

    def __init__(self, callers: Callers, ca: WorkloadCa, registry: Registry, *, kept: Kept) -> None:
        self._callers = callers
        self._ca = ca
        self._registry = registry
        self._kept = kept

    async def ListEpochs(self, _request: attest_pb2.ListEpochsRequest, _context: Any) -> attest_pb2.ListEpochsResponse:
        await self._callers.require(Standing.OPERATOR)
        told = self._ca.told
        return attest_pb2.ListEpochsResponse(
            epochs=self._to_wire(told.epochs),
            kept=str(self._kept),
            sequence=told.trust.sequence,
            trust_bundle_digest=told.bundle_digest,
            generation=0 if self._kept is Kept.MEMORY else told.epochs.generation,
        )

    async def StartEpoch(self, _request: attest_pb2.StartEpochRequest, _context: Any) -> attest_pb2.StartEpochResponse:
        by = await self._callers.require(Standing.OPERATOR)
        epochs = await self._ca.start()
        get_logger().warning("an operator began a CA epoch", operator=str(by.spiffe_id), epoch=epochs.trusted[0].epoch)
        return attest_pb2.StartEpochResponse(epoch=self._to_wire(epochs)[0])

    async def RetireEpoch(
        self, request: attest_pb2.RetireEpochRequest, _context: Any
    ) -> attest_pb2.RetireEpochResponse:
        by = await self._callers.require(Standing.OPERATOR)
        epochs = await self._ca.retire(request.epoch)
        get_logger().warning("an operator retired a CA epoch", operator=str(by.spiffe_id), epoch=request.epoch)
        issuing = next(found for found in self._to_wire(epochs) if found.state == attest_pb2.EPOCH_STATE_ISSUING)
        return attest_pb2.RetireEpochResponse(issuing=issuing)

    async def ListWorkloads(
        self, request: attest_pb2.ListWorkloadsRequest, _context: Any
    ) -> attest_pb2.ListWorkloadsResponse:
        await self._callers.require(Standing.OPERATOR)
        return attest_pb2.ListWorkloadsResponse(
            jobs=[
                attest_pb2.RegisteredJob(
                    job_id=job.job_id,
                    tenant=job.tenant,
                    world_size=job.world_size,
                    script_digest=job.script,
                    config_digest=job.config,
                    open=job.open,
                    registered_by=by.service,
                    registered_unix_ms=by.unix_ms,
                )
                for job, by in await self._registry.jobs(closed=request.closed)
            ],
            backends=[
                attest_pb2.RegisteredBackend(
                    tenant=backend.tenant,
                    model=backend.model,
                    backend_id=backend.backend,
                    script_digest=backend.script,
                    config_digest=backend.config,
                    open=backend.open,
                    registered_by=by.service,
                    registered_unix_ms=by.unix_ms,
                )
                for backend, by in await self._registry.backends(closed=request.closed)
            ],
        )

    async def CloseWorkload(
        self, request: attest_pb2.CloseWorkloadRequest, _context: Any
    ) -> attest_pb2.CloseWorkloadResponse:
        by = await self._callers.require(Standing.OPERATOR)
        match request.WhichOneof("workload"):
            case "job":
                await self._registry.close_job(request.job.job_id)
                closed = request.job.job_id
            case "backend":
                place = request.backend
                await self._registry.close_backend(place.tenant, place.model, place.backend_id)
                closed = f"{place.tenant}/{place.model}/{place.backend_id}"
            case _:
                raise CloisterError(
                    Code.ARGUMENT_INVALID, what="there is nothing to close", why="wanted a job or a backend"
                )
        get_logger().warning("an operator closed a workload", operator=str(by.spiffe_id), workload=closed)
        return attest_pb2.CloseWorkloadResponse()

    def _to_wire(self, epochs: Epochs) -> list[attest_pb2.Epoch]:
        """Return the trusted epochs, newest first."""
        found = []
        if epochs.announced is not None:
            announced = _epoch(epochs.announced.authority, attest_pb2.EPOCH_STATE_ANNOUNCED)
            announced.issues_unix_s = _unix(epochs.announced.issues_at)
            found.append(announced)
        issuing = _epoch(epochs.issuing, attest_pb2.EPOCH_STATE_ISSUING)
        issuing.ends_unix_s = _unix(epochs.issuing.started + self._ca.schedule.renew_after)
        found.append(issuing)
        for old in epochs.ending:
            ending = _epoch(old.authority, attest_pb2.EPOCH_STATE_ENDING)
            ending.ends_unix_s = _unix(old.ends_at)
            found.append(ending)
        return found


def operator_services(servicer: OperatorServicer) -> list[Mounted]:
    """Return what the mutual-TLS port serves operators; its callers are OPERATOR_CALLERS."""
    return [Mounted(_SERVICE, attest_pb2_grpc.add_OperatorServiceServicer_to_server, servicer)]


def _epoch(authority: Authority, state: attest_pb2.EpochState.ValueType) -> attest_pb2.Epoch:
    return attest_pb2.Epoch(
        epoch=authority.epoch,
        state=state,
        started_unix_s=_unix(authority.started),
        root_sha256=hashlib.sha256(authority.root.certificate.public_bytes(Encoding.DER)).digest(),
    )


def _unix(time: datetime) -> int:
    return int(time.timestamp())
