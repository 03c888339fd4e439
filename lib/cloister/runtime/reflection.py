# SPDX-License-Identifier: Apache-2.0
"""Server reflection, v1 and v1alpha: which services and messages are here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
# grpcio-reflection serves v1alpha only. The messages of v1 are the same bytes under another name.
V1: Final = "grpc.reflection.v1.ServerReflection"
_METHOD: Final = "ServerReflectionInfo"


def reflection_handlers(services: Sequence[str]) -> dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]]:
    """Return service name -> method name -> handler, for a server that mounts `services`."""
    servicer: Any = reflection.aio.ReflectionServicer([*services, ALPHA])
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return {ALPHA: {_METHOD: handler}, V1: {_METHOD: handler}}
