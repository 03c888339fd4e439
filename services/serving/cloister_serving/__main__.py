# SPDX-License-Identifier: Apache-2.0
"""The gateway: `python -m cloister_serving --config FILE`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from cloister.guest.evidence_service import EVIDENCE_CALLERS, mounted_evidence
from cloister.guest.service import enrol_service
from cloister.identity import Role
from cloister.runtime import logging as cloister_logging
from cloister.runtime.channel import open_channel
from cloister.runtime.config import load_measured_config
from cloister.runtime.health import HealthState
from cloister.runtime.host import serving
from cloister.runtime.main import run_service
from cloister.runtime.metrics import RpcMetrics
from cloister.runtime.process import pin_to_cores
from cloister.runtime.server import GrpcServer
from cloister_serving import router
from cloister_serving.agent import AgentSpec
from cloister_serving.backend import AgentBackend, BackendLimits
from cloister_serving.config import GatewayConfig
from cloister_serving.gateway import Gateway, Launch
from cloister_serving.https import HttpsServer
from cloister_serving.pinning import check_pinned
from cloister_serving.registry import AttestRegistry
from cloister_serving.service import CALLERS, mounted
from cloister_serving.store import ArchiveStore, ModelStore

_PACKAGE: Final = "cloister_serving"


async def main(config_path: Path, stop: asyncio.Event) -> None:
    """Pin, enrol, take up what was deployed before, serve until `stop`."""
    config, config_bytes = load_measured_config(config_path, GatewayConfig)
    section, plan = config.service, config.serving
    cloister_logging.configure("gateway", section.log_format)
    router.check_core_plan(
        gateway_cores=plan.gateway_cores, backend_cores=plan.backend_cores, available=os.sched_getaffinity(0)
    )
    pin_to_cores(plan.gateway_cores)
    async with AsyncExitStack() as stack:
        identity = await enrol_service(
            config.guest, section, role=Role.GATEWAY, package=_PACKAGE, config_bytes=config_bytes
        )
        stack.push_async_callback(identity.aclose)
        attest = open_channel(plan.attest_endpoint, role=Role.ATTEST, credentials=identity)
        stack.push_async_callback(attest.close)
        gateway = Gateway(
            models=ModelStore(section.state_dir / "models.sqlite"),
            archives=ArchiveStore(plan.archive_dir),
            run_directory=section.state_dir / "run",
            log_directory=section.state_dir / "logs",
            backend_cores=plan.backend_cores,
            launcher=_launcher(config),
            registry=AttestRegistry(attest),
        )
        stack.push_async_callback(gateway.aclose)
        https = HttpsServer(gateway, listen=plan.https_listen, credentials=identity)
        stack.push_async_callback(https.stop)
        health, metrics = HealthState(), RpcMetrics()
        server = GrpcServer(
            section=section,
            credentials=identity,
            services=[*mounted(gateway), mounted_evidence(identity)],
            callers={**CALLERS, **EVIDENCE_CALLERS},
            health=health,
            metrics=metrics,
        )
        await gateway.restore()
        await https.start()
        endpoints = {"https": https.endpoint}
        async with serving(section, {"grpc": server}, health=health, metrics=metrics, endpoints=endpoints):
            # Every thread there is by now, gRPC's and SQLite's included.
            check_pinned(os.getpid(), plan.gateway_cores, what="the gateway")
            await stop.wait()


def _launcher(config: GatewayConfig) -> Callable[[Launch, Callable[[str], None]], AgentBackend]:
    def launch(about: Launch, on_down: Callable[[str], None]) -> AgentBackend:
        spec = AgentSpec(
            provider=config.guest.provider,
            attest_endpoint=config.guest.attest_endpoint,
            keybroker_endpoint=config.serving.keybroker_endpoint,
            trust_bundle=config.guest.trust_bundle,
            tenant=about.model.tenant,
            model=about.model.name,
            backend=about.backend_id,
            archive=about.archive,
            archive_digest=about.model.archive_digest.hex(),
            cores=about.model.cores,
            directory=about.directory,
            log_format=config.service.log_format,
        )
        return AgentBackend(
            spec,
            about.handler_name,
            log_path=about.log,
            on_down=on_down,
            limits=BackendLimits(load_s=config.serving.load_timeout_s),
        )

    return launch


if __name__ == "__main__":
    run_service(main, "gateway")
