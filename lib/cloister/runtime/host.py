# SPDX-License-Identifier: Apache-2.0
"""The running part of a service: servers, probes and metrics up, endpoints told, calls drained at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from cloister.runtime.config import ServiceSection
from cloister.runtime.endpoints import write_endpoints
from cloister.runtime.health import HealthState
from cloister.runtime.logging import get_logger
from cloister.runtime.metrics import MetricsServer, RpcMetrics
from cloister.runtime.probes import ProbeServer
from cloister.runtime.server import GrpcServer

DRAIN_S: Final = 10.0  # what calls in flight get when a service stops


@asynccontextmanager
async def serving(
    section: ServiceSection,
    servers: Mapping[str, GrpcServer],
    *,
    health: HealthState,
    metrics: RpcMetrics,
    endpoints: Mapping[str, str] | None = None,
    ready: bool = True,
    drain_s: float = DRAIN_S,
) -> AsyncIterator[dict[str, str]]:
    """Start the servers, the probe port and the metrics port; write the endpoints file; drain on the way out.

    `servers` by the name they have in the endpoints file ("grpc", "enrolment"), built with the same `health` and
    `metrics`; `endpoints` adds others ("https"). Gives the endpoints. A crash leaves no file that says "ready".
    With `ready=False` health says "not serving" until `health.set_serving` is called: the process listens, and waits.
    """
    section.endpoints_file.unlink(missing_ok=True)
    probes = ProbeServer(section.health_listen, health)
    exporter: MetricsServer | None = None
    started: list[GrpcServer] = []
    try:
        await probes.start()
        exporter = MetricsServer(section.metrics_listen, metrics.registry)
        for server in servers.values():
            await server.start(serving=ready)
            started.append(server)
        found = {name: server.endpoint for name, server in servers.items()}
        found |= {"health": probes.endpoint, "metrics": exporter.endpoint, **(endpoints or {})}
        write_endpoints(section.endpoints_file, found)
        get_logger().info("ready" if ready else "listening, not ready", endpoints=found)
        yield found
    finally:
        section.endpoints_file.unlink(missing_ok=True)
        await asyncio.gather(*(server.drain(drain_s) for server in started))
        if exporter is not None:
            await asyncio.to_thread(exporter.close)
        await probes.stop()
