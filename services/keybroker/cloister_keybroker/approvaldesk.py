# SPDX-License-Identifier: Apache-2.0
"""Approvals come in and are listed. Any user of the tenant may hand one in: the signatures in it are what counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cloister.errors import CloisterError
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.release.approvals import SignedApproval, check_approval
from cloister.release.blocks import Block
from cloister.tlv import sha384
from cloister.transparency.entry import Entry
from cloister_keybroker.answers import key_not_found
from cloister_keybroker.approvals import StoredApproval
from cloister_keybroker.store import KeyStore
from cloister_keybroker.transaction import Transaction
from cloister_keybroker.workloads import policy_in_force

APPROVE: Final = "approve"  # action in the log
_LISTED: Final = 1000


@dataclass(frozen=True, slots=True)
class Messenger:
    """The authenticated user who hands an approval in."""

    spiffe_id: SpiffeId
    channel: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """How many approvals a release has, and needs."""

    have: int
    need: int


class ApprovalDesk:
    """Take and list approvals."""

    def __init__(self, store: KeyStore, clock: Callable[[], datetime]) -> None:
        self._store = store
        self._clock = clock

    async def submit(self, messenger: Messenger, envelope: bytes) -> Standing:
        """Keep an approval that the policy in force has use for; log it, or why it was refused."""
        approval = SignedApproval.verified(envelope)
        statement, now = approval.statement, self._clock()
        now_ms = int(now.timestamp() * 1000)
        if statement.key_uri.tenant != messenger.spiffe_id.tenant:
            raise key_not_found(str(statement.key_uri))

        def work(transaction: Transaction) -> Standing | CloisterError:
            stored = transaction.key(statement.key_uri)
            if stored is None:
                raise key_not_found(str(statement.key_uri))
            policy = policy_in_force(stored)
            try:
                approvers = check_approval(approval, policy, now)
            except CloisterError as error:
                block = Block("approval", False, "of use to the policy in force", error.why)
                transaction.append(self._entry(messenger, approval, block), time_ms=now_ms)
                return error  # and what was logged stays
            transaction.approvals.put(approval, approvers, now_ms=now_ms)
            names = ", ".join(sorted(approvers))
            block = Block("approval", True, str(policy.approvals if policy else ""), f"{names} for {statement.job}")
            transaction.append(self._entry(messenger, approval, block), time_ms=now_ms)
            have = transaction.approvals.approvers(
                statement.key_uri,
                policy_digest=statement.policy_digest,
                job=statement.job,
                purpose=statement.purpose,
                now=now,
            )
            rule = policy.approvals if policy else None
            return Standing(len(have.intersection(rule.of)) if rule else 0, rule.threshold if rule else 0)

        outcome = await self._store.write(work)
        if isinstance(outcome, CloisterError):
            raise outcome
        return outcome

    async def list(self, messenger: Messenger, uri: KeyUri) -> list[StoredApproval]:
        """Return the approvals of a key of the caller's tenant that have not expired."""
        now_ms = int(self._clock().timestamp() * 1000)

        def work(transaction: Transaction) -> list[StoredApproval]:
            if uri.tenant != messenger.spiffe_id.tenant or transaction.key(uri) is None:
                raise key_not_found(str(uri))
            return transaction.approvals.of_key(uri, now_ms=now_ms, limit=_LISTED)

        return await self._store.read(work)

    def _entry(self, messenger: Messenger, approval: SignedApproval, block: Block) -> Entry:
        statement = approval.statement
        return Entry(
            action=APPROVE,
            tenant=messenger.spiffe_id.tenant,
            key_uri=str(statement.key_uri),
            caller=str(messenger.spiffe_id),
            granted=block.ok,
            blocks=(block,),
            purpose=statement.purpose.value,
            channel=messenger.channel,
            policy_digest=statement.policy_digest,
            evidence_digest=sha384(approval.envelope),
            request_id=messenger.request_id,
        )
