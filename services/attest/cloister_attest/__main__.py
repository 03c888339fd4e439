# SPDX-License-Identifier: Apache-2.0
"""Run attest: python -m cloister_attest --config FILE."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from pathlib import Path

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity, utc_now
from cloister.guest.evidence_service import mounted_evidence
from cloister.guest.guest import Guest
from cloister.guest.measure import read_measured
from cloister.guest.service import measure_service
from cloister.identity import Role, SpiffeId
from cloister.runtime.config import load_measured_config
from cloister.runtime.database import Database
from cloister.runtime.endpoints import write_endpoints
from cloister.runtime.health import HealthState
from cloister.runtime.logging import configure
from cloister.runtime.main import run_service
from cloister.runtime.metrics import MetricsServer, RpcMetrics
from cloister.runtime.probes import ProbeServer
from cloister.runtime.server import GrpcServer
from cloister.tdx.verify import TrustRoot
from cloister.tlv import tlv
from cloister_attest.appraise import AppraisalPolicy
from cloister_attest.authority import Authority
from cloister_attest.config import AttestConfig
from cloister_attest.enrolment import Enrolment, Terms
from cloister_attest.ratelimit import RateLimit
from cloister_attest.registry import MIGRATIONS, Registry
from cloister_attest.service import CALLERS, ENROLMENT_CALLERS, enrolment_services, services
from cloister_attest.verdicts import Verdicts

_DRAIN_S = 5.0


async def main(config_path: Path, stop: asyncio.Event) -> None:
    """Make a CA epoch, enrol with oneself, serve until told to stop."""
    config, config_bytes = load_measured_config(config_path, AttestConfig)
    configure("attest", config.service.log_format)
    guest = await asyncio.to_thread(Guest.open, config.guest.provider)
    try:
        database = Database.open(config.service.state_dir / "attest.sqlite", MIGRATIONS)
        try:
            await _serve(config, config_bytes, guest, database, stop)
        finally:
            database.close()
    finally:
        guest.close()


async def _serve(
    config: AttestConfig, config_bytes: bytes, guest: Guest, database: Database, stop: asyncio.Event
) -> None:
    authority = Authority(config.service.trust_domain, now=utc_now())
    roots = _roots(config)
    registry = Registry(database)
    verdicts = Verdicts(database, limit=config.attest.kept_verdicts)
    enrolment = Enrolment(
        authority=authority,
        policy=_policy(config, authority),
        roots=roots,
        users=_users(config),
        registry=registry,
        verdicts=verdicts,
        terms=_terms(config),
        clock=utc_now,
    )
    await asyncio.to_thread(
        measure_service,
        guest,
        bundle=authority.bundle,
        package="cloister_attest",
        # The file only names the roots; who may vouch for quotes is part of what this attest is.
        config_bytes=tlv("cloister-attest-config-v1", config_bytes, *(root.certificate_der for root in roots)),
        role=Role.ATTEST,
    )
    identity = await Identity.enrol_through(enrolment, guest, bundle=authority.bundle)
    identity.start_renewal()

    health, metrics = HealthState(), RpcMetrics()
    rate_limit = RateLimit(per_s=config.attest.calls_per_s, burst=config.attest.calls_burst, clock_s=time.monotonic)
    server = GrpcServer(
        section=config.service,
        credentials=identity,
        services=[*services(registry, verdicts), mounted_evidence(identity)],
        callers=CALLERS,
        health=health,
        metrics=metrics,
    )
    enrolment_server = GrpcServer(
        section=config.attest.enrolment_listen,
        credentials=identity,
        services=enrolment_services(enrolment, rate_limit),
        callers=ENROLMENT_CALLERS,
        health=health,
        metrics=metrics,
        reflection=config.service.reflection,
        anonymous=True,
    )
    probes = ProbeServer(config.service.health_listen, health)
    exposition = MetricsServer(config.service.metrics_listen, metrics.registry)
    try:
        await server.start()
        await enrolment_server.start()
        await probes.start()
        # Whoever sees the endpoints may read the bundle: it is there first.
        write_atomically(config.attest.bundle_file, authority.bundle.to_bytes(), mode=0o644)
        write_endpoints(
            config.service.endpoints_file,
            {
                "grpc": server.endpoint,
                "enrolment": enrolment_server.endpoint,
                "health": probes.endpoint,
                "metrics": exposition.endpoint,
            },
        )
        await stop.wait()
    finally:
        await asyncio.gather(server.drain(_DRAIN_S), enrolment_server.drain(_DRAIN_S))
        await probes.stop()
        exposition.close()
        await identity.aclose()


def _policy(config: AttestConfig, authority: Authority) -> AppraisalPolicy:
    scripts: dict[Role, frozenset[bytes]] = {}
    for entry in config.services:
        digests = frozenset(bytes.fromhex(text.removeprefix("sha384:")) for text in entry.script)
        scripts[entry.role] = scripts.get(entry.role, frozenset()) | digests
    return AppraisalPolicy(config.service.trust_domain, authority.bundle.digest, scripts)


def _roots(config: AttestConfig) -> list[TrustRoot]:
    return [
        TrustRoot.from_pem(read_measured(entry.path).data, simulated=entry.simulated) for entry in config.trust_roots
    ]


def _users(config: AttestConfig) -> dict[bytes, SpiffeId]:
    users: dict[bytes, SpiffeId] = {}
    for entry in config.users:
        user, fingerprint = SpiffeId.parse(entry.spiffe_id), bytes.fromhex(entry.spki_sha256)
        if user.trust_domain != config.service.trust_domain or users.setdefault(fingerprint, user) != user:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"the user {user} cannot be registered",
                why="it is of another trust domain, or its key is another user's, too",
                todo="correct [[users]]",
            )
    return users


def _terms(config: AttestConfig) -> Terms:
    return Terms(
        svid=timedelta(seconds=config.attest.svid_ttl_s),
        result=timedelta(seconds=config.attest.ear_ttl_s),
        user=timedelta(seconds=config.attest.user_ttl_s),
        nonce=timedelta(seconds=config.attest.nonce_ttl_s),
    )


if __name__ == "__main__":
    run_service(main, "attest")
