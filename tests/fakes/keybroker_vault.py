# SPDX-License-Identifier: Apache-2.0
"""A vault with a gate and a real store, without a network: what an operator does to it, in a few words."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.runtime.server import Mounted
from cloister.secret import SecretBytes
from cloister.transparency.entry import LoggedEntry
from cloister_keybroker.backends import KeyBackend, KeyRef
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.backends.factory import Backends
from cloister_keybroker.config import RootKeyPlace
from cloister_keybroker.gate import Gate
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.operators import Operator
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import Source
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import StoredPolicy, Transaction
from cloister_keybroker.unsealing import NewRoot, new_root_from_shares
from cloister_keybroker.vault import State, Vault
from fakes.certs import TRUST_DOMAIN

ADA = SpiffeId.of_user(TRUST_DOMAIN, tenant="ops", user="ada")
GRACE = SpiffeId.of_user(TRUST_DOMAIN, tenant="ops", user="grace")
KEYS = "cloister.api.keybroker.v1.KeyOwnerService"
URI = KeyUri.parse("cloister-key://hospital-a/datasets/reviews")


def operator(spiffe_id: SpiffeId = ADA) -> Operator:
    return Operator(spiffe_id, b"certificate", "TLSv1.3, X25519MLKEM768", "request-1")


@dataclass
class MonotonicClock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class AVault:
    """A vault, what it told its health, and whether it lets calls through."""

    vault: Vault
    gate: Gate
    clock: MonotonicClock
    told: list[bool] = field(default_factory=list)

    @property
    def state(self) -> State:
        return self.vault.status().state

    async def answers(self) -> bool:
        """Say whether a call gets through the gate."""
        stand_in = next(mounted.servicer for mounted in self.gate.mounted() if mounted.descriptor == KEYS)
        try:
            return bool(await stand_in.GetKey(None, None) == "behind the gate")
        except Exception:
            return False

    async def hand_in(self, *secrets: SecretBytes, by: SpiffeId = ADA) -> None:
        for secret in secrets:
            await self.vault.hand_in(secret, operator(by))

    async def initialized(self, *, threshold: int = 2, count: int = 3) -> NewRoot:
        """Make a store under shares; return them."""
        new = new_root_from_shares(threshold=threshold, count=count)
        await self.vault.initialize(new)
        return new

    async def rekey(self, new: NewRoot, *present: SecretBytes) -> None:
        """Begin to replace the root key, and show the present one."""
        await self.vault.begin_rekey(new)
        await self.hand_in(*present)

    async def log(self) -> list[LoggedEntry]:
        store = self.vault.opened.store
        return await store.read(lambda t: t.newest_entries("ops", key_uri="", limit=100))


class _Answering:
    async def GetKey(self, request: object, context: object) -> str:
        return "behind the gate"


@asynccontextmanager
async def _embedded(root_key: RootKey) -> AsyncIterator[Backends]:
    yield Backends([EmbeddedBackend(root_key)])


@asynccontextmanager
async def _behind(store: KeyStore, backends: Backends) -> AsyncIterator[Sequence[Mounted]]:
    yield [Mounted(KEYS, lambda *_: None, _Answering())]


@asynccontextmanager
async def a_vault(directory: Path, source: Source = Source.SHARES) -> AsyncIterator[AVault]:
    """Give a vault over the store in `directory`; opening it again is a restart of the broker."""
    place = RootKeyPlace(source, directory / "root.key" if source is Source.FILE else Path())
    clock, gate = MonotonicClock(), Gate()
    vault = await Vault.open(directory / "store.sqlite", place, _embedded, clock_s=clock)
    made = AVault(vault, gate, clock)

    async def tell(unsealed: bool) -> None:
        made.told.append(unsealed)

    try:
        await vault.attach(gate, _behind, tell)
        yield made
    finally:
        await vault.aclose()


async def put_key(
    store: KeyStore, backend: KeyBackend, uri: KeyUri = URI, *, state: KeyState = KeyState.ENABLED
) -> bytes:
    """Put a key with two versions straight into the store, with its change in the log; return a wrapped data key."""
    record = KeyRecord(
        uri=uri, owner=str(ADA), signer="did:key:z6Mk", state=state, purposes=frozenset(Purpose), created_ms=1, newest=2
    )
    versions = [
        KeyVersion(number, await backend.create(KeyRef.of(record, number)), backend.name, 1) for number in (1, 2)
    ]
    fresh = await backend.generate(KeyRef.of(record, 1), versions[0].handle)
    entry = operator().entry("create-key")

    def work(transaction: Transaction) -> None:
        transaction.insert_key(record, versions[0])
        transaction.put_version(uri, versions[1])
        transaction.insert_policy(uri, 1, StoredPolicy(b"replaced", b"envelope"))
        transaction.append(
            replace(entry, tenant=uri.tenant, key_uri=str(uri), record_digest=record.digest()), time_ms=1
        )

    await store.write(work)
    return fresh.wrapped


async def opens(store: KeyStore, backend: KeyBackend, wrapped: bytes, uri: KeyUri = URI) -> SecretBytes:
    """Unwrap a data key of version 1 as the broker does."""
    stored = await store.read(lambda transaction: transaction.key(uri, version=1))
    assert stored is not None
    return await backend.unwrap(KeyRef.of(stored.record, 1), stored.material().handle, wrapped)
