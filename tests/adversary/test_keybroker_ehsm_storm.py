# SPDX-License-Identifier: Apache-2.0
"""A storm of everything that can go wrong on the way to EHSM: never a wrong key, never a key that nobody knows of."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister_keybroker.backends import FreshDataKey, KeyRef
from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.custodian import EhsmCustodian
from cloister_keybroker.backends.ehsm.intents import Journal
from cloister_keybroker.backends.ehsm.options import EhsmLimits
from cloister_keybroker.backends.remote import RemoteBackend
from cloister_keybroker.rootkey import RootKey
from cloister_sim.ehsm import faults
from cloister_sim.ehsm.faults import Fault
from fakes.custodian_in_memory import Moments
from fakes.ehsm_place import EhsmPlace
from fakes.keybroker_harness import KEY

OPERATIONS = 150
LIMITS = EhsmLimits(connect_s=0.3, total_s=0.6)
ENABLED = KeyRef(KEY, 1, KeyState.ENABLED, frozenset({Purpose.TRAIN}))
# What a caller may be told; anything else would be a mistake of ours.
EXPECTED = {
    Code.CUSTODIAN_UNAVAILABLE,
    Code.CUSTODIAN_ANSWER_INVALID,
    Code.CUSTODIAN_REFUSED,
    Code.STORE_DAMAGED,  # a wrong part opens no handle
    Code.KEY_DISABLED,  # disabling got as far as EHSM and no further, and was not repeated yet
}
FAULTS: tuple[Callable[[], Fault], ...] = (
    lambda: Fault(drop=True),
    lambda: Fault(drop_answer=True),
    lambda: Fault(times=2, drop_answer=True),
    lambda: Fault(change=faults.answer(500, "Server exception.")),
    lambda: Fault(change=faults.answer(400, {})),
    lambda: Fault(change=faults.answer(400, "Timestamp can't be repeated in 20 minutes")),
    lambda: Fault(change=faults.answer(400, None)),
    lambda: Fault(body=b"<html>", status=502),
    lambda: Fault(body=b"{"),
    lambda: Fault(delay_s=0.05),
    lambda: Fault("Decrypt", change=lambda answer: answer | {"result": {"plaintext": "A" * 42 + "8="}}),
    lambda: Fault("Encrypt", change=lambda answer: answer | {"result": {"ciphertext": "A" * 80}}),
)


@dataclass
class Version:
    """A key version as the store has it."""

    key: KeyRef
    handle: bytes
    data_keys: list[FreshDataKey] = field(default_factory=list)


class Storm:
    """Random operations of a broker, each of which is done right or not at all."""

    def __init__(self, place: EhsmPlace, backend: RemoteBackend, seed: int) -> None:
        self.place = place
        self.backend = backend
        self.draw = random.Random(seed)
        self.versions: list[Version] = []
        self.failures = 0
        self._operations = [
            *(self.create, self.create, self.generate, self.generate),
            *(self.unwrap, self.unwrap, self.unwrap, self.restate, self.destroy),
        ]

    async def one(self) -> None:
        if self.draw.random() < 0.5:
            self.place.faults.add(self.draw.choice(FAULTS)())
        if self.draw.random() < 0.02:
            await self.place.restart()
        operation = self.draw.choice(self._operations)
        began = asyncio.get_running_loop().time()
        try:
            await operation()
        except CloisterError as error:
            if error.code not in EXPECTED:
                raise
            self.failures += 1
        # An operation is at most a handful of calls, each within its deadline.
        assert asyncio.get_running_loop().time() - began < 6 * LIMITS.total_s

    async def create(self) -> None:
        key = replace(ENABLED, version=len(self.versions) + 1)
        self.versions.append(Version(key, await self.backend.create(key)))

    async def generate(self) -> None:
        if version := self._pick(KeyState.ENABLED):
            version.data_keys.append(await self.backend.generate(version.key, version.handle))

    async def unwrap(self) -> None:
        if (version := self._pick(KeyState.ENABLED)) and version.data_keys:
            fresh = self.draw.choice(version.data_keys)
            assert await self.backend.unwrap(version.key, version.handle, fresh.wrapped) == fresh.secret

    async def restate(self) -> None:
        if version := self._pick(self.draw.choice([KeyState.ENABLED, KeyState.DISABLED])):
            state = KeyState.DISABLED if version.key.state is KeyState.ENABLED else KeyState.ENABLED
            version.handle = await self.backend.restate(version.key, version.handle, state)
            version.key = replace(version.key, state=state)

    async def destroy(self) -> None:
        if len(self.versions) > 4 and (version := self._pick(KeyState.ENABLED)):
            self.versions.remove(version)  # the store forgets it first, and asks until it is done
            await self.backend.destroy(version.key, version.handle)

    def _pick(self, state: KeyState) -> Version | None:
        fitting = [version for version in self.versions if version.key.state is state]
        return self.draw.choice(fitting) if fitting else None


async def settled(attempt: Callable[[], Awaitable[Any]]) -> Any:
    """Repeat until it succeeds, as the broker does when the storm is over."""
    while True:
        try:
            return await attempt()
        except CloisterError as error:
            if error.code not in EXPECTED:
                raise
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(3))
async def test_every_operation_is_done_right_or_not_at_all(tmp_path: Path, seed: int) -> None:
    async with EhsmPlace(tmp_path / "ehsm", clock=Moments()) as place:
        breaker = Breaker(first_pause_s=0.001, longest_pause_s=0.01)
        custodian = EhsmCustodian(
            place.client(LIMITS, breaker), name="ehsm", journal=Journal(tmp_path / "intents"), clock=place.clock
        )
        root = RootKey(SecretBytes(secrets.token_bytes(32)))
        backend = RemoteBackend(custodian, root, clock=place.clock, canary_file=tmp_path / "canary")
        await backend.check()
        storm = Storm(place, backend, seed)
        for _ in range(OPERATIONS):
            await storm.one()
        place.faults.clear()
        await custodian.aclose()
        assert storm.failures > 10
        assert len(storm.versions) >= 4

        # The storm is over. What has to open opens.
        client = place.client(LIMITS)
        heir = EhsmCustodian(client, name="ehsm", journal=Journal(tmp_path / "intents"), clock=place.clock)
        after = RemoteBackend(heir, root, clock=place.clock, canary_file=tmp_path / "canary")
        for version in storm.versions:
            version.handle = await settled(lambda v=version: after.restate(v.key, v.handle, KeyState.ENABLED))
            version.key = replace(version.key, state=KeyState.ENABLED)
            for fresh in version.data_keys:
                assert await after.unwrap(version.key, version.handle, fresh.wrapped) == fresh.secret

        # And what nobody uses is put away: of the enabled keys at EHSM, all are in use.
        assert isinstance(place.clock, Moments)
        place.clock.advance(minutes=21)
        await after.reconcile([version.handle for version in storm.versions])
        await after.check()
        enabled = [key for key in await client.list_keys() if key.enabled]
        assert len(enabled) == len(storm.versions) + 1  # the canary
        await after.aclose()
