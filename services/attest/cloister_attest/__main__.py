# SPDX-License-Identifier: Apache-2.0
"""Run attest: python -m cloister_attest --config FILE."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import prometheus_client

from cloister.appraisal.policy import STRICT, TdPolicy, parse_td_policy
from cloister.appraisal.references import ReferenceSet
from cloister.atomicfile import write_atomically
from cloister.collateral.source import CollateralSource
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity, utc_now
from cloister.guest.evidence import EvidenceVerifier
from cloister.guest.evidence_service import mounted_evidence
from cloister.guest.guest import Guest
from cloister.guest.measure import attest_configuration, read_measured
from cloister.guest.service import measure_service
from cloister.identity import Role, SpiffeId
from cloister.recovery import ShareSet
from cloister.runtime.config import load_measured_config
from cloister.runtime.database import Database
from cloister.runtime.door import Door, DoorLimits
from cloister.runtime.endpoints import write_endpoints
from cloister.runtime.health import HealthState
from cloister.runtime.logging import configure, get_logger, mark_every_line
from cloister.runtime.main import run_service
from cloister.runtime.marks import Marks
from cloister.runtime.metrics import MetricsServer, RpcMetrics
from cloister.runtime.probes import ProbeServer
from cloister.runtime.server import GrpcServer
from cloister.secret import SecretBytes
from cloister.tdx.intelroot import intel_root
from cloister.tdx.trustroot import TrustRoot
from cloister.tlv import sha384
from cloister_attest.appraise import AppraisalPolicy
from cloister_attest.ca import Told, WorkloadCa
from cloister_attest.castate import CaState, SealedState, Vault
from cloister_attest.collateral import open_collateral
from cloister_attest.config import AttestConfig
from cloister_attest.denylist import DenyList
from cloister_attest.enrolment import Enrolment, Terms
from cloister_attest.epochs import Schedule
from cloister_attest.identities import Callers, IdentityServicer, identity_services
from cloister_attest.issued import IssuedRegister
from cloister_attest.jwks import JwksServer
from cloister_attest.opening import Opening
from cloister_attest.operators import OperatorServicer, operator_services
from cloister_attest.ratelimit import RateLimit
from cloister_attest.recovering import recover
from cloister_attest.references import load_references
from cloister_attest.registry import MIGRATIONS, Registry
from cloister_attest.results import td_policy_digest
from cloister_attest.revocation import Revocation
from cloister_attest.service import CALLERS, ENROLMENT_CALLERS, ENROLMENT_LIMITS, enrolment_services, services
from cloister_attest.tableseal import TableSealer
from cloister_attest.users import Standing, User, UserRegister
from cloister_attest.verdicts import Verdicts

_DRAIN_S = 5.0
# In the state directory, while attest waits for recovery shares: where it can be reached.
RECOVERY_ENDPOINT = "recovery.json"
# Verification is Python and holds the interpreter: more threads would only take turns, and the event loop one of them.
_WORKERS = 2
_T = TypeVar("_T")


async def main(config_path: Path, stop: asyncio.Event) -> None:
    """Make a CA epoch, enrol with oneself, serve until told to stop."""
    config, config_bytes = load_measured_config(config_path, AttestConfig)
    configure("attest", config.service.log_format)
    guest = await asyncio.to_thread(Guest.open, config.guest.provider)
    try:
        database = Database.open(config.service.state_dir / "attest.sqlite", MIGRATIONS)
        try:
            await _open(config, config_path.parent, config_bytes, guest, database, stop)
        finally:
            database.close()
    finally:
        guest.close()


async def _open(
    config: AttestConfig, base: Path, config_bytes: bytes, guest: Guest, database: Database, stop: asyncio.Event
) -> None:
    root, metrics = _root(config), RpcMetrics()
    simulated = prometheus_client.Gauge(
        "cloister_attest_simulated_root", "1 when quotes of simulated TDs are accepted.", registry=metrics.registry
    )
    simulated.set(int(root.simulated))
    if root.simulated:
        mark_every_line(simulated=True)
        get_logger().warning("quotes of simulated TDs are accepted", root_sha256=root.fingerprint.hex())
    state_dir = config.service.state_dir
    async with AsyncExitStack() as stack:
        marks = Marks.open(state_dir / "marks.sqlite")
        stack.callback(marks.close)
        references = await load_references(config.references, marks)
        collateral = open_collateral(
            config.collateral, root=root, base=base, state_dir=state_dir, registry=metrics.registry, marks=marks
        )
        verifier = _verifier(config, root, await stack.enter_async_context(collateral), references)
        sets = [found.source for _, found in sorted(verifier.references.items())]
        opening = Opening.prepare(config, now=utc_now())
        measured = attest_configuration(
            config_bytes, root.certificate_der, verifier.policy.source, sets, holders=opening.holders
        )
        await asyncio.to_thread(
            measure_service,
            guest,
            bundle=opening.bundle,
            package="cloister_attest",
            config_bytes=measured,
            role=Role.ATTEST,
        )
        await _serve(config, opening, sha384(measured), verifier, metrics, guest, database, stop)


async def _serve(
    config: AttestConfig,
    opening: Opening,
    measured: bytes,
    verifier: EvidenceVerifier,
    metrics: RpcMetrics,
    guest: Guest,
    database: Database,
    stop: asyncio.Event,
) -> None:
    sealer, issued = TableSealer(database), IssuedRegister(database)
    users, denials = UserRegister(database, sealer, _users(config)), DenyList(database, sealer)
    state, vault = await _open_ca(config, opening, measured, guest, sealer, users, stop)
    ca = WorkloadCa(state, issued=issued, sealer=sealer, schedule=_schedule(config), clock=utc_now, vault=vault)
    await ca.advance()
    await ca.revoke()
    registry = Registry(database)
    verdicts = Verdicts(database, limit=config.attest.kept_verdicts, grounds_limit=config.attest.kept_bundles)
    await verdicts.sweep()
    enrolment = Enrolment(
        ca=ca,
        policy=_policy(config, ca, verifier),
        verifier=verifier,
        users=users,
        issued=issued,
        registry=registry,
        verdicts=verdicts,
        denials=denials,
        terms=_terms(config),
        clock=utc_now,
    )
    identity = await Identity.enrol_through(enrolment, guest, bundle=opening.bundle)
    identity.start_renewal()
    ca.on_change(lambda told: _follow(told, identity, config.attest.bundle_file))

    callers = Callers(users, denials)
    identities = IdentityServicer(
        callers,
        users,
        denials,
        enrolment,
        Revocation(ca, issued),
        own_facts=lambda: enrolment.own_facts,
        clock=utc_now,
    )
    operators = OperatorServicer(callers, ca, registry, kept=config.ca.kept)

    health = HealthState()
    rate_limit = RateLimit(per_s=config.attest.calls_per_s, burst=config.attest.calls_burst, clock_s=time.monotonic)
    server = GrpcServer(
        section=config.service,
        credentials=identity,
        services=[
            *services(registry, verdicts, clock=utc_now),
            *identity_services(identities),
            *operator_services(operators),
            mounted_evidence(identity),
        ],
        callers=CALLERS,
        health=health,
        metrics=metrics,
    )
    # The door passes connections on to a port that the system chooses, and that answers nobody else.
    door = Door(config.attest.enrolment_listen, _door_limits(config), registry=metrics.registry)
    enrolment_server = GrpcServer(
        section="127.0.0.1:0",
        credentials=identity,
        services=enrolment_services(enrolment, rate_limit, door.address_of),
        callers=ENROLMENT_CALLERS,
        limits=ENROLMENT_LIMITS,
        health=health,
        metrics=metrics,
        reflection=config.service.reflection,
        anonymous=True,
    )
    probes = ProbeServer(config.service.health_listen, health)
    jwks = JwksServer(listen=config.attest.jwks_listen, credentials=identity, bundle=lambda: ca.bundle)
    exposition = MetricsServer(config.service.metrics_listen, metrics.registry)
    changing = asyncio.create_task(ca.run(), name="the CA")
    changing.add_done_callback(_log_end)
    try:
        await server.start()
        await enrolment_server.start()
        await door.start(enrolment_server.endpoint)
        await probes.start()
        await jwks.start()
        # Whoever sees the endpoints may read the bundle: it is there first.
        write_atomically(config.attest.bundle_file, ca.told.bundle_bytes, mode=0o644)
        write_endpoints(
            config.service.endpoints_file,
            {
                "grpc": server.endpoint,
                "enrolment": door.endpoint,
                "jwks": jwks.endpoint,
                "health": probes.endpoint,
                "metrics": exposition.endpoint,
            },
        )
        await stop.wait()
    finally:
        changing.cancel()
        await asyncio.gather(changing, return_exceptions=True)
        await asyncio.gather(server.drain(_DRAIN_S), enrolment_server.drain(_DRAIN_S))
        await door.stop()
        await jwks.stop()
        await probes.stop()
        exposition.close()
        await identity.aclose()


async def _open_ca(
    config: AttestConfig,
    opening: Opening,
    measured: bytes,
    guest: Guest,
    sealer: TableSealer,
    users: UserRegister,
    stop: asyncio.Event,
) -> tuple[CaState, Vault | None]:
    place = config.service.state_dir / RECOVERY_ENDPOINT

    def told(endpoint: str) -> None:
        write_endpoints(place, {"recovery": endpoint})

    async def wait_for_shares(sealed: SealedState, shares: ShareSet) -> SecretBytes:
        listen = config.ca.recovery_listen
        return await recover(guest, sealed, shares, listen=listen, stop=stop, clock_s=time.monotonic, told=told)

    try:
        key = await opening.key(wait_for_shares)
    finally:
        place.unlink(missing_ok=True)
    return await opening.finish(key, sealer, users, config=measured, now=utc_now())


def _log_end(task: asyncio.Task[None]) -> None:
    """Log an end of the CA's changes that nobody expected: epochs would not follow one another any more."""
    if not task.cancelled() and (error := task.exception()) is not None:
        get_logger().critical("the CA does not change any more", exc_info=error)


