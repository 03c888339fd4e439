# SPDX-License-Identifier: Apache-2.0
"""What a policy would do: to a token, to a request that is in the log, to all of them. Nothing is changed by asking.

Any user of the tenant may ask, as any may read the tenant's log: policies, tokens and requests of other tenants do not
exist here. The decisions themselves are made by cloister.release, not on the database's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from cloister import ear as ears
from cloister.ear import Ear, TokenRejected
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.blocks import Block, Decision
from cloister.release.explain import LoggedRequest, explain_token, replay, usual_purpose
from cloister.release.keys import ROLE_PURPOSES, Purpose, job_of
from cloister.release.policy import ReleasePolicy, parse_policy
from cloister.runtime.credentials import CredentialSource
from cloister.transparency.checkpoint import MAX_SIZE
from cloister.transparency.entry import LoggedEntry
from cloister_keybroker.answers import argument_error, key_not_found
from cloister_keybroker.logproofs import decision_not_found
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import StoredKey, Transaction
from cloister_keybroker.workloads import GENERATE, RELEASE, RENEW, policy_in_force

REQUESTS: Final = frozenset({RELEASE, GENERATE, RENEW})  # what a policy decides on
MAX_REPLAYED: Final = 10_000  # requests of one replay: some ten seconds of one core
_REPLAYED: Final = 1000
_AT_ONCE: Final = 2  # replays; others wait, and releases are not kept waiting by many
_BATCH: Final = 32  # requests read at once: the database's one thread is not held up for long


@dataclass(frozen=True, slots=True)
class Replayed:
    """A logged request, and what the policy would have made of it."""

    logged: LoggedEntry
    decision: Decision


@dataclass(frozen=True, slots=True)
class _Kept:
    """What the store has of a request."""

    logged: LoggedEntry
    token: str  # empty: none is kept
    released_to_job: int


class PolicyDesk:
    """Explain and replay."""

    def __init__(self, store: KeyStore, credentials: CredentialSource) -> None:
        self._store = store
        self._credentials = credentials
        self._replays = asyncio.Semaphore(_AT_ONCE)

    async def explain_token(
        self, tenant: str, *, policy_yaml: bytes, key_uri: str, token: str, purpose: Purpose | None, now: datetime
    ) -> Decision:
        """Decide as if the bearer of this token asked now; its age is not held against it."""
        try:
            ear = ears.read_unverified(token)
        except TokenRejected as rejected:
            return Decision((_rejected(rejected),))
        policy = await self._policy(tenant, policy_yaml, key_uri)
        bearer = SpiffeId.parse(ear.spiffe_id)
        if purpose is None:
            purpose = usual_purpose(policy, bearer)
        job = job_of(bearer) if bearer.role in ROLE_PURPOSES else ""

        def read(transaction: Transaction) -> tuple[StoredKey | None, frozenset[str]]:
            approvers = transaction.approvals.approvers(
                policy.key, policy_digest=policy.digest, job=job, purpose=purpose, now=now
            )
            return transaction.key(policy.key), approvers

        stored, approvers = await self._store.read(read)
        if stored is None:
            raise key_not_found(str(policy.key))
        decision = explain_token(policy, ear, key=stored.record, purpose=purpose, approvers=approvers)
        return Decision((self._authentic(token, ear), *decision.blocks), decision.lease)

    async def explain_request(self, tenant: str, *, policy_yaml: bytes, key_uri: str, index: int) -> Decision:
        """Decide a logged request again."""

        def read(transaction: Transaction) -> _Kept:
            if index <= MAX_SIZE:
                for logged in transaction.log.following(tenant, first=index, limit=1):
                    if logged.index == index:
                        return _kept(transaction, logged)
            raise decision_not_found(index, transaction.log.head().size)

        kept = await self._store.read(read)
        entry = kept.logged.entry
        if not _is_request(kept.logged):
            wanted = f"a workload's {' or '.join(sorted(REQUESTS))}"
            raise argument_error("index", f"the entry of {entry.action} by {entry.caller}", wanted)
        policy = await self._policy(tenant, policy_yaml, key_uri or entry.key_uri)
        if str(policy.key) != entry.key_uri:
            raise argument_error("policy_yaml", f"a policy of {policy.key}", f"one of {entry.key_uri}, as the request")
        return _decide_again(policy, kept)

    async def replay(
        self, tenant: str, *, policy_yaml: bytes, since: datetime | None, limit: int
    ) -> AsyncIterator[Replayed]:
        """Yield the logged requests for the policy's key, newest first, with what it would have made of each."""
        if limit > MAX_REPLAYED:
            raise argument_error("limit", f"{limit}", f"at most {MAX_REPLAYED}")
        policy = await self._policy(tenant, policy_yaml, "")
        before, left = MAX_SIZE, limit or _REPLAYED

        def read(transaction: Transaction) -> tuple[int, list[_Kept]]:
            """Return where to go on, and the requests of this batch; 0 ends it."""
            entries = list(transaction.log.preceding(tenant, key_uri=str(policy.key), before=before, limit=_BATCH))
            young = [logged for logged in entries if since is None or _time(logged) >= since]
            goes_on = entries[-1].index if len(young) == _BATCH else 0
            return goes_on, [_kept(transaction, logged) for logged in young if _is_request(logged)]

        async with self._replays:
            while before and left:
                before, found = await self._store.read(read)
                found = found[:left]
                left -= len(found)
                for decided in await asyncio.to_thread(_replayed, policy, found):
                    yield decided

    async def _policy(self, tenant: str, policy_yaml: bytes, key_uri: str) -> ReleasePolicy:
        """Return the policy that was sent, or the one in force for a key of this tenant."""
        if policy_yaml:
            policy = parse_policy(policy_yaml)
            if policy.key.tenant != tenant:
                raise key_not_found(str(policy.key))
            return policy
        uri = KeyUri.parse(key_uri)
        stored = await self._store.read(lambda t: t.key(uri)) if uri.tenant == tenant else None
        if stored is None:
            raise key_not_found(str(uri))
        found = policy_in_force(stored)
        if found is None:
            raise argument_error("policy_yaml", f"none, and none is in force for {uri}", "a release policy")
        return found

    def _authentic(self, token: str, ear: Ear) -> Block:
        """Say whether a token was authentic when it was issued."""
        bundle = self._credentials.current().bundle
        attest = str(SpiffeId.service(bundle.trust_domain, Role.ATTEST))
        audience = f"spiffe://{bundle.trust_domain}"
        try:
            ears.verify(token, keys=bundle.token_keys, issuer=attest, audience=audience, now=ear.issued_at)
        except TokenRejected as rejected:
            return _rejected(rejected)
        return Block("token", True, "an authentic token", ear.token_id)


