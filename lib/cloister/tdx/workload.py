# SPDX-License-Identifier: Apache-2.0
"""What runs in a TD, as its RTMR3 says: names of our events, their payloads, and the one order they come in.

    environment, trust-bundle, script, config, [rank], [backend], dataset*, sealed, key*

Keys of the TD are made after `sealed`; from then on only the keys it received are recorded. An event of another name,
a second one of the same name or another order is refused: the verifier knows what it reads, or does not accept it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeVar

from cloister.errors import CloisterError
from cloister.identity import Role, is_name
from cloister.keyuri import KeyUri
from cloister.tdx.eventlog import RUNTIME_EVENT_TYPE, RUNTIME_IMR, Event, EventLog, EventLogRejected
from cloister.tlv import parse_tlv, sha384, tlv

ENVIRONMENT: Final = "cloister.environment"  # digest of the installed distributions
TRUST_BUNDLE: Final = "cloister.trust-bundle"  # digest of the bundle the TD trusts
SCRIPT: Final = "cloister.workload.script"  # digest of the code it runs
CONFIG: Final = "cloister.workload.config"  # digest of its configuration
RANK: Final = "cloister.workload.rank"  # which rank of which job it will be
BACKEND: Final = "cloister.workload.backend"  # which backend of which model it will be
DATASET: Final = "cloister.workload.dataset"  # name and manifest digest of a sealed directory it will read
SEALED: Final = "cloister.workload.sealed"  # its role; nothing is measured any more
KEY: Final = "cloister.key"  # a key it received

MAX_WORLD_SIZE: Final = 65_535
MAX_DATASETS: Final = 64
_DIGEST_SIZE: Final = 48
_MAX_DATASET_NAME: Final = 256

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RankClaim:
    """One rank of a training job; true when attest's job registry knows it."""

    tenant: str
    job: str
    rank: int
    world_size: int

    def to_payload(self) -> bytes:
        return tlv("cloister-rank-v1", self.tenant, self.job, self.rank, self.world_size)

    @classmethod
    def from_payload(cls, payload: bytes) -> RankClaim:
        tenant, job, rank, world_size = parse_tlv(payload, label="cloister-rank-v1", fields=4)
        claim = cls(_name(tenant), _name(job), _number(rank), _number(world_size))
        if not claim.rank < claim.world_size <= MAX_WORLD_SIZE:
            raise ValueError(f"rank {claim.rank} of {claim.world_size}")
        return claim


@dataclass(frozen=True, slots=True)
class BackendClaim:
    """One backend process of a deployed model; true when attest's registry knows it."""

    tenant: str
    model: str
    backend: str

    def to_payload(self) -> bytes:
        return tlv("cloister-backend-v1", self.tenant, self.model, self.backend)

    @classmethod
    def from_payload(cls, payload: bytes) -> BackendClaim:
        tenant, model, backend = parse_tlv(payload, label="cloister-backend-v1", fields=3)
        return cls(_name(tenant), _name(model), _name(backend))


@dataclass(frozen=True, slots=True)
class DatasetClaim:
    """A sealed directory that the workload will read."""

    name: str
    manifest_digest: bytes  # 48 bytes

    def to_payload(self) -> bytes:
        return tlv("cloister-dataset-v1", self.name, self.manifest_digest)

    @classmethod
    def from_payload(cls, payload: bytes) -> DatasetClaim:
        name, digest = parse_tlv(payload, label="cloister-dataset-v1", fields=2)
        if not 1 <= len(name) <= _MAX_DATASET_NAME:
            raise ValueError("the name is empty or too long")
        return cls(name.decode(), _digest(digest))


@dataclass(frozen=True, slots=True)
class KeyClaim:
    """A key that was released to the TD, and the broker's receipt for it."""

    uri: str
    version: int
    receipt_digest: bytes  # 48 bytes: SHA-384 of the receipt

    def to_payload(self) -> bytes:
        return tlv("cloister-key-v1", self.uri, self.version, self.receipt_digest)

    @classmethod
    def from_payload(cls, payload: bytes) -> KeyClaim:
        uri, version, digest = parse_tlv(payload, label="cloister-key-v1", fields=3)
        try:
            return cls(str(KeyUri.parse(uri.decode())), _number(version), _digest(digest))
        except CloisterError:
            raise ValueError("not a key URI") from None


