# SPDX-License-Identifier: Apache-2.0
"""The workload CA as it runs: changes one after the other, each kept before it is told, and what is told now.

A change (a new epoch, a retired one, the passing of time) is
1. computed from the present state (epochs.py)
2. sealed and written, where the CA is kept (castate.py); a process that ends here finds the old state or the new one
3. followed by the registers' seals (tableseal.py)
4. told: a trust update, signed by every root that somebody of ours may hold
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from cloister.errors import CloisterError
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import Revoked
from cloister.runtime.logging import get_logger
from cloister.runtime.trust import Trust, sign_update
from cloister_attest.authority import Authority
from cloister_attest.castate import CaState, Vault
from cloister_attest.epochs import Epochs, Schedule
from cloister_attest.issued import Ended, IssuedRegister
from cloister_attest.tableseal import TableSealer

_LOOK_AGAIN: Final = timedelta(minutes=1)  # a clock that was set is noticed within this time


@dataclass(frozen=True, slots=True)
class Told:
    """What attest says about trust at one time."""

    epochs: Epochs
    bundle: TrustBundle
    bundle_bytes: bytes
    bundle_digest: bytes
    trust: Trust
    update: bytes
    accepted: frozenset[bytes]
    known: frozenset[bytes]


class WorkloadCa:
    """The CA of one process. Belongs to one event loop; reading is safe at any time."""

    def __init__(
        self,
        state: CaState,
        *,
        issued: IssuedRegister,
        schedule: Schedule,
        clock: Callable[[], datetime],
        vault: Vault | None = None,
        sealer: TableSealer,
    ) -> None:
        """Without a vault, nothing outlives this process. The sealer has begun, or is loaded, in this generation."""
        self._state = state
        self._issued = issued
        self._schedule = schedule
        self._clock = clock
        self._vault = vault
        self._sealer = sealer
        self._one_at_a_time = asyncio.Lock()
        self._counter = 0
        self._callbacks: list[Callable[[Told], None]] = []
        self._wake = asyncio.Event()
        self._told = self._tell(Revoked(authorities=state.epochs.retired_key_ids))

    @property
    def told(self) -> Told:
        """What is told now."""
        return self._told

    @property
    def issuing(self) -> Authority:
        """The epoch that issues, of those that everybody was told of."""
        return self._told.epochs.issuing

    @property
    def bundle(self) -> TrustBundle:
        return self._told.bundle

    @property
    def schedule(self) -> Schedule:
        return self._schedule

    def update_after(self, sequence: int) -> bytes:
        """Return the trust update for somebody who has that of `sequence`; empty when there is none newer."""
        return self._told.update if self._told.trust.sequence > sequence else b""

    def on_change(self, callback: Callable[[Told], None]) -> None:
        """Have `callback` called on the event loop after something else is told."""
        self._callbacks.append(callback)

    async def start(self) -> Epochs:
        """Announce a new epoch; raise CloisterError when another change is under way, or it cannot be kept."""
        return await self._change(lambda epochs, now: epochs.start(self._schedule, now=now), "a CA epoch was announced")

    async def retire(self, epoch: str) -> Epochs:
        """End an epoch now; errors as for `start`."""
        return await self._change(lambda epochs, now: epochs.retire(epoch, now=now), "a CA epoch was retired")

    async def advance(self) -> Epochs:
        """Do what time has made due."""
        return await self._change(lambda epochs, _now: epochs, "the CA has changed")

    async def revoke(self) -> Ended:
        """Tell which certificates ended, after denials or registrations changed."""
        async with self._one_at_a_time:
            return await self._tell_ended()

    async def run(self) -> None:
        """Advance as time passes, until cancelled. What cannot be kept now is tried again."""
        while True:
            due = self._state.epochs.next_change(self._schedule) - self._clock()
            wait = min(max(due, timedelta()), _LOOK_AGAIN)
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), wait.total_seconds() + 0.01)
            try:
                await self.advance()
            except CloisterError as error:
                get_logger().error("the CA cannot change", error=error.code.text, what=error.what, why=error.why)
                await asyncio.sleep(1.0)

    async def _change(self, step: Callable[[Epochs, datetime], Epochs], event: str) -> Epochs:
        async with self._one_at_a_time:
            now = self._clock()
            due = self._state.epochs.advance(self._schedule, now=now)
            await self._put(due, now, "the CA has changed")
            return await self._put(step(due, now), now, event)

    async def _put(self, after: Epochs, now: datetime, event: str) -> Epochs:
        """Take steps 2 to 4 for one generation, if it is another one."""
        if after is not self._state.epochs:
            state = replace(self._state, epochs=after)
            if self._vault is not None:
                await asyncio.to_thread(self._vault.save, state, now=now)  # 2
            self._state, self._counter = state, 0
            try:
                await self._sealer.reseal(after.generation)  # 3
            except CloisterError as error:
                # Trust changes all the same. The next start refuses the registers, if they are not mended until then.
                get_logger().critical("the registers cannot be sealed", error=error.code.text, why=error.why)
            get_logger().warning(
                event,
                issuing=after.issuing.epoch,
                trusted=[authority.epoch for authority in after.trusted],
                generation=after.generation,
                bundle=after.bundle.digest.hex(),
            )
            await self._tell_ended()  # 4
            self._wake.set()
        return after

    async def _tell_ended(self) -> Ended:
        epochs, told = self._state.epochs, self._told
        try:
            ended = await self._issued.ended(now=self._clock())
        except CloisterError:
            if told.epochs is epochs:
                raise
            # Another epoch is told all the same: with what was revoked before.
            ended = Ended(told.trust.revoked.certificates, frozenset(), False)
        revoked = Revoked(ended.certificates, epochs.retired_key_ids)
        if revoked != told.trust.revoked or told.epochs is not epochs:
            self._told = self._tell(revoked)
            for callback in tuple(self._callbacks):
                callback(self._told)
        return ended

    def _tell(self, revoked: Revoked) -> Told:
        epochs = self._state.epochs
        self._counter += 1
        bundle = epochs.bundle
        trust = Trust(bundle, epochs.sequence(self._counter), revoked)
        update = sign_update(trust, epochs.signers(self._clock()))
        return Told(epochs, bundle, bundle.to_bytes(), bundle.digest, trust, update, epochs.accepted, epochs.known)
