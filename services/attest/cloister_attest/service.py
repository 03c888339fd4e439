# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  (RPCs keep the names that the protocol gives them)
"""gRPC in and out: enrolment for everybody, the registry for services, verdicts for people."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Final

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.evidence_service import EVIDENCE_CALLERS
from cloister.identity import Role, is_name
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.limits import Limits
from cloister.runtime.server import Mounted
from cloister.tdx.workload import MAX_WORLD_SIZE
from cloister_attest.enrolment import Enrolment
from cloister_attest.identities import IDENTITY_CALLERS
from cloister_attest.operators import OPERATOR_CALLERS
from cloister_attest.ratelimit import RateLimit
from cloister_attest.registry import Registry
from cloister_attest.turns import Turns
from cloister_attest.verdicts import Verdict, Verdicts
from cloister_attest.workloads import Backend, Job, Registration

_DIGEST_SIZE: Final = 48
_PACKAGE: Final = "cloister.api.attest.v1"
MAX_HELD: Final = 256  # refused calls that are answered late, at once
_HELD_S: Final = 1.0
# Of one address: another one's call has no more than these before it. Verification holds the interpreter, so that more
# at once are not sooner done.
_AT_ONCE: Final = 1
# Calls that wait cost a place, not time. There are more places than calls can come by the connections that the door
# lets in: 32 of an address, four calls each. The largest message is evidence with a quote of 64 KiB and a log of 1 MiB;
# what one address can have read of it at once is 160 MiB. Connections are short: others wait for their place.
ENROLMENT_LIMITS: Final = Limits(
    max_concurrent_rpcs=1024,
    max_streams_per_connection=4,
    max_message_bytes=5 * 256 * 1024,
    max_unary_s=60.0,
    max_stream_s=60.0,
    max_connection_age_s=60.0,
    connection_grace_s=60.0,
)
_SERVICES: Final = frozenset(role for role in Role if role.is_service)

ENROLMENT_CALLERS: Final[CallerTable] = {
    f"/{_PACKAGE}.EnrolmentService/{method}": frozenset()
    for method in ("Challenge", "Attest", "IssueUserCertificate", "GetTrustBundle", "GetTrustUpdate")
}
CALLERS: Final[CallerTable] = {
    f"/{_PACKAGE}.RegistryService/RegisterJob": frozenset({Role.TRAINER}),
    f"/{_PACKAGE}.RegistryService/CloseJob": frozenset({Role.TRAINER}),
    f"/{_PACKAGE}.RegistryService/RegisterBackend": frozenset({Role.GATEWAY}),
    f"/{_PACKAGE}.RegistryService/CloseBackend": frozenset({Role.GATEWAY}),
    f"/{_PACKAGE}.VerdictService/ListVerdicts": _SERVICES | {Role.USER},
    f"/{_PACKAGE}.VerdictService/GetVerdictBundle": _SERVICES | {Role.USER},
    **IDENTITY_CALLERS,
    **OPERATOR_CALLERS,
    **EVIDENCE_CALLERS,
}


class EnrolmentServicer(attest_pb2_grpc.EnrolmentServiceServicer):
    """The open port: callers have no identity yet, so each call is counted against its address first."""

    def __init__(
        self,
        enrolment: Enrolment,
        rate_limit: RateLimit,
        *,
        address_of: Callable[[str], str | None],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`address_of` gives the address behind gRPC's name of a peer, None for who came by no door."""
        self._enrolment = enrolment
        self._rate_limit = rate_limit
        self._address_of = address_of
        self._pause = pause
        self._held = 0
        self._turns = Turns(_AT_ONCE)

    async def Challenge(self, request: attest_pb2.ChallengeRequest, context: Any) -> attest_pb2.ChallengeResponse:
        await self._admit(context)
        return await self._enrolment.challenge(request)

    async def Attest(self, request: attest_pb2.AttestRequest, context: Any) -> attest_pb2.AttestResponse:
        async with self._turns.of(await self._admit(context)):
            return await self._enrolment.attest(request)

    async def IssueUserCertificate(
        self, request: attest_pb2.IssueUserCertificateRequest, context: Any
    ) -> attest_pb2.IssueUserCertificateResponse:
        async with self._turns.of(await self._admit(context)):
            return await self._enrolment.issue_user(request)

    async def GetTrustBundle(
        self, _request: attest_pb2.GetTrustBundleRequest, context: Any
    ) -> attest_pb2.GetTrustBundleResponse:
        await self._admit(context)
        return attest_pb2.GetTrustBundleResponse(trust_bundle=self._enrolment.trust_bundle())

    async def GetTrustUpdate(
        self, request: attest_pb2.GetTrustUpdateRequest, context: Any
    ) -> attest_pb2.GetTrustUpdateResponse:
        await self._admit(context)
        return attest_pb2.GetTrustUpdateResponse(trust_update=await self._enrolment.trust_update(request.sequence))

    async def _admit(self, context: Any) -> str:
        """Count a call, and let it wait if need be; return whose it is."""
        address = self._address_of(context.peer())
        if address is None:
            raise CloisterError(
                Code.CALLER_NOT_ALLOWED,
                what="this connection did not come in by the door",
                why="callers without identity are counted by address",
                todo="use the enrolment endpoint of attest's endpoints file",
            )
        try:
            wait_s = self._rate_limit.spend(address)
        except CloisterError:
            # To refuse costs as much as to serve: whoever would call again at once is kept until it matters less.
            if self._held < MAX_HELD:
                self._held += 1
                try:
                    await self._pause(_HELD_S)
                finally:
                    self._held -= 1
            raise
        if wait_s:
            await self._pause(wait_s)
        return address


