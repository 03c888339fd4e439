# SPDX-License-Identifier: Apache-2.0
"""The broker behind its gate: desks and services that exist only while the root key is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import prometheus_client

from cloister.guest.enrol import Identity
from cloister.runtime.logging import get_logger
from cloister.runtime.server import Mounted
from cloister_keybroker.answers import ReceiptSigner
from cloister_keybroker.approvaldesk import ApprovalDesk
from cloister_keybroker.approvalservice import mounted_approvals
from cloister_keybroker.backends.factory import Backends, open_backends
from cloister_keybroker.backends.watch import BackendWatch
from cloister_keybroker.config import Config
from cloister_keybroker.datakeys import DataKeyDesk
from cloister_keybroker.desk import Office
from cloister_keybroker.destruction import DestructionDesk
from cloister_keybroker.logreading import keep_reading
from cloister_keybroker.logservice import mounted_log
from cloister_keybroker.moving import Mover
from cloister_keybroker.owners import OwnerDesk
from cloister_keybroker.ownerservice import Desks
from cloister_keybroker.policydesk import PolicyDesk
from cloister_keybroker.policyservice import mounted_policies
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.service import mounted
from cloister_keybroker.store import KeyStore
from cloister_keybroker.workloads import ReleaseDesk


@dataclass(frozen=True, slots=True)
class Watching:
    """Where it shows whether the back ends are well."""

    on_change: Callable[[bool], Awaitable[None]]
    gauge: prometheus_client.Gauge


@asynccontextmanager
async def opened_backends(root_key: RootKey, *, config: Config) -> AsyncIterator[Backends]:
    """Give the back ends of the configuration; they are closed when the root key is forgotten."""
    section = config.keybroker
    state_dir = config.service.state_dir
    backends = await open_backends(section.backend, section.former_backends, root_key, state_dir=state_dir, clock=_now)
    try:
        yield backends
    finally:
        await backends.aclose()


@asynccontextmanager
async def assembled(
    store: KeyStore, backends: Backends, *, identity: Identity, watching: Watching
) -> AsyncIterator[Sequence[Mounted]]:
    """Give the services over an unsealed store, for the gate; what they need ends with the block.

    Work that goes on in the background begins and ends here, too: a sealed broker does none.
    """
    receipt = identity.guest.keys.receipt
    log_key = await store.begin_life(receipt, identity.spiffe_id, time_ms=int(_now().timestamp() * 1000))
    signer = ReceiptSigner(receipt, log_id=log_key.log_id)
    office = Office(store, backends, signer, identity.spiffe_id, _now)
    desks = Desks(OwnerDesk(office, hpke=identity.guest.keys.hpke), DataKeyDesk(office), DestructionDesk(office))
    releases = ReleaseDesk(
        store=store,
        backend=backends,
        signer=signer,
        credentials=identity,
        broker_id=identity.spiffe_id,
        clock=_now,
    )
    watch = BackendWatch(backends.all(), on_change=watching.on_change, gauge=watching.gauge)
    await watch.look()
    mover = Mover(store, backends, caller=str(identity.spiffe_id), clock=_now)
    works = (watch.keep_looking(), mover.keep_up(), desks.destruction.keep_carrying_out(), keep_reading(store))
    async with in_background(*works):
        yield [
            *mounted(desks, releases),
            *mounted_approvals(ApprovalDesk(store, _now)),
            *mounted_policies(PolicyDesk(store, identity), _now),
            *mounted_log(store, log_key),
        ]


@asynccontextmanager
async def in_background(*works: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Let these run during the block. One that ends by itself has met a mistake of the program, and that is logged."""
    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(_log_end)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        get_logger().critical("work in the background ended", exc_info=task.exception())


def _now() -> datetime:
    return datetime.now(UTC)
