# SPDX-License-Identifier: Apache-2.0
"""Which CA epochs there are, which of them issues, and what becomes of them with time. Pure: time is an argument.

    announced   trusted, issues nothing yet: everybody learns of it first (`Schedule.lead`)
    issuing     exactly one
    ending      trusted, issues nothing any more, until all that it issued has run out (`Schedule.overlap`)
    gone        not trusted; its root still signs for a day, so that whoever missed the change can follow it

An epoch goes down this list and never up. At most four are trusted at once, as many as a bundle may hold. Retiring one
takes it to `gone` at once, and its CAs are named in trust updates as long as a call may run that it let in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cloister.errors import CloisterError, Code
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.limits import Limits
from cloister.runtime.trust import SigningRoot
from cloister_attest.authority import Authority, bundle_of, root_from_secret, root_to_secret

_MAX_ENDING: Final = 2  # beside one that issues and one that is announced: a bundle holds four
_MAX_GONE: Final = 32  # of seven CAs each: an update names 256
_MAX_FAREWELLS: Final = 8  # an update holds 16 signatures
_MAX_SERVED: Final = 64  # bundles of the past, by digest
_FAREWELL: Final = timedelta(days=1)
_LAST_MOMENT: Final = timedelta(hours=2)  # before the CAs run out there is no time for an announcement
# The longest a stream may run, and an hour for the certificate it began with.
CALLS_OUTLIVE: Final = timedelta(seconds=Limits().max_stream_s) + timedelta(hours=1)
_COUNTER_BITS: Final = 24  # trust updates of one generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long each stage lasts."""

    lead: timedelta = timedelta(minutes=3)
    overlap: timedelta = timedelta(hours=13)
    renew_after: timedelta = timedelta(days=60)


@dataclass(frozen=True, slots=True)
class Announced:
    """An epoch that does not issue yet."""

    authority: Authority
    issues_at: datetime


@dataclass(frozen=True, slots=True)
class Ending:
    """An epoch that issues no more."""

    authority: Authority
    ends_at: datetime


@dataclass(frozen=True, slots=True)
class Gone:
    """An epoch that is not trusted any more. `key_ids` are of its CAs when it was retired before its time."""

    root: SigningRoot  # all that is left of it
    since: datetime
    key_ids: frozenset[bytes]

    def signing(self, now: datetime) -> bool:
        return now < self.since + _FAREWELL


@dataclass(frozen=True, slots=True)
class Served:
    """A bundle that this CA has given out."""

    digest: bytes  # SHA-384, 48 bytes
    epochs: frozenset[str]


