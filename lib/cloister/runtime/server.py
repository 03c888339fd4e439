# SPDX-License-Identifier: Apache-2.0
"""The one way to start a gRPC server: mutual TLS, a caller table that denies by default, limits, health, drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.address import bind_error, split_address
from cloister.runtime.config import ServiceSection
from cloister.runtime.credentials import CredentialSource, TlsMaterial
from cloister.runtime.guard import CallerTable, Guard, Handlers, Recorder
from cloister.runtime.health import HEALTH_SERVICE, HealthState
from cloister.runtime.limits import Limits
from cloister.runtime.logging import get_logger
from cloister.runtime.metrics import RpcMetrics
from cloister.runtime.options import server_options
from cloister.runtime.quota import IdentityQuota
from cloister.runtime.reflection import reflection_handlers


@dataclass(frozen=True, slots=True)
class Mounted:
    """A service of ours: its full name, the generated `add_..._to_server`, and the servicer."""

    descriptor: str
    add: Callable[[Any, Any], None]
    servicer: Any


class GrpcServer:
    """A gRPC server on one port.

    `callers` maps "/package.Service/Method" to the roles that may call it; a method without a row is for nobody.
    Health and reflection admit every authenticated caller. `anonymous=True` is for enrolment alone: the caller has
    no certificate yet, TLS authenticates the server, and the table lists the open methods with `frozenset()`.
    """

    def __init__(
        self,
        *,
        section: ServiceSection | str,
        credentials: CredentialSource,
        services: Sequence[Mounted],
        callers: CallerTable,
        limits: Limits | None = None,
        quota: IdentityQuota | None = None,
        health: HealthState | None = None,
        metrics: RpcMetrics | None = None,
        reflection: bool | None = None,
        anonymous: bool = False,
    ) -> None:
        self._listen = section if isinstance(section, str) else section.listen
        self._credentials = credentials
        self._limits = limits or Limits()
        self._anonymous = anonymous
        self.health = health or HealthState()
        self.metrics = metrics or RpcMetrics()
        self.endpoint = ""
        mounted = _methods_of(services)
        self._names = tuple(mounted)
        _check_table(callers, mounted, anonymous=anonymous)
        if reflection is None:
            reflection = section.reflection if isinstance(section, ServiceSection) else True
        extra = _common_services(self.health, self._names, reflection=reflection)
        everyone = frozenset[Role]() if anonymous else frozenset(Role)
        open_to_all = {f"/{name}/{method}": everyone for name, methods in extra.items() for method in methods}
        guard = self._guard = Guard(
            credentials=credentials,
            callers={**callers, **open_to_all},
            anonymous=anonymous,
            limits=self._limits,
            metrics=self.metrics,
            quota=quota,
        )
        self._handlers = {name: guard.wrap(name, methods) for name, methods in {**mounted, **extra}.items()}
        self._server: grpc.aio.Server | None = None

    async def start(self, *, serving: bool = True) -> None:
        """Listen and, unless told otherwise, say so in health; raise CloisterError(PORT_TAKEN)."""
        host, _ = split_address(self._listen)
        server = grpc.aio.server(
            options=server_options(self._limits), maximum_concurrent_rpcs=self._limits.max_concurrent_rpcs
        )
        server.add_generic_rpc_handlers(
            [grpc.method_handlers_generic_handler(name, methods) for name, methods in self._handlers.items()]
        )
        try:
            port = server.add_secure_port(self._listen, self._tls())
        except RuntimeError:
            raise bind_error(self._listen) from None
        await server.start()
        loop = asyncio.get_running_loop()

        def recheck() -> None:
            """Look at the running calls again, wherever the news came from."""
            if self._server is not None and not loop.is_closed():
                loop.call_soon_threadsafe(self._guard.recheck)

        if not self._anonymous:
            self._credentials.on_change(recheck)
        self._server, self.endpoint = server, f"{host}:{port}"
        await self.health.set_serving(serving, self._names)
        get_logger().info("listening", endpoint=self.endpoint, services=list(self._names), anonymous=self._anonymous)

    async def set_serving(self, serving: bool) -> None:
        """Change what health says; calls are answered either way."""
        await self.health.set_serving(serving, self._names)

    async def drain(self, grace_s: float) -> None:
        """Take no new call, let those in flight end within `grace_s` seconds, cancel the rest."""
        await self.health.shut_down()
        self._guard.release_watchers()
        if self._server is not None:
            await self._server.stop(grace_s)
            self._server = None

    def _tls(self) -> grpc.ServerCredentials:
        material = self._credentials.current()

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            """Return the newest certificate for the handshake that begins, on a thread of C-core's."""
            nonlocal material
            newest = self._credentials.current()
            if newest is material:
                return None
            material = newest
            return self._tls_configuration(newest)

        return grpc.dynamic_ssl_server_credentials(
            self._tls_configuration(material),
            fetch,  # type: ignore[arg-type]  # None means "unchanged"; the stub does not know
            require_client_authentication=not self._anonymous,
        )

    def _tls_configuration(self, material: TlsMaterial) -> grpc.ServerCertificateConfiguration:
        # Any role's CA may shake hands: the caller table refuses with words, a failed handshake has none.
        trusted = None if self._anonymous else b"".join(material.bundle.intermediates.values())
        pair = (material.private_key_pem.reveal(), material.chain_pem)
        return grpc.ssl_server_certificate_configuration([pair], trusted)


def _methods_of(services: Sequence[Mounted]) -> dict[str, Handlers]:
    recorder = Recorder()
    for service in services:
        service.add(service.servicer, recorder)
        if service.descriptor not in recorder.services:
            raise ValueError(f"{service.descriptor} is not what its add function registers")
    return recorder.services


def _common_services(health: HealthState, names: Sequence[str], *, reflection: bool) -> dict[str, Handlers]:
    recorder = Recorder()
    health.add_to(recorder)
    # grpcio-health-checking does not implement the newer List.
    implemented = {name: recorder.services[HEALTH_SERVICE][name] for name in ("Check", "Watch")}
    found: dict[str, Handlers] = {HEALTH_SERVICE: implemented}
    if reflection:
        found.update(reflection_handlers([*names, HEALTH_SERVICE]))
    return found


def _check_table(callers: CallerTable, mounted: dict[str, Handlers], *, anonymous: bool) -> None:
    """Refuse to start with a row that guards nothing: a typo there would lock out, or worse, be thought to protect."""
    known = {f"/{name}/{method}" for name, methods in mounted.items() for method in methods}
    unknown = sorted(set(callers) - known)
    if unknown:
        raise CloisterError(
            Code.CONFIG_INVALID,
            what=f"the caller table names {unknown[0]}, which is not mounted here",
            why=f"mounted methods: {', '.join(sorted(known)) or 'none'}",
            todo="correct the caller table",
        )
    if anonymous and any(callers.values()):
        raise CloisterError(
            Code.CONFIG_INVALID,
            what="the caller table of an anonymous server names roles",
            why="callers without a certificate have no role",
            todo="list the open methods with an empty set",
        )
