# SPDX-License-Identifier: Apache-2.0
"""Another root key under the same store: every handle and every MAC is made again, all of them in one transaction.

Whoever had the old root key, or its shares, opens nothing of the store as it is from then on. A copy that was made
before stays what it was: a backup is as secret as the root key of its time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace as replaced
from typing import TypeAlias

import apsw

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.transparency.entry import Entry
from cloister_keybroker import log, logkey, mark
from cloister_keybroker.backends import KeyBackend, KeyRef
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.rootkey import RootKey
from cloister_keybroker.sealrecord import SealRecord
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import Transaction

# By key and version: the handle that was found, and the one it becomes.
Remade: TypeAlias = Mapping[tuple[KeyUri, int], tuple[bytes, bytes]]


async def remade_handles(store: KeyStore, backend: KeyBackend, root_key: RootKey, known: Remade) -> Remade:
    """Return all handles of the store as they are under another root key; those in `known` are not made again.

    A back end in front of another store is asked once for every key version that is not known.
    """
    found: dict[tuple[KeyUri, int], tuple[bytes, bytes]] = {}
    for record, versions in await store.read(_all_versions):
        for version in versions:
            place = (record.uri, version.number)
            before = known.get(place)
            if before is not None and before[0] == version.handle:
                found[place] = before
            else:
                handle = await backend.rekey(KeyRef.of(record, version.number), version.handle, root_key)
                found[place] = (version.handle, handle)
    return found


def replace(
    connection: apsw.Connection,
    *,
    old: RootKey,
    new: RootKey,
    record: SealRecord,
    handles: Remade,
    entry: Entry,
    time_ms: int,
) -> None:
    """Put the store under another root key; for a transaction that is undone when this raises.

    Everything is authenticated under the old root key as it is read. Raises STORE_DAMAGED, or SEAL_STATE when a
    handle has changed since `handles` were made.
    """
    before, after = Transaction(connection, old, OrderedDict()), Transaction(connection, new, OrderedDict())
    for key, versions in _all_versions(before):
        after.update_key(key)
        for version in versions:
            was, becomes = handles.get((key.uri, version.number), (b"", b""))
            if was != version.handle:
                raise CloisterError(
                    Code.SEAL_STATE,
                    what="the root key was not replaced",
                    why=f"{key.uri}, version {version.number}, changed meanwhile",
                    todo="try again; the old root key is still in force",
                )
            after.put_version(key.uri, replaced(version, handle=becomes))
    for uri, number, policy in before.all_policies():
        after.put_policy(uri, number, policy)
    for place in before.retired.all():
        after.retired.add(place)
    log.DecisionLog(connection, old).rekey(new)
    logkey.rekey(connection, old, new)
    mark.write(connection, new, record)
    after.append(entry, time_ms=time_ms)


def is_unused(connection: apsw.Connection) -> bool:
    """Say whether nothing was ever done with a store: it has no key, and its log no entry."""
    row = connection.execute("SELECT EXISTS (SELECT 1 FROM keys) OR EXISTS (SELECT 1 FROM decisions)").fetchone()
    return row == (0,)


def _all_versions(transaction: Transaction) -> list[tuple[KeyRecord, list[KeyVersion]]]:
    return [(record, transaction.versions(record)) for record in transaction.all_records()]
