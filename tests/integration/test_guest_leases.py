# SPDX-License-Identifier: Apache-2.0
"""A TD's key client against a broker on the wire: leases are renewed with a receipt each, or end with what it said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.keys import KeyClient
from cloister.identity import Role
from fakes.attest_broker import Broker, broker, lies
from fakes.attest_harness import JOB, LocalAttest, local_attest

URI = "cloister-key://hospital-a/datasets/reviews"
WRAPPED = b"the wrapped key of the header"
DENIED = CloisterError(Code.RELEASE_DENIED, what="not released: block workload.script", why="another script")
MISSING = CloisterError(Code.APPROVALS_MISSING, what="not released: block release.approvals", why="wanted 2; got none")


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest() as local:
        await local.registry.register_job(JOB)
        yield local


@pytest.fixture
async def serving(attest: LocalAttest) -> AsyncIterator[Broker]:
    async with broker(attest) as running:
        running.lease_ms = 300
        yield running


@pytest.fixture
async def rank(attest: LocalAttest) -> Identity:
    return await attest.enrol(attest.td(Role.RANK))


async def ended(client: KeyClient) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await asyncio.wait_for(client.keep_leases(), 10)
    return caught.value


async def test_what_is_held_is_renewed_until_it_is_refused(serving: Broker, rank: Identity) -> None:
    client = KeyClient(rank, serving.endpoint)
    before = rank.guest.event_log
    await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    recorded = rank.guest.event_log
    assert recorded != before
    keeper = asyncio.create_task(client.keep_leases())
    await asyncio.wait_for(serving.renewed.wait(), 10)
    serving.refusals.append(DENIED)
    with pytest.raises(CloisterError) as caught:
        await asyncio.wait_for(keeper, 10)
    assert caught.value.code is Code.LEASE_ENDED
    assert "CLO-1304: not released: block workload.script; another script" in caught.value.why
    assert set(serving.renewals) == {(URI, 3)}
    # A renewal hands nothing out: there is nothing to record, and the data key was released once.
    assert len(serving.releases) == 1
    assert rank.guest.event_log == recorded


@pytest.mark.parametrize("fresh", [False, True])
async def test_a_renewal_brings_evidence_as_fresh_as_a_release_does(
    serving: Broker, rank: Identity, fresh: bool
) -> None:
    serving.wants_fresh = fresh
    serving.lease_ms = 1000
    client = KeyClient(rank, serving.endpoint)
    await client.release(URI, "train", wrapped=None)
    keeper = asyncio.create_task(client.keep_leases())
    await asyncio.wait_for(serving.renewed.wait(), 10)
    keeper.cancel()
    assert serving.renewals == [(URI, 1)]


@pytest.mark.parametrize(
    "how",
    [
        lambda r: setattr(r, "lease_until_unix_ms", r.lease_until_unix_ms + 1),
        lambda r: setattr(r, "decided_unix_ms", r.decided_unix_ms - 1),
        lambda r: setattr(r.receipt, "signature", bytes(64)),
        lambda r: setattr(r.data_key, "wrapped", b"another"),
        lambda r: setattr(r.data_key, "key_version", 2),
    ],
)
async def test_a_renewal_that_the_broker_did_not_sign_is_none(serving: Broker, rank: Identity, how: object) -> None:
    client = KeyClient(rank, serving.endpoint)
    await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    serving.spoil = how  # type: ignore[assignment]
    error = await ended(client)
    assert (error.code, Code.RECEIPT_INVALID.text in error.why) == (Code.LEASE_ENDED, True)


async def test_the_answer_to_another_renewal_is_none(serving: Broker, rank: Identity) -> None:
    client = KeyClient(rank, serving.endpoint)
    await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    serving.bind = lies(client_nonce=b"\x00" * 32)
    assert Code.RECEIPT_INVALID.text in (await ended(client)).why


async def test_a_lease_that_ends_before_it_begins_is_refused(serving: Broker, rank: Identity) -> None:
    serving.lease_ms = 0
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID


async def test_a_release_that_lacks_approvals_waits_for_them(serving: Broker, rank: Identity) -> None:
    told: list[CloisterError] = []
    client = KeyClient(rank, serving.endpoint, on_waiting=told.append, approval_pause_s=0.01)
    serving.refusals += [MISSING, MISSING]
    assert await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert [error.code for error in told] == [Code.APPROVALS_MISSING]


async def test_nobody_waits_for_approvals_who_did_not_say_so(serving: Broker, rank: Identity) -> None:
    serving.refusals.append(MISSING)
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.APPROVALS_MISSING


async def test_other_refusals_are_not_waited_out(serving: Broker, rank: Identity) -> None:
    client = KeyClient(rank, serving.endpoint, on_waiting=lambda error: None, approval_pause_s=0.01)
    serving.refusals += [MISSING, DENIED]
    with pytest.raises(CloisterError) as caught:
        await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RELEASE_DENIED