@dataclass(frozen=True, slots=True)
class Epochs:
    """The state of the CA. Every change makes another value; `generation` rises with each."""

    trust_domain: str
    generation: int
    bundle_generation: int  # when the trusted epochs last changed
    issuing: Authority
    announced: Announced | None = None
    ending: tuple[Ending, ...] = ()
    gone: tuple[Gone, ...] = ()
    served: tuple[Served, ...] = ()

    @classmethod
    def begin(cls, trust_domain: str, *, now: datetime) -> Epochs:
        """Return a CA with one new epoch."""
        return cls(trust_domain, 1, 1, Authority.create(now=now))._serving()

    @property
    def trusted(self) -> tuple[Authority, ...]:
        """The epochs of the bundle, newest first."""
        newest = (self.announced.authority,) if self.announced else ()
        return (*newest, self.issuing, *(found.authority for found in self.ending))

    @property
    def bundle(self) -> TrustBundle:
        sequence = self.bundle_generation << _COUNTER_BITS
        return bundle_of(self.trusted, trust_domain=self.trust_domain, sequence=sequence)

    @property
    def accepted(self) -> frozenset[bytes]:
        """Digests of bundles that trust nobody who is not trusted now: a TD may hold any of them."""
        names = {authority.epoch for authority in self.trusted}
        return frozenset(found.digest for found in self.served if found.epochs <= names)

    @property
    def known(self) -> frozenset[bytes]:
        """Digests of all bundles of this CA: a TD may have begun with any of them."""
        return frozenset(found.digest for found in self.served)

    def signers(self, now: datetime) -> tuple[SigningRoot, ...]:
        """Return the roots that sign trust updates: whatever a TD of ours holds, one of them is in it."""
        gone = [found.root for found in self.gone if found.signing(now)]
        return (*(authority.root for authority in self.trusted), *gone[:_MAX_FAREWELLS])

    @property
    def retired_key_ids(self) -> frozenset[bytes]:
        """Key identifiers of CAs that were retired before their time."""
        return frozenset().union(*(found.key_ids for found in self.gone))

    def sequence(self, counter: int) -> int:
        """Return the sequence of the trust update number `counter` of this generation."""
        if not 0 <= counter < 1 << _COUNTER_BITS:
            raise ValueError("a generation has 2**24 updates")
        return (self.generation << _COUNTER_BITS) + counter

    def next_generation(self) -> Epochs:
        """Return the same, in another generation: what was told in the last one is older than what is told now."""
        return replace(self, generation=self.generation + 1)

    def start(self, schedule: Schedule, *, now: datetime) -> Epochs:
        """Announce a new epoch; raise CloisterError(EPOCH_CHANGING) while another change is under way."""
        if self.announced is not None or len(self.ending) >= _MAX_ENDING:
            raise CloisterError(
                Code.EPOCH_CHANGING,
                what="the CA is changing already",
                why="an epoch is announced" if self.announced else f"{len(self.ending)} epochs have not ended yet",
                todo="`cloister attest epochs` shows until when; retire one to end it at once",
            )
        return self._announcing(schedule.lead, now)._after(self)

    def retire(self, epoch: str, *, now: datetime) -> Epochs:
        """Trust an epoch no more; raise CloisterError(EPOCH_NOT_FOUND) unless it is trusted now."""
        return self._retiring(epoch, now)._after(self)

    def _retiring(self, epoch: str, now: datetime) -> Epochs:
        if self.announced is not None and self.announced.authority.epoch == epoch:
            return replace(self, announced=None)._without(self.announced.authority, now)
        for found in self.ending:
            if found.authority.epoch == epoch:
                ending = tuple(other for other in self.ending if other is not found)
                return replace(self, ending=ending)._without(found.authority, now)
        if self.issuing.epoch != epoch:
            raise CloisterError(
                Code.EPOCH_NOT_FOUND,
                what=f"there is no trusted epoch {epoch[:64]!r}",
                why="it has ended, or never was",
                todo="`cloister attest epochs` lists those there are",
            )
        successor = self.announced.authority if self.announced else Authority.create(now=now)
        return replace(self, issuing=successor, announced=None)._without(self.issuing, now)

    def advance(self, schedule: Schedule, *, now: datetime) -> Epochs:
        """Return what time has made of it; the same object when that is nothing."""
        found = self._advanced(schedule, now)
        return self if found is self else found._after(self)

    def _advanced(self, schedule: Schedule, now: datetime) -> Epochs:
        found = self
        if found.announced is not None and now >= found.announced.issues_at:
            ending = Ending(found.issuing, min(now + schedule.overlap, found.issuing.ends))
            ending_now = (ending, *found.ending)
            found = replace(found, issuing=found.announced.authority, announced=None, ending=ending_now)
        for over in [old for old in found.ending if now >= old.ends_at]:
            ending_still = tuple(old for old in found.ending if old is not over)
            found = replace(found, ending=ending_still)._without(over.authority, now, retired=False)
        if any(now >= old.since + CALLS_OUTLIVE and not old.signing(now) for old in found.gone):
            kept = tuple(old for old in found.gone if now < old.since + CALLS_OUTLIVE or old.signing(now))
            found = replace(found, gone=kept)
        if found.announced is None and len(found.ending) < _MAX_ENDING:
            if now >= found.issuing.ends - _LAST_MOMENT:
                found = found._announcing(timedelta(), now)._advanced(schedule, now)
            elif now >= found.issuing.started + schedule.renew_after:
                found = found._announcing(schedule.lead, now)
        return found

    def next_change(self, schedule: Schedule) -> datetime:
        """Return when `advance` will make something else of it."""
        by_age = min(self.issuing.started + schedule.renew_after, self.issuing.ends - _LAST_MOMENT)
        times = [old.ends_at for old in self.ending]
        times.append(self.announced.issues_at if self.announced else by_age)
        times += [old.since + max(CALLS_OUTLIVE, _FAREWELL) for old in self.gone]
        return min(times)

    def to_secret(self) -> dict[str, Any]:
        """Return all of it, private keys included, as values for JSON. To be sealed at once."""
        return {
            "trust_domain": self.trust_domain,
            "generation": self.generation,
            "bundle_generation": self.bundle_generation,
            "issuing": self.issuing.to_secret(),
            "announced": [[one.authority.to_secret(), _unix(one.issues_at)] for one in _present(self.announced)],
            "ending": [[old.authority.to_secret(), _unix(old.ends_at)] for old in self.ending],
            "gone": [
                [root_to_secret(old.root), _unix(old.since), sorted(key.hex() for key in old.key_ids)]
                for old in self.gone
            ],
            "served": [[found.digest.hex(), sorted(found.epochs)] for found in self.served],
        }

    @classmethod
    def from_secret(cls, values: Mapping[str, Any]) -> Epochs:
        """Return what `to_secret` gave; raise ValueError, KeyError or TypeError for anything else."""
        announced = [Announced(Authority.from_secret(one), _time(at)) for one, at in values["announced"]]
        return cls(
            trust_domain=str(values["trust_domain"]),
            generation=int(values["generation"]),
            bundle_generation=int(values["bundle_generation"]),
            issuing=Authority.from_secret(values["issuing"]),
            announced=announced[0] if announced else None,
            ending=tuple(Ending(Authority.from_secret(one), _time(at)) for one, at in values["ending"]),
            gone=tuple(
                Gone(root_from_secret(one), _time(at), frozenset(bytes.fromhex(key) for key in keys))
                for one, at, keys in values["gone"]
            ),
            served=tuple(Served(bytes.fromhex(digest), frozenset(names)) for digest, names in values["served"]),
        )

    def _without(self, authority: Authority, now: datetime, *, retired: bool = True) -> Epochs:
        gone = Gone(authority.root, now, authority.key_ids if retired else frozenset())
        return replace(self, gone=(gone, *self.gone)[:_MAX_GONE])

    def _announcing(self, lead: timedelta, now: datetime) -> Epochs:
        return replace(self, announced=Announced(Authority.create(now=now), now + lead))

    def _after(self, before: Epochs) -> Epochs:
        """Make it the generation after `before`, and give the bundle of other epochs another number."""
        found = replace(self, generation=before.generation + 1)
        if [authority.epoch for authority in found.trusted] == [authority.epoch for authority in before.trusted]:
            return found
        return replace(found, bundle_generation=found.generation)._serving()

    def _serving(self) -> Epochs:
        served = Served(self.bundle.digest, frozenset(authority.epoch for authority in self.trusted))
        return replace(self, served=(served, *self.served)[:_MAX_SERVED])


def _present(announced: Announced | None) -> tuple[Announced, ...]:
    return () if announced is None else (announced,)


def _unix(time: datetime) -> int:
    """Return Unix milliseconds."""
    return round(time.timestamp() * 1000)


def _time(unix_ms: int) -> datetime:
    return datetime.fromtimestamp(unix_ms / 1000, UTC)
