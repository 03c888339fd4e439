# SPDX-License-Identifier: Apache-2.0
"""Do the back ends still open what they wrapped? Asked again and again, so that nobody has to find out by a release.

What is found shows in health, in the metric `cloister_keybroker_backend_healthy` and in GetBackendStatus.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import prometheus_client

from cloister.errors import CloisterError
from cloister.runtime.logging import get_logger
from cloister_keybroker.backends import Capability, KeyBackend

_EVERY_S: Final = 30.0
_AFTER_FAILURE_S: Final = 5.0  # a back end that is back is noticed soon


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """What the last look at a back end found."""

    name: str
    capabilities: frozenset[Capability]
    problem: str  # what is wrong, why, and what to do; empty when nothing is

    @property
    def healthy(self) -> bool:
        return not self.problem


class BackendWatch:
    """Look at every back end; tell `on_change` when all of them are well, or no longer are."""

    def __init__(
        self,
        backends: Sequence[KeyBackend],
        *,
        on_change: Callable[[bool], Awaitable[None]],
        gauge: prometheus_client.Gauge,
    ) -> None:
        self._backends = backends
        self._on_change = on_change
        self._found: dict[str, BackendStatus] = {}
        self._told: bool | None = None
        self._gauge = gauge

    @property
    def statuses(self) -> Sequence[BackendStatus]:
        """What is known of each back end, the one for new keys first; empty before the first look."""
        return [self._found[backend.name] for backend in self._backends if backend.name in self._found]

    async def look(self) -> bool:
        """Look once; say whether all is well."""
        for backend, problem in zip(
            self._backends, await asyncio.gather(*(_problem(backend) for backend in self._backends)), strict=True
        ):
            before = self._found.get(backend.name)
            self._found[backend.name] = BackendStatus(backend.name, backend.capabilities, problem)
            self._gauge.labels(backend.name).set(0 if problem else 1)
            if problem and (before is None or before.healthy):
                get_logger().error("a back end fails", backend=backend.name, problem=problem)
            elif before is not None and not problem and not before.healthy:
                get_logger().info("a back end is well again", backend=backend.name)
        well = all(status.healthy for status in self.statuses)
        if well is not self._told:
            self._told = well
            await self._on_change(well)
        return well

    async def keep_looking(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            well = await self.look()
            await asyncio.sleep(_EVERY_S if well else _AFTER_FAILURE_S)


async def _problem(backend: KeyBackend) -> str:
    try:
        await backend.check()
    except CloisterError as error:
        return str(error)
    return ""


def backend_gauge(registry: prometheus_client.CollectorRegistry) -> prometheus_client.Gauge:
    """Make the metric; once for a process, which may be sealed and unsealed again."""
    name = "cloister_keybroker_backend_healthy"
    return prometheus_client.Gauge(name, "1 when the back end opened its canary.", ("backend",), registry=registry)
