# SPDX-License-Identifier: Apache-2.0
"""Is this process ready? One state, shown on the mTLS port and on the plain port for probes."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

HEALTH_SERVICE: Final = "grpc.health.v1.Health"


class HealthState:
    """Serving or not, for the whole process ("") and for each service it mounts; not serving at first.

    `always` names services that answer whenever the process listens, even when it says that it is not ready.
    """

    def __init__(self, *, always: Collection[str] = ()) -> None:
        self._always = frozenset(always)
        self.servicer: Any = health_aio.HealthServicer()
        # The servicer begins as serving; a process does not.
        self.servicer._server_status[""] = health_pb2.HealthCheckResponse.NOT_SERVING
        self._names: set[str] = {""}
        self._serving = False
        self._unable: set[str] = set()

    async def set_serving(self, serving: bool, names: Iterable[str] = ()) -> None:
        """Set the state of the process and of all services known so far, and of `names` from now on."""
        self._names.update(names)
        self._serving = serving
        for name in sorted(self._names):
            await self._publish(name)

    async def set_able(self, name: str, able: bool) -> None:
        """Say of one service that it cannot do its work now, though the process serves; or that it can again."""
        if able:
            self._unable.discard(name)
        else:
            self._unable.add(name)
        if name in self._names:
            await self._publish(name)

    async def _publish(self, name: str) -> None:
        serving = (self._serving and name not in self._unable) or name in self._always
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        await self.servicer.set(name, status)

    async def shut_down(self) -> None:
        """Say not serving, for good: load balancers send no more, while calls in flight end."""
        await self.servicer.enter_graceful_shutdown()

    def add_to(self, server: Any) -> None:
        """Register grpc.health.v1.Health with a server."""
        health_pb2_grpc.add_HealthServicer_to_server(self.servicer, server)