def _follow(told: Told, identity: Identity, bundle_file: Path) -> None:
    """Let attest itself, and whoever starts from the file, trust what is told."""
    changed = identity.bundle.digest != told.bundle_digest
    identity.learn(told.update)
    if not changed:
        return
    try:
        write_atomically(bundle_file, told.bundle_bytes, mode=0o644)
    except CloisterError as error:
        get_logger().error("the trust bundle cannot be written", error=error.code.text, what=error.what, why=error.why)


def _policy(config: AttestConfig, ca: WorkloadCa, verifier: EvidenceVerifier) -> AppraisalPolicy:
    scripts: dict[Role, frozenset[bytes]] = {}
    for entry in config.services:
        digests = frozenset(bytes.fromhex(text.removeprefix("sha384:")) for text in entry.script)
        scripts[entry.role] = scripts.get(entry.role, frozenset()) | digests
    digest = td_policy_digest(verifier)
    return AppraisalPolicy(config.service.trust_domain, ca.told.bundle_digest, scripts, digest)


def _root(config: AttestConfig) -> TrustRoot:
    """Return Intel's root, or the configured one; raise CloisterError when a development root passes for Intel's."""
    intel = intel_root()
    if not config.trust_roots:
        return intel
    entry = config.trust_roots[0]
    root = TrustRoot.from_pem(read_measured(entry.path).data, simulated=entry.simulated)
    if not entry.simulated and root.certificate_der != intel.certificate_der:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"{entry.path} is not Intel's production root",
            why="quotes under any other root are simulated, and everything about them must say so",
            todo="set simulated = true, or leave out [[trust_roots]] for Intel's",
        )
    return root


