# SPDX-License-Identifier: Apache-2.0
"""The trainer: `python -m cloister_trainer --config FILE`."""

from __future__ import annotations

import asyncio
import time
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
from cloister.runtime.server import GrpcServer
from cloister.runtime.supervisor import Supervisor
from cloister_trainer.config import TrainerConfig
from cloister_trainer.coordinator import Coordinator
from cloister_trainer.journal import Journal
from cloister_trainer.launcher import LocalLauncher, Places
from cloister_trainer.registry import AttestRegistry
from cloister_trainer.service import CALLERS, RankServicer, RendezvousServicer, TrainerServicer, mounted

_PACKAGE: Final = "cloister_trainer"


async def main(config_path: Path, stop: asyncio.Event) -> None:
    """Enrol, take up what an earlier process left, serve until `stop`."""
    config, config_bytes = load_measured_config(config_path, TrainerConfig)
    section = config.service
    cloister_logging.configure("trainer", section.log_format)
    identity = await enrol_service(
        config.guest,
        section,
        role=Role.TRAINER,
        package=_PACKAGE,
        config_bytes=config_bytes,
    )
    attest = open_channel(config.trainer.attest_endpoint, role=Role.ATTEST, credentials=identity)
    supervisor = Supervisor()
    places = Places(
        attest_endpoint=config.guest.attest_endpoint,
        keybroker_endpoint=config.trainer.keybroker_endpoint,
        provider=config.guest.provider,
        trust_bundle=config.guest.trust_bundle,
        collective_timeout_s=config.trainer.collective_timeout_s,
    )
    launcher = LocalLauncher(supervisor, section.state_dir, places)
    journal = Journal.open(section.state_dir)
    coordinator = Coordinator(
        journal=journal,
        launcher=launcher,
        registry=AttestRegistry(attest),
        cores=config.trainer.rank_cores(),
        cancel_wait_s=config.trainer.cancel_wait_s,
        term_grace_s=config.trainer.term_grace_s,
        now_ms=_now_ms,
    )
    health, metrics = HealthState(), RpcMetrics()
    server = GrpcServer(
        section=section,
        credentials=identity,
        services=[
            *mounted(
                TrainerServicer(coordinator, journal, launcher.log_path),
                RankServicer(coordinator, _now_ms),
                RendezvousServicer(coordinator),
            ),
            mounted_evidence(identity),
        ],
        callers={**CALLERS, **EVIDENCE_CALLERS},
        health=health,
        metrics=metrics,
    )
    try:
        async with serving(section, {"grpc": server}, health=health, metrics=metrics) as endpoints:
            # Ranks call back: they can only be started once it is known where.
            launcher.trainer_endpoint = endpoints["grpc"]
            await coordinator.recover()
            await stop.wait()
            await coordinator.close()
    finally:
        await supervisor.stop_all(1.0)
        journal.close()
        await attest.close()
        await identity.aclose()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    run_service(main, "trainer")
