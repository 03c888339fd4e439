# SPDX-License-Identifier: Apache-2.0
"""What workloads ask: a nonce, then a data key. The decision itself is cloister.release; this is what surrounds it.

A release, in this order: read the key and its policy -> verify the token -> use up the nonce -> decide -> have the
back end unwrap (only what was decided for) -> seal -> decide again on what the store says now, and append, in one
durable transaction -> sign the receipt -> answer. What is denied is appended the same way, before the error leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from cloister import ear as ears
from cloister.ear import AuthenticTokens, Ear, TokenRejected
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.protocol import NONCE_SIZE, LeaseTerms, ReleaseBinding
from cloister.release import decide as release
from cloister.release.blocks import Block, Decision
from cloister.release.decide import Counters, Peer
from cloister.release.keys import Purpose, job_of
from cloister.release.policy import ReleasePolicy, parse_policy
from cloister.runtime.credentials import CredentialSource
from cloister.tlv import sha384
from cloister.transparency.entry import Entry
from cloister_keybroker.answers import (
    DataKeyAnswer,
    ReceiptSigner,
    Recipient,
    argument_error,
    check_wrapped,
    key_not_found,
)
from cloister_keybroker.backends import FreshDataKey, KeyBackend, KeyRef
from cloister_keybroker.datasets import Registry, version_block
from cloister_keybroker.keycache import Memo
from cloister_keybroker.keys import KeyRecord
from cloister_keybroker.log import LogPlace
from cloister_keybroker.nonces import NonceBook
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import StoredKey, Transaction

KEM_IDS: Final = (KEM_MLKEM768_X25519,)
RELEASE, GENERATE, RENEW = "release", "generate", "renew"  # actions in the log
_ATTEMPTS: Final = 3  # a key that its owner changes three times during one release is left alone


@dataclass(frozen=True, slots=True)
class Workload:
    """The authenticated rank or backend behind a call."""

    peer: Peer
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Begun:
    """The answer to BeginRelease."""

    nonce: bytes
    policy_version: int
    policy_digest: bytes
    fresh_enough: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """A release as it was asked for. `wrapped` empty: make a new data key; then version 0 is the newest.

    A renewal asks for no data key at all, only for a longer lease on what the workload holds.
    """

    token: str
    key: KeyUri
    key_version: int
    purpose: Purpose
    broker_nonce: bytes
    recipient: Recipient
    wrapped: bytes
    renewal: bool = False

    @property
    def action(self) -> str:
        if self.renewal:
            return RENEW
        return RELEASE if self.wrapped else GENERATE

    def check(self) -> None:
        """Raise ARGUMENT_INVALID for what cannot be right, whoever asks."""
        self.recipient.check()
        if len(self.broker_nonce) != NONCE_SIZE:
            raise argument_error("broker_nonce", f"{len(self.broker_nonce)} bytes", "the nonce of BeginRelease")
        if self.wrapped:
            check_wrapped(self.wrapped)
        if self.renewal and not self.key_version:
            raise argument_error("key_version", "0", "the version of the data key that is held")


@dataclass(frozen=True, slots=True)
class Released:
    """A data key, and the policy under which the workload may hold it until the lease ends.

    After a renewal the answer carries no data key: its receipt is about the lease.
    """

    data_key: DataKeyAnswer
    terms: LeaseTerms


@dataclass(frozen=True, slots=True)
class _Changed:
    """The key or its policy changed between the first decision and the durable one."""


class ReleaseDesk:
    """Begin and finish releases."""

    def __init__(
        self,
        *,
        store: KeyStore,
        backend: KeyBackend,
        signer: ReceiptSigner,
        credentials: CredentialSource,
        broker_id: SpiffeId,
        clock: Callable[[], datetime],
        nonces: NonceBook | None = None,
    ) -> None:
        self._store = store
        self._backend = backend
        self._signer = signer
        self._credentials = credentials
        self._broker_id = broker_id
        self._clock = clock
        self._nonces = nonces or NonceBook()
        self._tokens = AuthenticTokens()
        self._kept: Memo[bool] = Memo()  # digests of tokens that the log has
        self._issuer = str(SpiffeId.service(broker_id.trust_domain, Role.ATTEST))

    async def begin(self, workload: Workload, uri: KeyUri, purpose: Purpose, token: str) -> Begun:
        """Give a nonce for one release of this key for this purpose."""
        stored = await self._find(workload, uri)
        if stored is None:
            await self._log_absent(workload, "begin", uri, purpose)
            raise key_not_found(str(uri))
        now, policy, fresh = self._clock(), policy_in_force(stored), False
        if token and policy is not None:
            found = self._verify(token, now)
            mine = workload.peer.certificate_sha256
            fresh = (
                isinstance(found, Ear) and found.certificate_sha256 == mine and release.fresh_enough(found, policy, now)
            )
        nonce = self._nonces.give(workload.peer.spiffe_id, (uri, purpose), now)
        return Begun(nonce, stored.record.policy_version, stored.record.policy_digest, fresh)

    async def release(self, workload: Workload, asked: Asked) -> Released:
        """Return a data key; raise the denial when any block does not hold."""
        asked.check()
        now = self._clock()
        problem = self._nonces.take(asked.broker_nonce, workload.peer.spiffe_id, (asked.key, asked.purpose), now)
        found = self._verify(asked.token, now)
        for _ in range(_ATTEMPTS):
            stored = await self._find(workload, asked.key, asked.key_version)
            if stored is None:
                await self._log_absent(workload, asked.action, asked.key, asked.purpose)
                raise key_not_found(str(asked.key))
            answer = await self._release(workload, asked, found, problem, stored, now)
            if isinstance(answer, Released):
                return answer
        raise CloisterError(
            Code.KEY_DISABLED, what=f"{asked.key} keeps changing", why="its owner is at work", todo="try again later"
        )

    async def _release(
        self,
        workload: Workload,
        asked: Asked,
        found: Ear | TokenRejected,
        problem: str,
        stored: StoredKey,
        now: datetime,
    ) -> Released | _Changed:
        record, policy = stored.record, policy_in_force(stored)
        version = asked.key_version or (0 if asked.wrapped else record.newest)
        request = release.Request(
            key=asked.key,
            key_version=version,
            purpose=asked.purpose,
            broker_nonce=asked.broker_nonce,
            hpke_kem_id=asked.recipient.kem_id,
            hpke_key_digest=sha384(asked.recipient.public_key),
            renewal=asked.renewal,
        )

        def decide(released_to_job: int, approvers: frozenset[str]) -> Decision:
            counters = Counters(problem, released_to_job, approvers)
            return release.decide(request, found, workload.peer, policy, record, counters, now)

        data_key: FreshDataKey | None = None
        grounds: tuple[Block, ...] = ()
        job = job_of(workload.peer.spiffe_id)

        def approvers(transaction: Transaction) -> frozenset[str]:
            return transaction.approvals.approvers(
                asked.key, policy_digest=record.policy_digest, job=job, purpose=asked.purpose, now=now
            )

        asks = policy is not None and policy.approvals is not None
        approving = await self._store.read(approvers) if asks else frozenset()
        first = decide(0, approving)
        if first.granted and not asked.renewal:
            data_key, block = await self._data_key(KeyRef.of(record, version), stored, asked)
            grounds = (block,)
        wrapped = data_key.wrapped if data_key else asked.wrapped
        binding = self._binding(asked, version, record, wrapped)
        sealed = asked.recipient.seal(data_key.secret, binding) if data_key else b""

        # Only authentic tokens are kept, for replays of other policies: no policy grants anything on others.
        known = not isinstance(found, Ear) or self._kept.look(binding.evidence_digest)
        token = "" if known else asked.token

        def work(transaction: Transaction) -> tuple[Decision, LogPlace] | _Changed:
            if transaction.record(asked.key) != record:
                return _Changed()
            past = 0
            if policy is not None and policy.max_per_job is not None:
                past = transaction.released_to_job(uri=asked.key, job=job, policy_digest=record.policy_digest)
            approved = approvers(transaction) if asks else frozenset()
            # Nothing else that the decision is made from can have changed.
            again = first if (past, approved) == (0, approving) else decide(past, approved)
            newest_version = _version(transaction.registry(record), data_key, asked, found)
            if again.granted and not first.granted:
                return _Changed()  # approved meanwhile: there is no data key yet
            decision = Decision((*again.blocks, *grounds, *newest_version))
            entry = self._entry(workload, asked, decision, binding)
            return decision, transaction.append(entry, time_ms=_ms(self._clock()), token=token)

        outcome = await self._store.write(work)
        if isinstance(outcome, _Changed):
            return outcome
        if isinstance(found, Ear):
            self._kept.put(binding.evidence_digest, True)  # on disk now
        decision, place = outcome
        if not decision.granted or policy is None:
            raise release.denial(request, decision)
        terms = LeaseTerms(policy.version, _ms(now), _ms(now + policy.lease))
        receipt = self._signer.sign(binding, sealed=sealed, place=place, terms=terms)
        return Released(DataKeyAnswer(sealed, wrapped, binding, receipt), terms)

    async def _data_key(self, ref: KeyRef, stored: StoredKey, asked: Asked) -> tuple[FreshDataKey | None, Block]:
        """Unwrap or make the data key that was decided for."""
        wanted = f"wrapped under version {ref.version}"
        handle = stored.material().handle
        if not asked.wrapped:
            return await self._backend.generate(ref, handle), Block("data_key", True, wanted, "a new one")
        try:
            secret = await self._backend.unwrap(ref, handle, asked.wrapped)
        except CloisterError as error:
            if error.code is not Code.WRAPPED_KEY_INVALID:
                raise
            return None, Block("data_key", False, wanted, "one that does not open")
        return FreshDataKey(secret, asked.wrapped), Block("data_key", True, wanted, wanted)

    def _verify(self, token: str, now: datetime) -> Ear | TokenRejected:
        bundle = self._credentials.current().bundle
        domain = self._broker_id.trust_domain
        try:
            return ears.current(
                self._tokens.authenticate(token, keys=bundle.token_keys),
                issuer=self._issuer,
                audience=f"spiffe://{domain}",
                now=now,
            )
        except TokenRejected as rejected:
            return rejected

    async def _find(self, workload: Workload, uri: KeyUri, version: int = 0) -> StoredKey | None:
        """Return a key of the workload's own tenant; another tenant's is not even looked up."""
        if uri.tenant != workload.peer.spiffe_id.tenant:
            return None
        return await self._store.key(uri, version=version)

    def _binding(self, asked: Asked, version: int, record: KeyRecord, wrapped: bytes) -> ReleaseBinding:
        return ReleaseBinding(
            key_uri=str(asked.key),
            key_version=version,
            purpose=asked.purpose.value,
            policy_digest=record.policy_digest,
            evidence_digest=sha384(asked.token.encode()),
            client_nonce=asked.recipient.client_nonce,
            broker_nonce=asked.broker_nonce,
            broker_id=str(self._broker_id),
            wrapped_digest=sha384(wrapped),
        )

    def _entry(self, workload: Workload, asked: Asked, decision: Decision, binding: ReleaseBinding) -> Entry:
        peer = workload.peer
        return Entry(
            action=asked.action,
            tenant=peer.spiffe_id.tenant,
            key_uri=str(asked.key),
            caller=str(peer.spiffe_id),
            granted=decision.granted,
            blocks=decision.blocks,
            key_version=binding.key_version,
            purpose=asked.purpose.value,
            job="" if asked.renewal else job_of(peer.spiffe_id),  # a renewal does not count for max_per_job
            channel=f"{peer.tls_version}, {peer.key_exchange_group}",
            policy_digest=binding.policy_digest,
            evidence_digest=binding.evidence_digest,
            wrapped_digest=binding.wrapped_digest,
            request_id=workload.request_id,
        )

    async def _log_absent(self, workload: Workload, action: str, uri: KeyUri, purpose: Purpose) -> None:
        entry = Entry(
            action=action,
            tenant=workload.peer.spiffe_id.tenant,
            key_uri=str(uri),
            caller=str(workload.peer.spiffe_id),
            granted=False,
            blocks=(Block("key", False, "a key of this tenant", "none"),),
            purpose=purpose.value,
            request_id=workload.request_id,
        )
        await self._store.write(lambda transaction: transaction.append(entry, time_ms=_ms(self._clock())))


def _version(
    registry: Registry, data_key: FreshDataKey | None, asked: Asked, found: Ear | TokenRejected
) -> Iterable[Block]:
    """Check that a data key of a published data set goes only to who measured the newest version of it."""
    if data_key is not None and asked.wrapped and isinstance(found, Ear):
        block = version_block(registry.demanded(data_key.secret), found.workload.datasets)
        if block is not None:
            yield block


def policy_in_force(stored: StoredKey) -> ReleasePolicy | None:
    """Return what a key is released under now, None when nothing is."""
    return _parse(stored.policy_yaml) if stored.policy_yaml else None


@lru_cache(maxsize=256)  # parsing takes milliseconds; the text is the key, so an entry cannot be stale
def _parse(policy_yaml: bytes) -> ReleasePolicy:
    return parse_policy(policy_yaml)


def _ms(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)