def _verifier(
    config: AttestConfig, root: TrustRoot, source: CollateralSource, references: Sequence[ReferenceSet]
) -> EvidenceVerifier:
    path = config.appraisal.policy
    policy: TdPolicy = STRICT if path is None else _parsed(path, parse_td_policy)
    workers = ThreadPoolExecutor(_WORKERS, thread_name_prefix="verification")
    return EvidenceVerifier(root, source, policy=policy, references=references, workers=workers)


def _parsed(path: Path, parse: Callable[[bytes], _T]) -> _T:
    """Read and parse a file; raise CloisterError that names it."""
    try:
        return parse(read_measured(path).data)
    except CloisterError as error:
        if error.code is not Code.POLICY_INVALID:
            raise
        raise CloisterError(error.code, what=f"{path}: {error.what}", why=error.why, todo=error.todo) from None


def _users(config: AttestConfig) -> list[User]:
    by_key: dict[bytes, User] = {}
    by_id: dict[SpiffeId, User] = {}
    for entry in config.users:
        standing = Standing.ADMINISTRATOR if entry.administrator else Standing.USER
        who, key = SpiffeId.parse(entry.spiffe_id), bytes.fromhex(entry.spki_sha256)
        user = User(who, key, Standing.OPERATOR if entry.operator else standing, "", None)
        domain = config.service.trust_domain
        if who.trust_domain != domain or by_key.setdefault(key, user) != user or by_id.setdefault(who, user) != user:
            raise CloisterError(
                Code.CONFIG_INVALID,
                what=f"the user {who} cannot be registered",
                why="it is of another trust domain, stands there twice, or its key is another user's, too",
                todo="correct [[users]]",
            )
    return list(by_key.values())


def _schedule(config: AttestConfig) -> Schedule:
    section = config.ca
    return Schedule(
        lead=timedelta(seconds=section.lead_s),
        overlap=timedelta(seconds=section.overlap_s),
        renew_after=timedelta(seconds=section.renew_after_s),
    )


def _terms(config: AttestConfig) -> Terms:
    return Terms(
        svid=timedelta(seconds=config.attest.svid_ttl_s),
        result=timedelta(seconds=config.attest.ear_ttl_s),
        user=timedelta(seconds=config.attest.user_ttl_s),
        nonce=timedelta(seconds=config.attest.nonce_ttl_s),
    )


def _door_limits(config: AttestConfig) -> DoorLimits:
    section = config.attest
    return DoorLimits(inside=section.connections, burst=section.calls_burst, per_s=section.calls_per_s)


if __name__ == "__main__":
    run_service(main, "attest")
