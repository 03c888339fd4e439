# SPDX-License-Identifier: Apache-2.0
"""The door of the broker: every service of its protocol is on the wire, and answers only while the root key is known.

All services but BrokerService are mounted through the gate, by their descriptors: one that somebody forgets to think
about is shut, too. What answers behind the gate is made when it opens and dropped when it shuts.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from cloister.api.keybroker.v1 import keybroker_pb2, keybroker_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.runtime.server import Mounted

BROKER_SERVICE: Final = "cloister.api.keybroker.v1.BrokerService"
_DRAIN_S: Final = 10.0  # what unary calls in flight get when the gate shuts


class Gate:
    """Shut at first. For one event loop."""

    def __init__(self) -> None:
        services: Mapping[str, ServiceDescriptor] = keybroker_pb2.DESCRIPTOR.services_by_name
        self._services = [service for service in services.values() if service.full_name != BROKER_SERVICE]
        self._servicers: dict[str, Any] = {}
        self._why = "the broker is starting"
        self._shutting = asyncio.Event()
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def names(self) -> Sequence[str]:
        """The full names of the services behind the gate."""
        return [service.full_name for service in self._services]

    def mounted(self) -> Sequence[Mounted]:
        """Return stand-ins of all services behind the gate, ready for GrpcServer."""
        return [
            Mounted(
                service.full_name,
                getattr(keybroker_pb2_grpc, f"add_{service.name}Servicer_to_server"),
                _stand_in({method.name: self._method(service, method) for method in service.methods}),
            )
            for service in self._services
        ]

    def open(self, services: Iterable[Mounted]) -> None:
        """Let calls through to these."""
        self._servicers = {service.descriptor: service.servicer for service in services}
        self._shutting = asyncio.Event()

    async def shut(self, why: str) -> None:
        """Let no call in, end streams, and wait for the unary calls in flight; `why` is told to who calls."""
        self._servicers, self._why = {}, why
        self._shutting.set()
        try:
            async with asyncio.timeout(_DRAIN_S):
                await self._empty.wait()
        except TimeoutError:
            pass  # what is still inside meets a closed store

    def _method(self, service: ServiceDescriptor, method: MethodDescriptor) -> Callable[[Any, Any], Any]:
        if method.client_streaming:
            raise TypeError(f"{method.full_name}: the gate knows no client streams")

        async def answer(request: Any, context: Any) -> Any:
            target = self._target(service.full_name, method.name)
            self._enter()
            try:
                return await target(request, context)
            finally:
                self._leave()

        async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
            target, shutting = self._target(service.full_name, method.name), self._shutting
            self._enter()
            try:
                async for response in _until(shutting, aiter(target(request, context))):
                    yield response
                if shutting.is_set():
                    raise self._shut_error()
            finally:
                self._leave()

        return stream if method.server_streaming else answer

    def _target(self, service: str, method: str) -> Callable[[Any, Any], Any]:
        servicer = self._servicers.get(service)
        if servicer is None:
            raise self._shut_error()
        target: Callable[[Any, Any], Any] = getattr(servicer, method)
        return target

    def _shut_error(self) -> CloisterError:
        return CloisterError(
            Code.BROKER_SEALED,
            what="the key broker does not answer now",
            why=self._why,
            todo="an operator unseals it: cloister broker unseal",
        )

    def _enter(self) -> None:
        self._inside += 1
        self._empty.clear()

    def _leave(self) -> None:
        self._inside -= 1
        if not self._inside:
            self._empty.set()


def _stand_in(methods: dict[str, Callable[[Any, Any], Any]]) -> Any:
    return type("StandIn", (), {name: staticmethod(method) for name, method in methods.items()})()


async def _until(shutting: asyncio.Event, items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield items until there are no more or the event is set, whichever is first."""
    ending = asyncio.ensure_future(shutting.wait())
    following: asyncio.Future[Any] | None = None
    try:
        while not shutting.is_set():
            following = asyncio.ensure_future(anext(items))
            await asyncio.wait({following, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                return
            try:
                yield following.result()
            except StopAsyncIteration:
                return
    finally:
        ending.cancel()
        if following is not None and not following.done():
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        close = getattr(items, "aclose", None)
        if close is not None:
            await close()
