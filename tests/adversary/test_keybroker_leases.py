# SPDX-License-Identifier: Apache-2.0
"""A renewal passes the same checks as a release and hands nothing out; withdrawing a key ends what runs on it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature

from cloister.errors import CloisterError, Code
from cloister.policyblocks import digest_text
from cloister.protocol import LeaseTerms
from cloister.release.keys import KeyState, Purpose
from cloister_keybroker.workloads import Released
from fakes.keybroker_harness import KEY, OTHER_KEY, Broker, Td, a_broker, owner, policy_document


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path) as opened:
        await opened.create_key()
        yield opened


async def renew(td: Td, **changes: object) -> Released:
    return await td.release(**{"renewal": True, "key_version": 1, **changes})  # type: ignore[arg-type]


async def refused(td: Td, code: Code, block: str, **changes: object) -> None:
    with pytest.raises(CloisterError) as caught:
        await renew(td, **changes)
    assert (caught.value.code, caught.value.block) == (code, block)
    entry = (await td.broker.log())[0].entry
    assert (entry.action, entry.granted) == ("renew", False)
    assert next(found.name for found in entry.blocks if not found.ok) == block


async def test_a_renewal_gives_a_longer_lease_and_no_data_key(broker: Broker) -> None:
    td = broker.td()
    first = await td.release()
    broker.clock.advance(minutes=30)
    renewed = await renew(td)
    assert renewed.terms.decided_ms - first.terms.decided_ms == 30 * 60 * 1000
    assert renewed.terms.lease_until_ms - renewed.terms.decided_ms == 60 * 60 * 1000
    assert (renewed.data_key.sealed, renewed.data_key.wrapped) == (b"", b"")
    entry = (await broker.log())[0].entry
    assert (entry.action, entry.granted, entry.key_version) == ("renew", True, 1)


async def test_a_renewal_counts_for_nothing_and_is_not_counted(broker: Broker) -> None:
    await broker.replace_policy(release={"max_per_job": "1"})
    td = broker.td()
    await renew(td)
    await td.release()
    for _ in range(3):
        await renew(td)
    with pytest.raises(CloisterError) as caught:
        await td.release()
    assert caught.value.block == "release.max_per_job"


async def test_a_renewal_names_the_version_that_is_held(broker: Broker) -> None:
    with pytest.raises(CloisterError) as caught:
        await renew(broker.td(), key_version=0)
    assert caught.value.code is Code.ARGUMENT_INVALID
    await refused(broker.td(), Code.RELEASE_DENIED, "key.version", key_version=2)


async def test_a_disabled_key_ends_at_the_next_renewal_and_is_released_no_more(broker: Broker) -> None:
    td = broker.td()
    await td.release()
    await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
    await refused(td, Code.KEY_DISABLED, "key.state")
    with pytest.raises(CloisterError) as caught:
        await td.release()
    assert caught.value.block == "key.state"
    await broker.owners.set_state(owner(), KEY, KeyState.ENABLED)
    await renew(td)


async def test_a_narrower_policy_ends_what_it_does_not_allow(broker: Broker) -> None:
    td = broker.td()
    await td.release()
    await broker.replace_policy(workload={"script": [digest_text(b"\x99" * 48)]})
    await refused(td, Code.RELEASE_DENIED, "workload.script")


async def test_a_renewal_needs_evidence_of_its_own(broker: Broker) -> None:
    td = broker.td()
    await td.release()
    nonce = await td.begin()
    token = td.token(nonce)
    asked = td.asked(nonce, token, renewal=True, key_version=1)
    await broker.releases.release(td.workload, asked)
    with pytest.raises(CloisterError) as caught:
        await broker.releases.release(td.workload, asked)  # the nonce is used up
    assert caught.value.code is Code.NONCE_UNKNOWN
    thief = broker.td()
    nonce = await thief.begin()
    stolen = thief.asked(nonce, td.token(nonce), renewal=True, key_version=1)
    with pytest.raises(CloisterError) as caught:
        await broker.releases.release(thief.workload, stolen)
    assert caught.value.code is Code.TOKEN_INVALID


async def test_a_renewal_for_another_purpose_or_key_is_refused(broker: Broker) -> None:
    await broker.create_key(policy_document(OTHER_KEY, workload={"script": [digest_text(bytes(48))]}), OTHER_KEY)
    await refused(broker.td(), Code.RELEASE_DENIED, "key.purposes", purpose=Purpose.SERVE)
    await refused(broker.td(), Code.RELEASE_DENIED, "workload.script", key=OTHER_KEY)


async def test_the_receipt_of_a_renewal_is_over_its_lease(broker: Broker) -> None:
    renewed = await renew(broker.td())
    receipt, key = renewed.data_key.receipt, broker.receipt_key.public_key()

    def message(terms: LeaseTerms) -> bytes:
        place = receipt.place
        return renewed.data_key.binding.receipt_message(
            sealed=b"", terms=terms, log_id=receipt.log_id, index=place.index, root=place.root
        )

    key.verify(receipt.signature, message(renewed.terms))
    for change in ("policy_version", "decided_ms", "lease_until_ms"):
        terms = dataclasses.replace(renewed.terms, **{change: getattr(renewed.terms, change) + 1})
        with pytest.raises(InvalidSignature):
            key.verify(receipt.signature, message(terms))
