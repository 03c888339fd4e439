# SPDX-License-Identifier: Apache-2.0
"""How long a TD may hold its data keys: each lease is renewed at half of its life, or what it holds has to end.

A refusal ends it at once. What may pass (a broker or attest that is away or busy) is tried again until the lease is
over. Leases are measured from the moment of asking on the event loop's clock: the host of a TD can set the wall
clock, but a lease is as long as the broker signed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, NoReturn

from cloister.errors import CloisterError, Code, Kind

_FINAL: Final = frozenset({Kind.DENIED, Kind.NOT_FOUND})
_TRIES: Final = 16  # of a renewal, between half of a lease and its end


@dataclass(frozen=True, slots=True)
class Held:
    """What a lease is on; all data keys of one version for one purpose are renewed as one."""

    key_uri: str
    purpose: str
    key_version: int


@dataclass(frozen=True, slots=True)
class Lease:
    """From when and how long, in seconds of the event loop's clock."""

    begun: float
    length: float

    @property
    def end(self) -> float:
        return self.begun + self.length


class Leases:
    """The leases of one TD. For one event loop."""

    def __init__(self, renew: Callable[[Held], Awaitable[Lease]]) -> None:
        self._renew = renew
        self._leases: dict[Held, Lease] = {}
        self._more = asyncio.Event()

    def begin(self, held: Held, lease: Lease) -> None:
        """Remember a lease; a newer one on the same replaces it."""
        self._leases[held] = lease
        self._more.set()

    async def keep(self) -> NoReturn:
        """Renew everything held, now and later; raise CloisterError(LEASE_ENDED) when a renewal fails for good."""
        keepers: dict[Held, asyncio.Task[NoReturn]] = {}
        try:
            while True:
                for held in self._leases.keys() - keepers.keys():
                    keepers[held] = asyncio.create_task(self._keep(held))
                self._more.clear()
                more = asyncio.create_task(self._more.wait())
                try:
                    await asyncio.wait({more, *keepers.values()}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    more.cancel()
                for keeper in keepers.values():
                    if keeper.done():
                        keeper.result()
        finally:
            for keeper in keepers.values():
                keeper.cancel()
            await asyncio.gather(*keepers.values(), return_exceptions=True)

    async def _keep(self, held: Held) -> NoReturn:
        loop = asyncio.get_running_loop()
        while True:
            lease = self._leases[held]
            await asyncio.sleep(lease.begun + lease.length / 2 - loop.time())
            if self._leases[held] is lease:  # else it was released again meanwhile, which is as good
                self._leases[held] = await self._renewed(held, lease)

    async def _renewed(self, held: Held, lease: Lease) -> Lease:
        loop = asyncio.get_running_loop()
        pause = lease.length / 2 / _TRIES
        last: CloisterError | None = None
        try:
            async with asyncio.timeout_at(lease.end):
                while True:
                    try:
                        return await self._renew(held)
                    except CloisterError as error:
                        if error.kind in _FINAL:
                            raise _ended(held, error) from error
                        last = error
                    await asyncio.sleep(min(pause, lease.end - loop.time()))
        except TimeoutError:
            raise _ended(held, last) from last


def _ended(held: Held, error: CloisterError | None) -> CloisterError:
    """Return the end of a lease, with the explanation of whoever refused it."""
    if error is None:
        why, todo = "no answer came before it ended", "check that the key broker and attest run"
    else:
        why = f"{error.code.text}: {error.what}" + (f"; {error.why}" if error.why else "")
        todo = error.todo
    return CloisterError(
        Code.LEASE_ENDED,
        what=f"the lease on {held.key_uri} for {held.purpose} was not renewed",
        why=why,
        todo=todo or "ask the key's owner",
        block=error.block if error else "",
    )
