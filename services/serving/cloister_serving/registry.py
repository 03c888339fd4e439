# SPDX-License-Identifier: Apache-2.0
"""Backends in attest's registry: which handler and archive may become which backend, while it runs."""

from __future__ import annotations

from typing import Final

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError
from cloister.runtime.channel import SwappingChannel, invoke
from cloister.runtime.logging import get_logger
from cloister_serving.gateway import Launch

_TIMEOUT_S: Final = 20.0
_CLOSE_TIMEOUT_S: Final = 3.0


class AttestRegistry:
    """Attest's RegistryService."""

    def __init__(self, channel: SwappingChannel) -> None:
        self._stub = attest_pb2_grpc.RegistryServiceStub(channel)

    async def register(self, launch: Launch, *, script_digest: bytes) -> None:
        """Register a backend before its agent starts; raise CloisterError."""
        request = attest_pb2.RegisterBackendRequest(
            tenant=launch.model.tenant,
            model=launch.model.name,
            backend_id=launch.backend_id,
            script_digest=script_digest,
            config_digest=launch.model.archive_digest,
        )
        await invoke(self._stub.RegisterBackend, request, timeout_s=_TIMEOUT_S, what="register the backend with attest")

    async def close(self, launch: Launch) -> None:
        """Let this backend enrol no more; not an error when attest is away, since its id is never used again."""
        request = attest_pb2.CloseBackendRequest(
            tenant=launch.model.tenant, model=launch.model.name, backend_id=launch.backend_id
        )
        try:
            await invoke(
                self._stub.CloseBackend, request, timeout_s=_CLOSE_TIMEOUT_S, what="close the backend at attest"
            )
        except CloisterError as error:
            get_logger().warning("backend not closed at attest", backend=launch.backend_id, why=error.why)