@dataclass(frozen=True, slots=True)
class Workload:
    """The measured workload of one TD."""

    role: Role
    environment: bytes  # 48 bytes
    trust_bundle: bytes  # 48 bytes
    script: bytes  # 48 bytes
    config: bytes  # 48 bytes
    rank: RankClaim | None  # of role rank, and of no other
    backend: BackendClaim | None  # of role backend, and of no other
    datasets: tuple[bytes, ...]  # manifest digests (48 bytes), in the order measured
    dataset_names: tuple[str, ...]  # of the same length as `datasets`
    keys_received: tuple[KeyClaim, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadPlan:
    """What a TD is going to measure, in the one order, before it makes its keys. Digests have 48 bytes."""

    role: Role
    environment: bytes
    trust_bundle: bytes
    script: bytes
    config: bytes
    rank: RankClaim | None = None
    backend: BackendClaim | None = None
    datasets: tuple[DatasetClaim, ...] = ()

    @property
    def events(self) -> tuple[Event, ...]:
        """All events up to `sealed`; raise EventLogRejected when no verifier would read this workload from them."""
        measured = [
            (ENVIRONMENT, self.environment),
            (TRUST_BUNDLE, self.trust_bundle),
            (SCRIPT, self.script),
            (CONFIG, self.config),
            *((RANK, claim.to_payload()) for claim in (self.rank,) if claim is not None),
            *((BACKEND, claim.to_payload()) for claim in (self.backend,) if claim is not None),
            *((DATASET, claim.to_payload()) for claim in self.datasets),
            (SEALED, self.role.encode("ascii")),
        ]
        events = tuple(Event.runtime(name, payload) for name, payload in measured)
        read_workload(EventLog(events))
        return events

    @property
    def rtmr3(self) -> bytes:
        """RTMR3 once the workload is sealed, on every machine; raises as `events`."""
        return sealed_register(EventLog(self.events))


class _Cursor:
    """Take events one after the other."""

    def __init__(self, events: Sequence[Event]) -> None:
        self._events = events
        self._next = 0

    def at(self, name: str) -> bool:
        return self._next < len(self._events) and self._events[self._next].name == name

    def take(self, name: str, read: Callable[[bytes], _T]) -> _T:
        if not self.at(name):
            found = self._events[self._next].name if self._next < len(self._events) else "the end of the log"
            _reject(f"wanted event {name}, got {found}")
        payload = self._events[self._next].payload
        self._next += 1
        try:
            return read(payload)
        except ValueError as error:
            raise EventLogRejected(f"event {name}: {error}") from None

    def finish(self) -> None:
        if self._next < len(self._events):
            _reject(f"event {self._events[self._next].name} is not allowed at its place")


def read_workload(log: EventLog) -> Workload:
    """Read RTMR3's events; raise EventLogRejected unless they are exactly one workload's, in order."""
    events = log.of(RUNTIME_IMR)
    # A boot event in RTMR3 has a digest over unknown data: it could hide anything.
    if any(event.event_type != RUNTIME_EVENT_TYPE for event in events):
        _reject("register 3 holds an event that is not a runtime event")
    cursor = _Cursor(events)
    environment = cursor.take(ENVIRONMENT, _digest)
    trust_bundle = cursor.take(TRUST_BUNDLE, _digest)
    script = cursor.take(SCRIPT, _digest)
    config = cursor.take(CONFIG, _digest)
    rank = cursor.take(RANK, RankClaim.from_payload) if cursor.at(RANK) else None
    backend = cursor.take(BACKEND, BackendClaim.from_payload) if cursor.at(BACKEND) else None
    datasets: list[DatasetClaim] = []
    while cursor.at(DATASET):
        datasets.append(cursor.take(DATASET, DatasetClaim.from_payload))
    role = cursor.take(SEALED, _role)
    keys: list[KeyClaim] = []
    while cursor.at(KEY):
        keys.append(cursor.take(KEY, KeyClaim.from_payload))
    cursor.finish()

    if (rank is not None) != (role is Role.RANK) or (backend is not None) != (role is Role.BACKEND):
        _reject(f"the rank and backend events do not fit role {role}")
    names = tuple(dataset.name for dataset in datasets)
    if len(names) > MAX_DATASETS or len(set(names)) != len(names):
        _reject(f"more than {MAX_DATASETS} data sets, or two of one name")
    return Workload(
        role=role,
        environment=environment,
        trust_bundle=trust_bundle,
        script=script,
        config=config,
        rank=rank,
        backend=backend,
        datasets=tuple(dataset.manifest_digest for dataset in datasets),
        dataset_names=names,
        keys_received=tuple(keys),
    )


def sealed_register(log: EventLog) -> bytes:
    """Return RTMR3 as it was after the event `sealed` and before any key: what is known before a workload runs."""
    register = bytes(_DIGEST_SIZE)
    for event in log.of(RUNTIME_IMR):
        register = sha384(register, event.digest)
        if event.name == SEALED:
            break
    return register


def _digest(payload: bytes) -> bytes:
    if len(payload) != _DIGEST_SIZE:
        raise ValueError(f"{len(payload)} bytes where a SHA-384 digest has {_DIGEST_SIZE}")
    return payload


def _name(field: bytes) -> str:
    text = field.decode("ascii")
    if not is_name(text):
        raise ValueError("not a name of 1 to 63 of a-z, 0-9 and hyphen")
    return text


def _number(field: bytes) -> int:
    if len(field) != 8:
        raise ValueError(f"a number of {len(field)} bytes, not 8")
    return int.from_bytes(field, "big")


def _role(payload: bytes) -> Role:
    role = Role(payload.decode("ascii"))
    if not role.is_workload:
        raise ValueError(f"{role} is not a role of a TD")
    return role


def _reject(reason: str) -> NoReturn:
    raise EventLogRejected(reason)
