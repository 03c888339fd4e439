# SPDX-License-Identifier: Apache-2.0
"""What changes between two policies: place by place, and whether it lets more pass or less. Pure.

An AND of blocks is easy to compare: every block is a set, a threshold or a switch, and its absence means "any".
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from cloister.policyblocks import digest_text
from cloister.release.blocks import Decision
from cloister.release.cases import outcome_of
from cloister.release.claims import Case
from cloister.release.policy import MEASUREMENTS, SEALED_EVENT, WRAPS, ApprovalRule, ReleasePolicy, TcbRule

_T = TypeVar("_T")
_ANY: Final = "any"
_ANY_TCB: Final = TcbRule((), None, None)
_ACCEPTED: Final = "what the policy accepts"


class Effect(enum.StrEnum):
    """What a change does to the set of requests that pass."""

    WIDER = "wider"
    NARROWER = "narrower"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference; `old` and `new` as the policies write them."""

    place: str
    effect: Effect
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Turned:
    """A request that one policy accepts or has a case for, and that the other one decides otherwise."""

    source: str  # "old" or "new": whose case it is
    case: str
    old: Decision
    new: Decision


def changes(old: ReleasePolicy, new: ReleasePolicy) -> Iterator[Change]:
    """Yield every difference, in the order of the reference."""
    yield from _other("metadata.name", old.name, new.name)
    yield from _other("metadata.owner", old.owner, new.owner)
    yield from _other("spec.key.uri", str(old.key), str(new.key))
    yield from _more_is_narrower("spec.key.versions.min", old.min_key_version, new.min_key_version, str)
    yield from _sets("spec.key.purposes", old.purposes, new.purposes, str)
    yield from _tee(old, new)
    for name in MEASUREMENTS:
        there, here = old.measurements.get(name), new.measurements.get(name)
        yield from _sets(f"spec.when.measurements.{name}", there, here, bytes.hex)
    for name in ("script", "environment", "config", "datasets"):
        there, here = getattr(old.workload, name), getattr(new.workload, name)
        yield from _sets(f"spec.when.workload.{name}", there, here, digest_text)
    sealed = (SEALED_EVENT if policy.workload.sealed else _ANY for policy in (old, new))
    yield from _switch("spec.when.workload.no_events_after", *sealed, wide=_ANY)
    yield from _sets("spec.when.identity.spiffe", old.identities, new.identities, str)
    yield from _sets("spec.when.channel.key_exchange", old.key_exchange, new.key_exchange, str)
    yield from _more_is_wider("spec.when.evidence.max_age", old.max_age, new.max_age, str)
    nonces = ("broker" if policy.broker_nonce else "verifier" for policy in (old, new))
    yield from _switch("spec.when.evidence.nonce", *nonces, wide="verifier")
    names = {kem: name for name, kem in WRAPS.items()}
    yield from _sets("spec.release.wrap", old.kem_ids, new.kem_ids, lambda kem: names[kem])
    yield from _more_is_wider("spec.release.max_per_job", old.max_per_job, new.max_per_job, str)
    yield from _more_is_wider("spec.release.lease", old.lease, new.lease, str)
    yield from _approvals("spec.release.approvals", old.approvals, new.approvals)
    yield from _approvals("spec.change.approvals", old.change, new.change)
    yield from _cases(old, new)


def turned(old: ReleasePolicy, new: ReleasePolicy, now: datetime) -> Iterator[Turned]:
    """Yield the requests on which the two policies disagree, of those that they accept or have cases for."""
    for source, policy in (("old", old), ("new", new)):
        for case in (Case(_ACCEPTED, {}, ""), *policy.cases):
            there, here = (outcome_of(decides, case, now, accepted_by=policy) for decides in (old, new))
            if there.granted != here.granted:
                yield Turned(source, case.name, there, here)


