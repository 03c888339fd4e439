# SPDX-License-Identifier: Apache-2.0
"""A user's connection to a running stack: certificate kept fresh, one channel a service, evidence checked here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from cloister.cli import login
from cloister.cli.state import StateDirectory, read_stack
from cloister.identity import Role

if TYPE_CHECKING:
    from cloister.cli.state import Stack
    from cloister.guest.owner import VerifiedService
    from cloister.runtime.credentials import CredentialSource
    from cloister.transparency.documents import SignedReceipt

CALL_TIMEOUT_S: Final = 15.0
_ROLES: Final = {
    "attest": Role.ATTEST,
    "keybroker": Role.KEYBROKER,
    "trainer": Role.TRAINER,
    "gateway": Role.GATEWAY,
}


class Session:
    """Channels of one user to the services of one stack; use `open_session`."""

    def __init__(self, state: StateDirectory, stack: Stack, credentials: CredentialSource) -> None:
        self.state = state
        self.stack = stack
        self.credentials = credentials
        self.verified: dict[str, VerifiedService] = {}  # see cloister.cli.trust
        self.receipts: list[SignedReceipt] = []  # of data keys and imports, in their order
        self._channels: dict[str, Any] = {}

    @property
    def tenant(self) -> str:
        return self.stack.tenant

    def channel(self, service: str) -> Any:
        """Return the mutual-TLS channel to a service, opened at first use."""
        from cloister.runtime.channel import open_channel

        if service not in self._channels:
            self._channels[service] = open_channel(
                self.stack.endpoint(service), role=_ROLES[service], credentials=self.credentials
            )
        return self._channels[service]

    async def call(self, method: Any, request: Any, *, what: str, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call one RPC; raise CloisterError for every way it can fail."""
        from cloister.runtime.channel import invoke

        return await invoke(method, request, timeout_s=timeout_s, what=what)

    async def aclose(self) -> None:
        for channel in self._channels.values():
            await channel.close()


@asynccontextmanager
async def open_session(state: StateDirectory) -> AsyncIterator[Session]:
    """Open a session on the stack that runs in the state directory; renew the user's certificate when it is due."""
    from cloister.runtime.credentials import FileCredentials

    stack = read_stack(state)
    await login.ensure_certificate(state, enrolment=stack.endpoint("attest", "enrolment"))
    session = Session(state, stack, FileCredentials(state.user_key, state.user_chain, state.bundle))
    try:
        yield session
    finally:
        await session.aclose()
