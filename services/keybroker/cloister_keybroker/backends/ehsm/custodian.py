# SPDX-License-Identifier: Apache-2.0
"""A custodian that speaks to Intel's EHSM-KMS: one AES-256-GCM key there for every key version here.

A part is 32 random bytes of the broker's, encrypted by EHSM and bound to `KeyRef.custodian_aad`. They are the broker's
own because whoever runs EHSM's host sees them in either case, and must not also choose them. What was encrypted is
opened once before it is relied on.

EHSM deletes its keys at the age of 355 days, without a word: `lifetime` has them made anew from day 300.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection
from datetime import timedelta
from pathlib import Path
from typing import Final

from cloister import ehsm
from cloister.secret import SecretBytes
from cloister_keybroker.backends import PART_SIZE, Capability, Clock, FreshPart, KeyRef, Lifetime
from cloister_keybroker.backends.canary import CANARY_KEY
from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.calls import Calls
from cloister_keybroker.backends.ehsm.client import EhsmClient
from cloister_keybroker.backends.ehsm.enclave import EnclaveCheck
from cloister_keybroker.backends.ehsm.failures import Undone
from cloister_keybroker.backends.ehsm.intents import Journal
from cloister_keybroker.backends.ehsm.options import EhsmOptions
from cloister_keybroker.backends.ehsm.orphans import Orphans
from cloister_keybroker.backends.failures import answer_invalid, refused
from cloister_keybroker.backends.uri import BackendUri

REWRAP_AFTER: Final = timedelta(days=300)
REFUSE_AFTER: Final = timedelta(days=340)
_WRAPPED_SIZE: Final = PART_SIZE + ehsm.GCM_OVERHEAD
_CANARY_AAD: Final = CANARY_KEY.custodian_aad()


class EhsmCustodian:
    """Keys of one user of an EHSM."""

    capabilities = frozenset({Capability.DISABLE, Capability.DESTROY})
    lifetime: Lifetime | None = Lifetime(rewrap_after=REWRAP_AFTER, refuse_after=REFUSE_AFTER)

    def __init__(
        self, client: EhsmClient, *, name: str, journal: Journal, clock: Clock, enclave: EnclaveCheck | None = None
    ) -> None:
        self.name = name
        self._client = client
        self._clock = clock
        self._journal = journal
        self._orphans = Orphans(client, journal, name=name, clock=clock)
        self._enclave = enclave

    async def create(self, key: KeyRef) -> bytes:  # noqa: ARG002 - EHSM learns nothing about the key
        await self._require_enclave()
        with self._orphans.creating():
            intent = await asyncio.to_thread(self._journal.begin, int(self._clock().timestamp() * 1000))
            self._orphans.watch(intent)
            try:
                keyid = await self._client.create_key()
            except Undone:
                await asyncio.to_thread(self._journal.drop, intent)
                raise
            # After any other failure the intent stays: whether there is a key now is for `reconcile` to find out.
            await asyncio.to_thread(self._journal.answered, intent, keyid)
        return keyid.encode()

    async def generate(self, locator: bytes, aad: bytes) -> FreshPart:
        await self._require_enclave()
        secret, keyid = SecretBytes(os.urandom(PART_SIZE)), self._keyid(locator)
        wrapped = await self._client.encrypt(keyid, secret, aad)
        if await self._client.decrypt(keyid, wrapped, aad) != secret:
            raise answer_invalid(self.name, "it does not open what it has just wrapped")
        return FreshPart(secret, wrapped)

    async def unwrap(self, locator: bytes, wrapped: bytes, aad: bytes) -> SecretBytes:
        keyid = self._keyid(locator)
        if len(wrapped) != _WRAPPED_SIZE:
            raise refused(self.name, f"what the store has is not {_WRAPPED_SIZE} bytes", "the stored key is damaged")
        await self._require_enclave()
        secret = await self._client.decrypt(keyid, wrapped, aad)
        if aad == _CANARY_AAD:
            self._client.keep_canary(keyid, wrapped, aad, secret)
        return secret

    async def enable(self, locator: bytes) -> None:
        await self._client.enable_key(self._keyid(locator))

    async def disable(self, locator: bytes) -> None:
        await self._client.disable_key(self._keyid(locator))

    async def destroy(self, locator: bytes) -> None:
        keyid = self._keyid(locator)
        await self._client.delete_key(keyid)
        # EHSM says yes to everything here, and does nothing about a key of another user.
        if any(listed.keyid == keyid for listed in await self._client.list_keys()):
            raise refused(self.name, "it says that it deleted a key, and still lists it")
        await asyncio.to_thread(self._orphans.forget, keyid)

    async def reconcile(self, in_use: Collection[bytes]) -> None:
        """Find keys that were made and that nothing uses, and disable them; a week later delete those known by name."""
        await self._orphans.reconcile(frozenset(self._keyid(locator) for locator in in_use))

    async def probe(self) -> None:
        # Cheap, because it is asked every half minute: credentials and clocks show when the canary is unwrapped.
        await self._client.version()
        await self._require_enclave()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def _require_enclave(self) -> None:
        if self._enclave is not None:
            await self._enclave.require(self._client)

    def _keyid(self, locator: bytes) -> str:
        keyid = locator.decode("ascii", errors="replace")
        if not ehsm.is_key_id(keyid):
            raise refused(self.name, "what the store has is not one of its key ids", "the stored key is damaged")
        return keyid


async def open_ehsm(uri: BackendUri, state_dir: Path, clock: Clock) -> EhsmCustodian:
    """Prepare a custodian of the configuration; whether EHSM is there shows with the first call."""
    options = EhsmOptions.of(uri)
    calls = Calls(options, clock=clock, breaker=Breaker())
    enclave = None
    if options.enclave_policy is not None:
        enclave = EnclaveCheck.read(options.enclave_policy, backend=options.name, clock=clock)
    return EhsmCustodian(
        EhsmClient(calls),
        name=options.name,
        journal=Journal(state_dir / f"intents-{options.name}"),
        clock=clock,
        enclave=enclave,
    )