def _tee(old: ReleasePolicy, new: ReleasePolicy) -> Iterator[Change]:
    simulated = ("allow" if policy.tee.simulated else "deny" for policy in (old, new))
    yield from _switch("spec.when.tee.simulated", *simulated, wide="allow")
    then, now = (policy.tee.tcb or _ANY_TCB for policy in (old, new))
    yield from _sets("spec.when.tee.tcb.status", then.statuses or None, now.statuses or None, str)
    yield from _more_is_narrower("spec.when.tee.tcb.min_date", then.min_date, now.min_date, str)
    yield from _sets("spec.when.tee.tcb.advisories.allow", then.advisories, now.advisories, str)
    place = "spec.when.tee.collateral.max_age"
    yield from _more_is_wider(place, old.tee.collateral_max_age, new.tee.collateral_max_age, str)
    # A policy with both says itself what will do, and lets tokens pass that carry a warning.
    warns = ("yes" if tee.tcb and tee.collateral_max_age else "no" for tee in (old.tee, new.tee))
    yield from _switch("tokens with a warning", *warns, wide="yes")
    yield from _sets("spec.when.tee.platforms.piid", old.tee.platforms, new.tee.platforms, bytes.hex)


def _approvals(place: str, old: ApprovalRule | None, new: ApprovalRule | None) -> Iterator[Change]:
    if old is None or new is None:
        if old != new:
            effect = Effect.NARROWER if old is None else Effect.WIDER
            yield Change(place, effect, *("none" if rule is None else str(rule) for rule in (old, new)))
        return
    yield from _more_is_narrower(f"{place}.threshold", old.threshold, new.threshold, str)
    yield from _sets(f"{place}.of", old.of, new.of, str)


def _cases(old: ReleasePolicy, new: ReleasePolicy) -> Iterator[Change]:
    then, now = ({case.name: case for case in policy.cases} for policy in (old, new))
    for name in dict.fromkeys((*then, *now)):
        if then.get(name) != now.get(name):
            texts = ("none" if case is None else case.block or "allow" for case in (then.get(name), now.get(name)))
            yield Change(f"spec.cases: {name}", Effect.OTHER, *texts)


def _sets(
    place: str, old: Iterable[_T] | None, new: Iterable[_T] | None, text: Callable[[_T], str]
) -> Iterator[Change]:
    """Compare lists of which one entry has to match; None means that nothing has to."""
    if old is None or new is None:
        if old is not new:
            texts = (_ANY if items is None else ", ".join(map(text, items)) or "none" for items in (old, new))
            yield Change(place, Effect.NARROWER if old is None else Effect.WIDER, *texts)
        return
    then, now = tuple(old), tuple(new)
    if gone := [text(item) for item in then if item not in now]:
        yield Change(place, Effect.NARROWER, ", ".join(gone), "")
    if added := [text(item) for item in now if item not in then]:
        yield Change(place, Effect.WIDER, "", ", ".join(added))


def _more_is_wider(place: str, old: Any, new: Any, text: Callable[[Any], str]) -> Iterator[Change]:
    """Compare upper bounds; None means that there is none."""
    if old != new:
        wider = new is None or (old is not None and new > old)
        yield Change(place, Effect.WIDER if wider else Effect.NARROWER, *(_bound(bound, text) for bound in (old, new)))


def _more_is_narrower(place: str, old: Any, new: Any, text: Callable[[Any], str]) -> Iterator[Change]:
    """Compare lower bounds; None means that there is none."""
    if old != new:
        wider = new is None or (old is not None and new < old)
        yield Change(place, Effect.WIDER if wider else Effect.NARROWER, *(_bound(bound, text) for bound in (old, new)))


def _bound(bound: Any, text: Callable[[Any], str]) -> str:
    if bound is None:
        return _ANY
    return f"{bound.total_seconds():.0f}s" if isinstance(bound, timedelta) else text(bound)


def _switch(place: str, old: str, new: str, *, wide: str) -> Iterator[Change]:
    if old != new:
        yield Change(place, Effect.WIDER if new == wide else Effect.NARROWER, old, new)


def _other(place: str, old: str, new: str) -> Iterator[Change]:
    if old != new:
        yield Change(place, Effect.OTHER, old, new)
