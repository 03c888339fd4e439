# SPDX-License-Identifier: Apache-2.0
"""The plaintext port for probes."""

from __future__ import annotations

import grpc

from cloister.runtime.address import bind_error, split_address
from cloister.runtime.health import HealthState


class ProbeServer:
    """The plaintext port: grpc.health.v1 and nothing else.

    Kubernetes' gRPC probe has no client certificate, so it can never use the mTLS port.
    """

    def __init__(self, listen: str, state: HealthState) -> None:
        self._listen = listen
        self._server = grpc.aio.server(
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 1024),  # a service name
                ("grpc.max_metadata_size", 4096),
                ("grpc.max_concurrent_streams", 16),
            ],
            maximum_concurrent_rpcs=64,
        )
        state.add_to(self._server)
        self.endpoint = ""

    async def start(self) -> None:
        """Listen; raise CloisterError(PORT_TAKEN)."""
        host, _ = split_address(self._listen)
        try:
            port = self._server.add_insecure_port(self._listen)
        except RuntimeError:
            raise bind_error(self._listen) from None
        await self._server.start()
        self.endpoint = f"{host}:{port}"

    async def stop(self) -> None:
        """Stop at once: probes do not mind."""
        await self._server.stop(None)
