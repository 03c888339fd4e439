# SPDX-License-Identifier: Apache-2.0
"""Rows of the store <-> values, inside one transaction. Every row is authenticated under the root key when it is read.

A key's record has a MAC, and its digest stands in the decision log; versions and policies have MACs of their own;
publications are a hash chain that ends in the record.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

import apsw

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.tlv import sha384, tlv
from cloister.transparency.entry import Entry, LoggedEntry
from cloister_keybroker.approvals import ApprovalBook
from cloister_keybroker.datasets import Publication, Registry
from cloister_keybroker.keycache import Changes, Memo
from cloister_keybroker.keys import KeyRecord, KeyVersion
from cloister_keybroker.log import DecisionLog, LogPlace
from cloister_keybroker.logproofs import LogProofs
from cloister_keybroker.retired import RetiredHandles
from cloister_keybroker.rootkey import RootKey

_COLUMNS: Final = tuple(field.name for field in fields(KeyRecord))  # the table has a column for every field
_SELECT: Final = f"SELECT {', '.join(_COLUMNS)}, mac FROM keys"  # noqa: S608 - constants
_INSERT: Final = (
    f"INSERT INTO keys (tenant, {', '.join(_COLUMNS)}, mac)"  # noqa: S608 - constants
    f" VALUES (:tenant, {', '.join(':' + name for name in _COLUMNS)}, :mac)"
)
_UPDATE: Final = f"UPDATE keys SET {', '.join(f'{name} = :{name}' for name in (*_COLUMNS, 'mac'))} WHERE uri = :uri"  # noqa: S608
_CACHED_REGISTRIES: Final = 64


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy as it was put: its text, and the signed envelope it came in."""

    yaml: bytes
    envelope: bytes


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key and its newest version."""

    record: KeyRecord
    backend: str  # of its newest version; empty when its material is destroyed


@dataclass(frozen=True, slots=True)
class StoredKey:
    """A key, the version of it that was asked for, and its newest policy."""

    record: KeyRecord
    version: KeyVersion | None  # None: there is no such version, or its material is destroyed
    policy: StoredPolicy | None  # in force or withdrawn

    @property
    def policy_yaml(self) -> bytes:
        """The policy in force; empty when there is none, or it is withdrawn."""
        return b"" if self.policy is None or self.record.policy_withdrawn else self.policy.yaml

    @property
    def backend(self) -> str:
        """The back end of the version that was asked for; empty when it is not there."""
        return self.version.backend if self.version else ""

    def material(self) -> KeyVersion:
        """Return the version that was asked for; raise KEY_DISABLED or WRAPPED_KEY_INVALID when it is not there."""
        if self.version is not None:
            return self.version
        if self.record.state is KeyState.DESTROYED:
            raise CloisterError(
                Code.KEY_DISABLED,
                what=f"{self.record.uri} is destroyed",
                why="its owner had it destroyed, and its waiting period is over",
                todo="what it sealed stays sealed for good",
            )
        raise CloisterError(
            Code.WRAPPED_KEY_INVALID,
            what=f"{self.record.uri} has no such version",
            why=f"its versions are 1 to {self.record.newest}",
            todo="use the version from the header of the sealed object",
        )


class Transaction:
    """What can be read and written while a transaction is open."""

    def __init__(
        self,
        connection: apsw.Connection,
        root_key: RootKey,
        registries: OrderedDict[bytes, Registry],
        *,
        records: Memo[KeyRecord] | None = None,
        changes: Changes | None = None,
    ) -> None:
        self._connection = connection
        self._root_key = root_key
        self._registries = registries
        self._records = records or Memo()  # by their rows, MAC and all
        self._changes = changes or Changes()
        self.log = DecisionLog(connection, root_key)
        self.proofs = LogProofs(connection, self.log)
        self.retired = RetiredHandles(connection, root_key)
        self.approvals = ApprovalBook(connection)

    def key(self, uri: KeyUri, *, version: int = 0) -> StoredKey | None:
        """Return a key with one version of it (0: the newest), or None when there is no such key.

        Raises STORE_DAMAGED when what is read is not what this broker wrote.
        """
        row = self._connection.execute(f"{_SELECT} WHERE uri = ?", (str(uri),)).fetchone()
        if row is None:
            return None
        record = self._record(row)
        return StoredKey(record, self._version(record, version or record.newest), self._policy(record))

    def record(self, uri: KeyUri) -> KeyRecord | None:
        """Return a key's record alone, or None; raise STORE_DAMAGED when its row is not one this broker wrote."""
        row = self._connection.execute(f"{_SELECT} WHERE uri = ?", (str(uri),)).fetchone()
        return None if row is None else self._record(row)

    def keys(self, tenant: str, *, after: str, limit: int) -> list[ListedKey]:
        """Return a tenant's keys in the order of their URIs, beginning behind `after`."""
        rows = self._connection.execute(
            f"{_SELECT} WHERE tenant = ? AND uri > ? ORDER BY uri LIMIT ?", (tenant, after, limit)
        )
        records = [self._record(row) for row in rows]
        newest = [(record, self._version(record, record.newest)) for record in records]
        return [ListedKey(record, version.backend if version else "") for record, version in newest]

    def count_keys(self, tenant: str) -> int:
        """Count a tenant's keys, destroyed ones among them."""
        row = self._connection.execute("SELECT count(*) FROM keys WHERE tenant = ?", (tenant,)).fetchone()
        return int(row[0]) if row else 0

    def versions(self, record: KeyRecord) -> list[KeyVersion]:
        """Return all versions of a key, oldest first; none of a destroyed one."""
        rows = self._connection.execute(
            "SELECT version, handle, backend, created_ms, mac FROM key_versions WHERE uri = ? ORDER BY version",
            (str(record.uri),),
        )
        found = [self._authentic(record, row) for row in rows]
        expected = 0 if record.state is KeyState.DESTROYED else record.newest
        if [version.number for version in found] != list(range(1, expected + 1)):
            raise store_damaged(f"versions of {record.uri} are missing or were added")
        return found

    def insert_key(self, record: KeyRecord, version: KeyVersion) -> None:
        """Store a new key and its first version."""
        self._connection.execute(_INSERT, {"tenant": record.uri.tenant, **self._row(record)})
        self.put_version(record.uri, version)

    def update_key(self, record: KeyRecord) -> None:
        """Store a key's record as it is now."""
        self._changes.note()
        self._connection.execute(_UPDATE, self._row(record))

    def put_version(self, uri: KeyUri, version: KeyVersion) -> None:
        """Store a new version, or where the material of an old one is now."""
        self._changes.note()
        self._connection.execute(
            "INSERT OR REPLACE INTO key_versions VALUES (?, ?, ?, ?, ?, ?)",
            (
                str(uri),
                version.number,
                version.handle,
                version.backend,
                version.created_ms,
                self._version_mac(uri, version),
            ),
        )

    def remove_versions(self, uri: KeyUri) -> None:
        """Forget where a key's material was, after its destruction."""
        self._changes.note()
        self._connection.execute("DELETE FROM key_versions WHERE uri = ?", (str(uri),))

    def insert_policy(self, uri: KeyUri, version: int, policy: StoredPolicy) -> None:
        """Store a policy; earlier versions stay."""
        self._changes.note()
        self._connection.execute(
            "INSERT INTO policies VALUES (?, ?, ?, ?, ?)",
            (str(uri), version, policy.yaml, policy.envelope, self._policy_mac(uri, version, policy)),
        )

    def put_policy(self, uri: KeyUri, version: int, policy: StoredPolicy) -> None:
        """Store a policy that is there, authenticated anew."""
        self._changes.note()
        self._connection.execute(
            "UPDATE policies SET mac = ? WHERE uri = ? AND version = ?",
            (self._policy_mac(uri, version, policy), str(uri), version),
        )

    def all_policies(self) -> Iterator[tuple[KeyUri, int, StoredPolicy]]:
        """Yield every policy of every key, replaced ones too, authenticated."""
        places: list[Any] = self._connection.execute("SELECT uri, version FROM policies").fetchall()
        for uri, version in places:
            key = KeyUri.parse(uri)
            yield key, version, self._authentic_policy(key, version)

    def insert_publication(self, record: KeyRecord, publication: Publication) -> None:
        """Store the publication that `record`, of which it is the last, already counts."""
        self._connection.execute(
            "INSERT INTO publications VALUES (?, ?, ?, ?, ?, ?)",
            (
                str(record.uri),
                record.publications,
                publication.dataset_id,
                publication.version,
                publication.manifest_digest,
                publication.data_key_digest,
            ),
        )

    def registry(self, record: KeyRecord) -> Registry:
        """Return what was published under a key; raise STORE_DAMAGED unless it is what the record says."""
        found = self._registries.get(record.published)
        if found is not None:
            self._registries.move_to_end(record.published)
            return found
        rows = self._connection.execute(
            "SELECT dataset_id, version, manifest_digest, data_key_digest FROM publications WHERE uri = ?"
            " ORDER BY number",
            (str(record.uri),),
        )
        try:
            registry = Registry(Publication(*row) for row in rows)
        except OverflowError:  # a version below zero
            registry = Registry()
        if (registry.size, registry.head) != (record.publications, record.published):
            raise store_damaged(f"the published data sets of {record.uri} were changed, added or removed")
        self._registries[record.published] = registry
        while len(self._registries) > _CACHED_REGISTRIES:
            self._registries.popitem(last=False)
        return registry

    def to_destroy(self, *, until_ms: int) -> list[KeyUri]:
        """Return the keys whose waiting period ends by then, the longest overdue first."""
        rows = self._connection.execute(
            "SELECT uri FROM keys WHERE state = 'destruction-scheduled' AND destroy_at_ms <= ? ORDER BY destroy_at_ms",
            (until_ms,),
        )
        return [KeyUri.parse(uri) for (uri,) in rows]

    def next_destruction_ms(self) -> int | None:
        """Return when the next waiting period ends (Unix milliseconds)."""
        row = self._connection.execute(
            "SELECT min(destroy_at_ms) FROM keys WHERE state = 'destruction-scheduled'"
        ).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    def versions_elsewhere(self, backend: str, *, limit: int) -> list[tuple[KeyUri, int]]:
        """Return key versions of other back ends than this."""
        rows = self._connection.execute(
            "SELECT uri, version FROM key_versions WHERE backend <> ? ORDER BY uri, version LIMIT ?", (backend, limit)
        )
        return [(KeyUri.parse(uri), version) for uri, version in rows]

    def versions_at(self, backend: str) -> list[tuple[KeyUri, int, bytes]]:
        """Return the key versions of a back end with their handles, as they stand there: nothing is authenticated."""
        rows: list[Any] = self._connection.execute(
            "SELECT uri, version, handle FROM key_versions WHERE backend = ?", (backend,)
        ).fetchall()
        return [(KeyUri.parse(uri), version, handle) for uri, version, handle in rows]

    def versions_by_backend(self) -> dict[str, int]:
        """Count key versions by back end."""
        return dict(self._connection.execute("SELECT backend, count(*) FROM key_versions GROUP BY backend"))

    def append(self, entry: Entry, *, time_ms: int, token: str = "") -> LogPlace:
        """Append to the decision log; `token` is the (authentic) attestation result behind its evidence_digest."""
        return self.log.append(entry, time_ms=time_ms, token=token)

    def evidence(self, digest: bytes) -> str | None:
        """Return the token that an entry's evidence_digest names, or None when none was kept."""
        return self.log.evidence(digest)

    def released_to_job(self, *, uri: KeyUri, job: str, policy_digest: bytes) -> int:
        """Count past grants."""
        return self.log.released_to_job(key_uri=str(uri), job=job, policy_digest=policy_digest)

    def newest_entries(self, tenant: str, *, key_uri: str, limit: int) -> list[LoggedEntry]:
        """Return log entries of a tenant, newest first."""
        return list(self.log.newest(tenant, key_uri=key_uri, limit=limit))

    def all_records(self) -> Iterator[KeyRecord]:
        """Yield every key of every tenant, authenticated."""
        for row in self._connection.execute(_SELECT):
            yield self._record(row)

    def _record(self, row: tuple[Any, ...]) -> KeyRecord:
        return self._records.get(row, lambda: self._authentic_record(row))

    def _authentic_record(self, row: tuple[Any, ...]) -> KeyRecord:
        values = dict(zip(_COLUMNS, row, strict=False))
        try:
            values["uri"] = KeyUri.parse(values["uri"])
            values["state"] = KeyState(values["state"])
            values["purposes"] = frozenset(Purpose(name) for name in values["purposes"].split(",") if name)
            for flag in ("policy_withdrawn", "imported"):
                values[flag] = bool(values[flag])
            record = KeyRecord(**values)
            mac = _key_mac(self._root_key, record)
        except (ValueError, OverflowError, CloisterError):
            raise store_damaged("the row of a key is malformed") from None
        if not hmac.compare_digest(row[-1], mac):
            raise store_damaged(f"the row of {record.uri} was not written by this broker")
        return record

    def _row(self, record: KeyRecord) -> Mapping[str, Any]:
        values: dict[str, Any] = {name: getattr(record, name) for name in _COLUMNS}
        values["uri"] = str(record.uri)
        values["state"] = record.state.value
        values["purposes"] = ",".join(sorted(purpose.value for purpose in record.purposes))
        return values | {"mac": _key_mac(self._root_key, record)}

    def _version(self, record: KeyRecord, number: int) -> KeyVersion | None:
        row = self._connection.execute(
            "SELECT version, handle, backend, created_ms, mac FROM key_versions WHERE uri = ? AND version = ?",
            (str(record.uri), number),
        ).fetchone()
        if (row is not None) != (1 <= number <= record.newest and record.state is not KeyState.DESTROYED):
            raise store_damaged(f"version {number} of {record.uri} is missing or was added")
        return None if row is None else self._authentic(record, row)

    def _authentic(self, record: KeyRecord, row: tuple[Any, ...]) -> KeyVersion:
        version = KeyVersion(*row[:-1])
        # A number below zero has no encoding, and this broker wrote none.
        if version.created_ms < 0 or not hmac.compare_digest(row[-1], self._version_mac(record.uri, version)):
            raise store_damaged(f"version {version.number} of {record.uri} was not written by this broker")
        return version

    def _policy(self, record: KeyRecord) -> StoredPolicy | None:
        return self._authentic_policy(record.uri, record.policy_version) if record.policy_version else None

    def _authentic_policy(self, uri: KeyUri, version: int) -> StoredPolicy:
        row: Any = self._connection.execute(
            "SELECT yaml, envelope, mac FROM policies WHERE uri = ? AND version = ?", (str(uri), version)
        ).fetchone()
        if row is not None:
            policy = StoredPolicy(row[0], row[1])
            if hmac.compare_digest(row[2], self._policy_mac(uri, version, policy)):
                return policy
        raise store_damaged(f"the policy of {uri} was removed or edited")

    def _version_mac(self, uri: KeyUri, version: KeyVersion) -> bytes:
        return self._root_key.mac(
            tlv(
                "cloister-key-version-v1",
                str(uri),
                version.number,
                version.handle,
                version.backend,
                version.created_ms,
            )
        )

    def _policy_mac(self, uri: KeyUri, version: int, policy: StoredPolicy) -> bytes:
        return self._root_key.mac(
            tlv("cloister-policy-row-v2", str(uri), version, sha384(policy.yaml), sha384(policy.envelope))
        )


def _key_mac(root_key: RootKey, record: KeyRecord) -> bytes:
    return root_key.mac(tlv("cloister-key-row-v1", record.digest()))


def store_damaged(why: str) -> CloisterError:
    """Say that the store does not hold; nothing in it is changed."""
    return CloisterError(
        Code.STORE_DAMAGED,
        what="the key store does not verify",
        why=why,
        todo="keep the file for an investigation and restore the store and its root key from the same backup",
    )
