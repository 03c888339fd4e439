# SPDX-License-Identifier: Apache-2.0
"""A policy that contradicts itself never comes into force, and what a denial says is stable."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from cloister.dsse import Envelope
from cloister.errors import CloisterError, Code
from cloister.policyblocks import digest_text
from cloister_keybroker.approvaldesk import ApprovalDesk, Messenger
from fakes.keybroker_harness import (
    CHANNEL,
    KEY,
    OWNER,
    Approver,
    Broker,
    Document,
    a_broker,
    as_yaml,
    owner,
    policy_document,
)
from fakes.signing import OWNER_KEY, OWNER_SIGNER, signed_policy

OTHER = digest_text(b"\x99" * 48)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path) as opened:
        yield opened


def with_cases(*cases: Document) -> Document:
    document = policy_document()
    document["spec"]["cases"] = list(cases)
    return document


JOB: Document = {"name": "the job", "expect": "allow"}
ANY_SCRIPT: Document = {"name": "any script", "set": {"workload.script": OTHER}, "expect": "allow"}


async def test_a_key_is_not_created_under_a_policy_whose_cases_fail(broker: Broker) -> None:
    with pytest.raises(CloisterError) as caught:
        await broker.create_key(with_cases(JOB, ANY_SCRIPT))
    assert caught.value.code is Code.CASE_FAILED
    with pytest.raises(CloisterError) as caught:
        await broker.owners.get(owner(), KEY)
    assert caught.value.code is Code.KEY_NOT_FOUND
    await broker.create_key(with_cases(JOB))
    await broker.td().release()


async def test_a_policy_whose_cases_fail_leaves_the_one_in_force(broker: Broker) -> None:
    await broker.create_key()
    with pytest.raises(CloisterError) as caught:
        await broker.replace_policy(cases=[ANY_SCRIPT])
    assert caught.value.code is Code.CASE_FAILED
    assert (await broker.owners.get(owner(), KEY)).record.policy_version == 1
    await broker.td().release()
    await broker.replace_policy(cases=[JOB])
    assert (await broker.owners.get(owner(), KEY)).record.policy_version == 2


class Change:
    """A key whose policy asks two of three others before it is changed."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.approvers = [Approver() for _ in range(3)]
        self.rule = {"approvals": {"threshold": "2", "of": [approver.name for approver in self.approvers]}}

    async def put(self, *numbers: int, owner_signs: bool = True, keep: bool = True) -> None:
        """Put the next policy in force, with the signatures of these approvers."""
        record = (await self.broker.owners.get(owner(), KEY)).record
        document = policy_document(version=record.policy_version + 1, previous=record.policy_digest)
        if keep:
            document["spec"]["change"] = self.rule
        keys = [self.approvers[number].key for number in numbers] + ([OWNER_KEY] if owner_signs else [])
        await self.broker.owners.put_policy(owner(), KEY, signed_policy(as_yaml(document), *keys))

    async def refused(self, code: Code, block: str, *numbers: int, **options: bool) -> None:
        before = (await self.broker.owners.get(owner(), KEY)).record
        with pytest.raises(CloisterError) as caught:
            await self.put(*numbers, **options)
        assert (caught.value.code, caught.value.block) == (code, block)
        assert (await self.broker.owners.get(owner(), KEY)).record == before
        entry = (await self.broker.log())[0].entry
        assert (entry.action, entry.granted, entry.blocks[0].name) == ("put-policy", False, block)


@pytest.fixture
async def change(broker: Broker) -> Change:
    found = Change(broker)
    document = policy_document()
    document["spec"]["change"] = found.rule
    await broker.create_key(document)
    return found


async def test_a_change_needs_the_signatures_the_policy_in_force_asks_for(change: Change) -> None:
    await change.refused(Code.APPROVALS_MISSING, "change.approvals")
    await change.refused(Code.APPROVALS_MISSING, "change.approvals", 0)
    await change.put(0, 2)
    assert (await change.broker.owners.get(owner(), KEY)).record.policy_version == 2


async def test_approvers_do_not_replace_the_owner(change: Change) -> None:
    await change.refused(Code.SIGNATURE_INVALID, "policy.signer", 0, 1, 2, owner_signs=False)


async def test_dropping_the_rule_needs_the_rule(change: Change) -> None:
    await change.refused(Code.APPROVALS_MISSING, "change.approvals", 0, keep=False)
    await change.put(1, 2, keep=False)
    await change.put()  # from now on the owner alone will do


async def test_withdrawing_a_policy_does_not_end_its_rule(change: Change) -> None:
    await change.broker.owners.withdraw_policy(owner(), KEY)
    with pytest.raises(CloisterError) as caught:
        await change.broker.td().release()
    assert caught.value.block == "policy"
    await change.refused(Code.APPROVALS_MISSING, "change.approvals")
    await change.put(0, 1)
    await change.broker.td().release()


async def test_signatures_on_another_policy_are_worth_nothing(change: Change) -> None:
    record = (await change.broker.owners.get(owner(), KEY)).record
    wanted = policy_document(version=2, previous=record.policy_digest)
    other = policy_document(version=2, previous=record.policy_digest, workload={"script": [OTHER]})
    approved = Envelope.parse(signed_policy(as_yaml(wanted), *(approver.key for approver in change.approvers)))
    mixed = Envelope.parse(signed_policy(as_yaml(other), OWNER_KEY))
    envelope = dataclasses.replace(mixed, signatures=(*mixed.signatures, *approved.signatures)).to_bytes()
    with pytest.raises(CloisterError) as caught:
        await change.broker.owners.put_policy(owner(), KEY, envelope)
    assert caught.value.code is Code.SIGNATURE_INVALID


async def test_approvals_of_a_change_are_not_approvals_of_a_release(change: Change) -> None:
    envelope = signed_policy(as_yaml(policy_document()), change.approvers[0].key)
    with pytest.raises(CloisterError) as caught:
        await ApprovalDesk(change.broker.store, change.broker.clock).submit(Messenger(OWNER, CHANNEL), envelope)
    assert caught.value.code is Code.ENVELOPE_INVALID


async def test_a_policy_that_nobody_could_ever_change_is_refused(broker: Broker) -> None:
    document = policy_document()
    document["spec"]["change"] = {"approvals": {"threshold": "1", "of": [OWNER_SIGNER]}}
    with pytest.raises(CloisterError) as caught:
        await broker.create_key(document)
    assert caught.value.code is Code.POLICY_INVALID
    assert "nobody could ever change" in caught.value.what