def _rejected(rejected: TokenRejected) -> Block:
    return Block("token", False, f"token.{rejected.check}", rejected.reason)


def _is_request(logged: LoggedEntry) -> bool:
    """Say whether an entry is of a workload that asked for a data key: owners make data keys, too."""
    entry = logged.entry
    return entry.action in REQUESTS and SpiffeId.parse(entry.caller).role in ROLE_PURPOSES


def _kept(transaction: Transaction, logged: LoggedEntry) -> _Kept:
    entry = logged.entry
    token = transaction.evidence(entry.evidence_digest) or ""
    count = transaction.log.released_to_job(
        key_uri=entry.key_uri, job=entry.job, policy_digest=entry.policy_digest, before=logged.index
    )
    return _Kept(logged, token, count)


def _replayed(policy: ReleasePolicy, found: Sequence[_Kept]) -> list[Replayed]:
    return [Replayed(kept.logged, _decide_again(policy, kept)) for kept in found]


def _decide_again(policy: ReleasePolicy, kept: _Kept) -> Decision:
    entry = kept.logged.entry
    try:
        # Its digest is in the log, and only authentic tokens are kept.
        ear = ears.read_unverified(kept.token) if kept.token else None
    except TokenRejected:  # of a form that an earlier release wrote
        ear = None
    request = LoggedRequest(
        key=KeyUri.parse(entry.key_uri),
        key_version=entry.key_version,
        purpose=Purpose(entry.purpose),
        caller=SpiffeId.parse(entry.caller),
        channel=entry.channel,
        time=_time(kept.logged),
        renewal=entry.action == RENEW,
        blocks=entry.blocks,
        released_to_job=kept.released_to_job,
    )
    return replay(policy, request, ear)


def _time(logged: LoggedEntry) -> datetime:
    return datetime.fromtimestamp(logged.time_ms / 1000, UTC)
