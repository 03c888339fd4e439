# SPDX-License-Identifier: Apache-2.0
"""The broker behind its gate: desks and services that exist only while the root key is known."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from cloister.guest.enrol import Identity
from cloister.runtime.server import Mounted
from cloister_keybroker.answers import ReceiptSigner
from cloister_keybroker.backends.embedded import EmbeddedBackend
from cloister_keybroker.owners import OwnerDesk
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.service import mounted
from cloister_keybroker.store import KeyStore
from cloister_keybroker.workloads import ReleaseDesk


@asynccontextmanager
async def assembled(store: KeyStore, root_key: RootKey, *, identity: Identity) -> AsyncIterator[Sequence[Mounted]]:
    """Give the services over an unsealed store, for the gate; what they need ends with the block.

    Work that goes on in the background begins and ends here, too: a sealed broker does none.
    """
    backend = EmbeddedBackend(root_key)
    await backend.check()
    receipt = identity.guest.keys.receipt
    log_key = await store.begin_life(receipt, identity.spiffe_id, time_ms=int(_now().timestamp() * 1000))
    signer = ReceiptSigner(receipt, log_id=log_key.log_id)
    owners = OwnerDesk(store=store, backend=backend, signer=signer, broker_id=str(identity.spiffe_id), clock=_now)
    releases = ReleaseDesk(
        store=store,
        backend=backend,
        signer=signer,
        credentials=identity,
        broker_id=identity.spiffe_id,
        clock=_now,
    )
    yield mounted(owners, releases, store)


def _now() -> datetime:
    return datetime.now(UTC)
