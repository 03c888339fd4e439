# SPDX-License-Identifier: Apache-2.0
"""gRPC in and out: InferenceService for apps, ModelService for model owners. The tenant is the caller's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

from cloister.api.serving.v1 import serving_pb2, serving_pb2_grpc
from cloister.identity import Role
from cloister.runtime.caller import current_caller, current_request_id
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister_serving.gateway import Gateway
from cloister_serving.router import ModelRecord, State

INFERENCE: Final = "cloister.api.serving.v1.InferenceService"
MODELS: Final = "cloister.api.serving.v1.ModelService"
DEFAULT_DEADLINE_S: Final = 30.0  # of a prediction whose caller names none
_USERS: Final = frozenset({Role.USER})
CALLERS: Final[CallerTable] = {
    f"/{INFERENCE}/Predict": _USERS,
    f"/{MODELS}/UploadArchive": _USERS,
    f"/{MODELS}/DeployModel": _USERS,
    f"/{MODELS}/ListModels": _USERS,
    f"/{MODELS}/RemoveModel": _USERS,
}
_STATES: Final = {
    State.LOADING: serving_pb2.MODEL_STATE_LOADING,
    State.READY: serving_pb2.MODEL_STATE_READY,
    State.FAILED: serving_pb2.MODEL_STATE_FAILED,
}


class InferenceServicer(serving_pb2_grpc.InferenceServiceServicer):
    """What apps call."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def Predict(  # noqa: N802
        self, request: serving_pb2.PredictRequest, context: Any
    ) -> serving_pb2.PredictResponse:
        remaining = context.time_remaining()
        deadline = asyncio.get_running_loop().time() + (DEFAULT_DEADLINE_S if remaining is None else remaining)
        model, predictions = await self._gateway.predict(
            current_caller().spiffe_id.tenant,
            request.model,
            request.texts,
            request_id=current_request_id(),
            deadline=deadline,
        )
        return serving_pb2.PredictResponse(
            model=model.name,
            archive_digest=model.archive_digest,
            predictions=[serving_pb2.Prediction(label=one.label, probability=one.probability) for one in predictions],
        )


class ModelServicer(serving_pb2_grpc.ModelServiceServicer):
    """What model owners call."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def UploadArchive(  # noqa: N802
        self, request_iterator: AsyncIterator[serving_pb2.UploadArchiveRequest], _context: Any
    ) -> serving_pb2.UploadArchiveResponse:
        chunks = (request.chunk async for request in request_iterator)
        digest, size = await self._gateway.archives.receive(current_caller().spiffe_id.tenant, chunks)
        return serving_pb2.UploadArchiveResponse(archive_digest=digest, size_bytes=size)

    async def DeployModel(  # noqa: N802
        self, request: serving_pb2.DeployModelRequest, _context: Any
    ) -> serving_pb2.DeployModelResponse:
        caller = current_caller().spiffe_id
        model = await self._gateway.deploy(
            tenant=caller.tenant,
            owner=str(caller),
            name=request.name,
            archive_digest=request.archive_digest,
            cores=tuple(request.cores),
        )
        return serving_pb2.DeployModelResponse(model=_message(model))

    async def ListModels(  # noqa: N802
        self, _request: serving_pb2.ListModelsRequest, _context: Any
    ) -> serving_pb2.ListModelsResponse:
        models = self._gateway.list(current_caller().spiffe_id.tenant)
        return serving_pb2.ListModelsResponse(models=[_message(model) for model in models])

    async def RemoveModel(  # noqa: N802
        self, request: serving_pb2.RemoveModelRequest, _context: Any
    ) -> serving_pb2.RemoveModelResponse:
        await self._gateway.remove(current_caller().spiffe_id.tenant, request.name)
        return serving_pb2.RemoveModelResponse()


def mounted(gateway: Gateway) -> list[Mounted]:
    """Return both services, ready to be mounted on a GrpcServer; their callers are CALLERS."""
    return [
        Mounted(INFERENCE, serving_pb2_grpc.add_InferenceServiceServicer_to_server, InferenceServicer(gateway)),
        Mounted(MODELS, serving_pb2_grpc.add_ModelServiceServicer_to_server, ModelServicer(gateway)),
    ]


def _message(model: ModelRecord) -> serving_pb2.Model:
    return serving_pb2.Model(
        name=model.name,
        tenant=model.tenant,
        owner=model.owner,
        archive_digest=model.archive_digest,
        state=_STATES[model.state],
        reason=model.reason,
        cores=model.cores,
        backend_process_id=model.process_id,
        created_unix_ms=model.created_unix_ms,
        timings_s=dict(model.timings_s),
    )
