# SPDX-License-Identifier: Apache-2.0
"""The decision log over mutual TLS: a look that is proven, entries of one's own, streams, and files to keep."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.guest.decisionlog import LogClient
from cloister.identity import Role, SpiffeId
from cloister.runtime.channel import invoke, open_channel
from cloister.transparency.documents import SignedReceipt
from cloister.transparency.logfile import LogFile, write_end, write_header, write_leaf
from cloister.transparency.note import NoteKey
from fakes.keybroker_harness import KEY, OTHER_KEY, OWNER, RANK, STRANGER, TENANT, Broker, a_served_broker
from fakes.log_material import an_entry, receipt_of

Served = tuple[Broker, str]


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with a_served_broker(tmp_path) as found:
        await found[0].create_key()
        yield found


@asynccontextmanager
async def a_client(served: Served, who: SpiffeId = OWNER) -> AsyncIterator[tuple[LogClient, Any]]:
    broker, endpoint = served
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=broker.ca.credentials(who)) as channel:
        yield LogClient(channel), rpc.DecisionLogServiceStub(channel)


async def ask(stub: Any, method: str, request: Any) -> Any:
    return await invoke(getattr(stub, method), request, timeout_s=10, what=method)


async def refused(stub: Any, method: str, request: Any) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await ask(stub, method, request)
    return caught.value


async def append(broker: Broker, tenant: str = TENANT, **changes: Any) -> int:
    entry = an_entry(tenant=tenant, **changes)
    return (await broker.store.write(lambda t: t.append(entry, time_ms=1))).index


async def test_a_look_leads_from_the_brokers_evidence_to_the_logs_key(served: Served) -> None:
    broker, _ = served
    async with a_client(served) as (client, _):
        look = await client.look(receipt_spki_der=broker.receipt_spki, seen=None)
        assert look.seen.log == broker.log_key.note_key
        assert look.checkpoint.size == 2  # the start, and a key
        await append(broker)
        later = await client.look(receipt_spki_der=broker.receipt_spki, seen=look.seen)
        assert later.checkpoint.size == 3
        again = await client.look(receipt_spki_der=broker.receipt_spki, seen=later.seen)
        assert again.checkpoint == later.checkpoint


async def test_a_broker_with_another_receipt_key_than_its_evidence_names_is_not_believed(served: Served) -> None:
    async with a_client(served) as (client, _):
        with pytest.raises(CloisterError) as caught:
            await client.look(receipt_spki_der=b"\x00" * 44, seen=None)
        assert caught.value.code is Code.LOG_INVALID


async def test_a_decision_comes_whole_with_its_proof(served: Served) -> None:
    broker, _ = served
    index = await append(broker, detail=b"whole")
    await append(broker)
    async with a_client(served) as (client, stub):
        logged, found, checkpoint = await client.decision(index, broker.log_key.note_key)
        assert (logged.index, logged.entry.detail, checkpoint.size) == (index, b"whole", index + 2)
        answer = await ask(stub, "GetDecision", pb.GetDecisionRequest(index=index))
        assert answer.decision.action == logged.entry.action
        assert answer.entry == found.data


async def test_another_tenants_decision_is_as_absent_as_one_that_never_was(served: Served) -> None:
    broker, _ = served
    theirs = await append(broker, tenant="hospital-b")
    async with a_client(served) as (_, stub):
        foreign = await refused(stub, "GetDecision", pb.GetDecisionRequest(index=theirs))
        absent = await refused(stub, "GetDecision", pb.GetDecisionRequest(index=theirs + 1))
        assert foreign.code is absent.code is Code.DECISION_NOT_FOUND
        assert foreign.what.replace(str(theirs), "N") == absent.what.replace(str(theirs + 1), "N")
        # Its hash is everybody's to see: without it nobody could add the log up.
        proof = await ask(stub, "GetInclusionProof", pb.GetInclusionProofRequest(index=theirs))
        assert len(proof.leaf_hash) == 32
    async with a_client(served, STRANGER) as (client, _):
        logged, _, _ = await client.decision(theirs, broker.log_key.note_key)
        assert logged.entry.tenant == "hospital-b"


@pytest.mark.parametrize(
    ("method", "request_", "code"),
    [
        ("ListDecisions", pb.ListDecisionsRequest(limit=1001), Code.ARGUMENT_INVALID),
        ("ListDecisions", pb.ListDecisionsRequest(key_uri="x"), Code.KEY_URI_INVALID),
        ("GetDecision", pb.GetDecisionRequest(index=2**64 - 1), Code.DECISION_NOT_FOUND),
        ("GetInclusionProof", pb.GetInclusionProofRequest(index=2**64 - 1), Code.DECISION_NOT_FOUND),
        ("GetInclusionProof", pb.GetInclusionProofRequest(index=0, size=2**64 - 1), Code.ARGUMENT_INVALID),
        ("GetConsistencyProof", pb.GetConsistencyProofRequest(old_size=2**64 - 1), Code.ARGUMENT_INVALID),
        ("GetConsistencyProof", pb.GetConsistencyProofRequest(old_size=2, new_size=1), Code.ARGUMENT_INVALID),
    ],
)
async def test_what_cannot_be_asked_is_refused(served: Served, method: str, request_: Any, code: Code) -> None:
    async with a_client(served) as (_, stub):
        assert (await refused(stub, method, request_)).code is code


@pytest.mark.parametrize("method", ["GetCheckpoint", "GetDecision", "ListDecisions"])
async def test_a_workload_reads_no_log(served: Served, method: str) -> None:
    async with a_client(served, RANK) as (_, stub):
        error = await refused(stub, method, getattr(pb, f"{method}Request")())
        assert error.code is Code.CALLER_NOT_ALLOWED


async def test_decisions_are_followed_as_they_come(served: Served) -> None:
    broker, _ = served
    async with a_client(served) as (client, _):
        follower = client.follow(first=0)
        assert (await anext(follower)).action == "create-key"
        upcoming = asyncio.ensure_future(anext(follower))
        await append(broker, tenant="hospital-b")
        mine = await append(broker)
        assert (await asyncio.wait_for(upcoming, 5)).index == mine
        await follower.aclose()


async def test_decisions_of_one_key_are_followed(served: Served) -> None:
    broker, _ = served
    async with a_client(served) as (client, _):
        await append(broker)
        other = await append(broker, key_uri=str(OTHER_KEY))
        follower = client.follow(first=0, key_uri=str(OTHER_KEY))
        assert (await anext(follower)).index == other
        await follower.aclose()


async def test_one_caller_holds_a_few_streams_open_and_not_more(served: Served) -> None:
    async with a_client(served) as (client, _):
        followers = [client.follow(first=0) for _ in range(8)]
        for follower in followers:
            await anext(follower)
        with pytest.raises(CloisterError) as caught:
            await anext(client.follow(first=0))
        assert caught.value.code is Code.RATE_LIMITED
        await followers.pop().aclose()
        for attempt in range(100):  # the server learns of it a moment later
            try:
                assert (await anext(client.follow(first=0))).index == 1
                break
            except CloisterError:
                assert attempt < 99
                await asyncio.sleep(0.02)


async def export(client: LogClient, key: NoteKey) -> bytes:
    file = io.BytesIO()
    write_header(file.write, key)
    async for found in client.export():
        if isinstance(found, bytes):
            write_end(file.write, found)
        else:
            write_leaf(file.write, found)
    return file.getvalue()


async def test_the_exported_log_adds_up_and_shows_a_tenant_its_own(served: Served) -> None:
    broker, _ = served
    key = broker.log_key.note_key
    for number in range(600):
        entry = an_entry(tenant=TENANT if number % 3 else "hospital-b", detail=b"x" * 9000)
        await broker.store.write(lambda t, entry=entry: t.append(entry, time_ms=1))  # type: ignore[misc]
    async with a_client(served) as (client, _):
        data = await export(client, key)
    checked = LogFile(io.BytesIO(data)).check(key)
    assert checked.checkpoint.size == 602
    assert checked.entries == 402
    assert [start.receipt_public for start in checked.starts] == [broker.receipt_key.public_key().public_bytes_raw()]
    async with a_client(served, STRANGER) as (client, _):
        assert LogFile(io.BytesIO(await export(client, key))).check(key).entries == 201


async def test_a_receipt_can_be_kept_with_all_that_proves_it(served: Served) -> None:
    broker, _ = served
    td = broker.td()
    released = await td.release()
    for _ in range(5):
        await append(broker)
    async with a_client(served) as (client, _):
        look = await client.look(receipt_spki_der=broker.receipt_spki, seen=None)
        receipt = receipt_of(released)
        document = await client.receipt_document(receipt, look)
        checked = document.check(broker.log_key.note_key)
        assert checked.claims.binding.key_uri == str(KEY)
        assert checked.logged.entry.caller == str(RANK)
        assert checked.start.broker_id.endswith("/service/keybroker")
        forged = SignedReceipt(receipt.message, bytes(64))
        with pytest.raises(CloisterError) as caught:
            await client.receipt_document(forged, look)
        assert caught.value.code is Code.LOG_INVALID


async def test_the_growth_between_two_checkpoints_can_be_kept(served: Served) -> None:
    broker, _ = served
    async with a_client(served) as (client, _):
        old = await client.look(receipt_spki_der=broker.receipt_spki, seen=None)
        for _ in range(4):
            await append(broker)
        new = await client.look(receipt_spki_der=broker.receipt_spki, seen=old.seen)
        document = await client.growth(old.seen.note, new.seen.note, new.seen.log)
        assert document.check(new.seen.log) == (old.checkpoint, new.checkpoint)
