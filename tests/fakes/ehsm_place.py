# SPDX-License-Identifier: Apache-2.0
"""A running EHSM development server with a client enrolled, and the back end's URI for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.calls import Calls
from cloister_keybroker.backends.ehsm.client import EhsmClient
from cloister_keybroker.backends.ehsm.options import EhsmLimits, EhsmOptions
from cloister_keybroker.backends.uri import BackendUri
from cloister_sim.ehsm.__main__ import write_client
from cloister_sim.ehsm.faults import Faults
from cloister_sim.ehsm.server import EhsmServer
from cloister_sim.ehsm.service import Generation

Clock = Callable[[], datetime]


class EhsmPlace:
    """The server and its files: `directory/server`, `directory/client`. It can be stopped and started again."""

    def __init__(
        self,
        directory: Path,
        *,
        clock: Clock = lambda: datetime.now(UTC),
        generation: Generation = Generation.CURRENT,
    ) -> None:
        self.clock = clock
        self.server_clock = clock  # the server's, when they are to differ
        self._directory = directory
        self._generation = generation
        self._listen = "127.0.0.1:0"
        self.server = self._make()

    def _make(self) -> EhsmServer:
        return EhsmServer(
            self._directory / "server",
            listen=self._listen,
            clock=lambda: int(self.server_clock().timestamp() * 1000),
            generation=self._generation,
        )

    async def __aenter__(self) -> Self:
        await self.server.start()
        self._listen = self.server.url.removeprefix("https://")
        await write_client(self.server, self._directory / "client")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop()

    async def restart(self) -> None:
        """Stop the server and start another over the same storage, at the same address."""
        await self.server.stop()
        await self.start()

    async def start(self) -> None:
        faults = self.server.faults
        self.server = self._make()
        self.server.faults = faults
        await self.server.start()

    @property
    def faults(self) -> Faults:
        return self.server.faults

    @property
    def client_directory(self) -> Path:
        return self._directory / "client"

    @property
    def uri(self) -> str:
        return self.uri_with(ca=str(self.client_directory / "ca.pem"))

    def uri_with(self, **options: str) -> str:
        """Return the URI with these options besides the credentials."""
        files = {name: str(self.client_directory / name) for name in ("appid", "apikey")}
        return f"ehsm:{self.server.url}?" + "&".join(f"{n.replace('_', '-')}={v}" for n, v in (files | options).items())

    def options(self, limits: EhsmLimits | None = None) -> EhsmOptions:
        """Return what the broker makes of the URI."""
        return replace(EhsmOptions.of(BackendUri.parse(self.uri)), limits=limits or EhsmLimits())

    def client(self, limits: EhsmLimits | None = None, breaker: Breaker | None = None) -> EhsmClient:
        """Return the broker's client."""
        return EhsmClient(Calls(self.options(limits), clock=self.clock, breaker=breaker or Breaker()))
