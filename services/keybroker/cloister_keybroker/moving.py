# SPDX-License-Identifier: Apache-2.0
"""Key versions on the move: to the back end of the configuration, and to a new key in the one they are in.

A version's wrapping key stays the same, and with it everything that was ever sealed. First the new place is made, then
the store is told in one transaction that says what it replaces, then the old place is given up: at no moment is there
none, and a version that changed meanwhile keeps its old place.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeAlias

from cloister.errors import CloisterError
from cloister.keyuri import KeyUri
from cloister.runtime.logging import get_logger
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.backends.factory import Backends, backend_of
from cloister_keybroker.keys import KeyVersion
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import Transaction

# The new handle of a version, or None when it stays where it is.
_Remake: TypeAlias = Callable[[KeyRef, bytes], Awaitable[bytes | None]]


@dataclass(frozen=True, slots=True)
class Moved:
    """What one round did."""

    moved: int
    left: int  # key versions that are still elsewhere
    problem: CloisterError | None  # the first one, when there was any


async def migrate(store: KeyStore, backends: Backends, *, limit: int) -> Moved:
    """Bring up to `limit` key versions to the first back end. One that cannot be moved does not stop the others."""
    places = await store.read(lambda transaction: transaction.versions_elsewhere(backends.name, limit=limit))
    moved, problem = 0, None
    for uri, number in places:
        try:
            moved += await _move(store, backends, uri, number, backends.move)
        except CloisterError as error:
            problem = problem or error
            get_logger().error("a key version could not be moved", key=str(uri), version=number, problem=str(error))
    counts = await store.read(lambda transaction: transaction.versions_by_backend())
    return Moved(moved, sum(count for name, count in counts.items() if name != backends.name), problem)


async def maintain(store: KeyStore, backends: Backends, now: datetime) -> Moved:
    """Make again what is due at its back end; a back end that lets keys grow old deletes them one day."""

    async def remake(key: KeyRef, handle: bytes) -> bytes | None:
        return await backends.maintain(key, handle, now)

    moved, problem = 0, None
    for uri, number in await store.read(lambda transaction: transaction.all_versions()):
        try:
            moved += await _move(store, backends, uri, number, remake)
        except CloisterError as error:
            problem = problem or error
            get_logger().error("a key version could not be renewed", key=str(uri), version=number, problem=str(error))
    return Moved(moved, 0, problem)


async def _move(store: KeyStore, backends: Backends, uri: KeyUri, number: int, remake: _Remake) -> bool:
    found = await store.read(lambda transaction: transaction.key(uri, version=number))
    if found is None or found.version is None:
        return False  # destroyed meanwhile
    key, old = KeyRef.of(found.record, number), found.version
    handle = await remake(key, old.handle)
    if handle is None:
        return False
    new = replace(old, handle=handle, backend=backend_of(key, handle))

    def work(transaction: Transaction) -> bool:
        present = transaction.key(uri, version=number)
        if present is None or present.version != old or present.record.state is not key.state:
            return False
        transaction.put_version(uri, new)
        return True

    replaced = await store.write(work)
    await _give_up(backends, key, old if replaced else new)
    return replaced


async def _give_up(backends: Backends, key: KeyRef, version: KeyVersion) -> None:
    """Nothing names this place any more; what stays there opens nothing, and costs a place."""
    try:
        await backends.destroy(key, version.handle)
    except CloisterError as error:
        get_logger().warning("an unused key stays at its back end", backend=version.backend, problem=str(error))