class RegistryServicer(attest_pb2_grpc.RegistryServiceServicer):
    """Workloads, announced by the services that start them; the caller table says who may announce what."""

    def __init__(self, registry: Registry, *, clock: Callable[[], datetime]) -> None:
        self._registry = registry
        self._clock = clock

    def _registration(self) -> Registration:
        return Registration(str(current_caller().spiffe_id), int(self._clock().timestamp() * 1000))

    async def RegisterJob(
        self, request: attest_pb2.RegisterJobRequest, _context: Any
    ) -> attest_pb2.RegisterJobResponse:
        _names(job_id=request.job_id, tenant=request.tenant)
        _digests(script_digest=request.script_digest, config_digest=request.config_digest)
        if not 1 <= request.world_size <= MAX_WORLD_SIZE:
            raise _invalid("world_size", f"1 to {MAX_WORLD_SIZE}")
        await self._registry.register_job(
            Job(request.job_id, request.tenant, request.world_size, request.script_digest, request.config_digest),
            self._registration(),
        )
        return attest_pb2.RegisterJobResponse()

    async def CloseJob(self, request: attest_pb2.CloseJobRequest, _context: Any) -> attest_pb2.CloseJobResponse:
        _names(job_id=request.job_id)
        await self._registry.close_job(request.job_id)
        return attest_pb2.CloseJobResponse()

    async def RegisterBackend(
        self, request: attest_pb2.RegisterBackendRequest, _context: Any
    ) -> attest_pb2.RegisterBackendResponse:
        names = {"tenant": request.tenant, "model": request.model, "backend_id": request.backend_id}
        _names(**names)
        _digests(script_digest=request.script_digest, config_digest=request.config_digest)
        await self._registry.register_backend(
            Backend(request.tenant, request.model, request.backend_id, request.script_digest, request.config_digest),
            self._registration(),
        )
        return attest_pb2.RegisterBackendResponse()

    async def CloseBackend(
        self, request: attest_pb2.CloseBackendRequest, _context: Any
    ) -> attest_pb2.CloseBackendResponse:
        _names(tenant=request.tenant, model=request.model, backend_id=request.backend_id)
        await self._registry.close_backend(request.tenant, request.model, request.backend_id)
        return attest_pb2.CloseBackendResponse()


class VerdictServicer(attest_pb2_grpc.VerdictServiceServicer):
    """Past verdicts. Users see those of services and of their own tenant; services see all."""

    def __init__(self, verdicts: Verdicts) -> None:
        self._verdicts = verdicts

    async def ListVerdicts(
        self, request: attest_pb2.ListVerdictsRequest, _context: Any
    ) -> attest_pb2.ListVerdictsResponse:
        found = await self._verdicts.newest(
            limit=min(request.limit or 50, 1000), spiffe_id=request.spiffe_id, tenant=_tenant()
        )
        return attest_pb2.ListVerdictsResponse(verdicts=[_to_wire(verdict) for verdict in found])

    async def GetVerdictBundle(
        self, request: attest_pb2.GetVerdictBundleRequest, _context: Any
    ) -> attest_pb2.GetVerdictBundleResponse:
        if not 0 < request.id < 2**63:
            raise _invalid("id", "the id of a verdict")
        bundle = await self._verdicts.bundle(request.id, tenant=_tenant())
        return attest_pb2.GetVerdictBundleResponse(bundle=bundle)


def _tenant() -> str | None:
    """Return the tenant that the caller is confined to, None for services."""
    caller = current_caller().spiffe_id
    return caller.tenant if caller.role is Role.USER else None


def enrolment_services(
    enrolment: Enrolment, rate_limit: RateLimit, address_of: Callable[[str], str | None]
) -> list[Mounted]:
    """Return what the open port serves; its callers are ENROLMENT_CALLERS."""
    servicer = EnrolmentServicer(enrolment, rate_limit, address_of=address_of)
    add = attest_pb2_grpc.add_EnrolmentServiceServicer_to_server
    return [Mounted(f"{_PACKAGE}.EnrolmentService", add, servicer)]


def services(registry: Registry, verdicts: Verdicts, *, clock: Callable[[], datetime]) -> list[Mounted]:
    """Return what the mutual-TLS port serves besides evidence; its callers are CALLERS."""
    return [
        Mounted(
            f"{_PACKAGE}.RegistryService",
            attest_pb2_grpc.add_RegistryServiceServicer_to_server,
            RegistryServicer(registry, clock=clock),
        ),
        Mounted(
            f"{_PACKAGE}.VerdictService",
            attest_pb2_grpc.add_VerdictServiceServicer_to_server,
            VerdictServicer(verdicts),
        ),
    ]


def _to_wire(verdict: Verdict) -> attest_pb2.Verdict:
    return attest_pb2.Verdict(
        time_unix_ms=int(verdict.time.timestamp() * 1000),
        role=verdict.role,
        spiffe_id=verdict.spiffe_id,
        accepted=verdict.accepted,
        simulated=verdict.simulated,
        checks=[attest_pb2.Check(name=c.name, ok=c.ok, wanted=c.wanted, got=c.got) for c in verdict.checks],
        id=verdict.number,
        has_bundle=verdict.has_grounds,
    )


def _names(**fields: str) -> None:
    for name, value in fields.items():
        if not is_name(value):
            raise _invalid(name, "1 to 63 of a-z, 0-9 and hyphen, neither first nor last a hyphen")


def _digests(**fields: bytes) -> None:
    for name, value in fields.items():
        if len(value) != _DIGEST_SIZE:
            raise _invalid(name, f"{_DIGEST_SIZE} bytes")


def _invalid(field: str, allowed: str) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID, what=f"{field} is not allowed", why=f"allowed: {allowed}", todo=f"correct {field}"
    )
