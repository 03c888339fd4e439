# SPDX-License-Identifier: Apache-2.0
"""Policies explained and replayed over mutual TLS: against tokens, and against what the log has of past requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.policyblocks import digest_text
from cloister.release.keys import KeyState, Purpose, job_of
from cloister.runtime.channel import invoke, open_channel, stream
from fakes.keybroker_harness import (
    COLLEAGUE,
    KEY,
    OTHER_KEY,
    OWNER,
    RANK,
    STRANGER,
    TENANT,
    TRUST_DOMAIN,
    Approver,
    Broker,
    a_served_broker,
    as_yaml,
    owner,
    policy_document,
)

Served = tuple[Broker, str]
OTHER_SCRIPT = {"script": [digest_text(b"\x99" * 48)]}
ANOTHER_RANK = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job="j-2", rank=1)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with a_served_broker(tmp_path) as found:
        await found[0].create_key()
        yield found


def a_policy(release: dict[str, Any] | None = None, **when: Any) -> bytes:
    document = policy_document(**when)
    document["spec"]["release"] |= release or {}
    return as_yaml(document)


async def call(served: Served, service: str, method: str, request: Any, who: SpiffeId = COLLEAGUE) -> Any:
    broker, endpoint = served
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=broker.ca.credentials(who)) as channel:
        stub = getattr(rpc, f"{service}Stub")(channel)
        return await invoke(getattr(stub, method), request, timeout_s=10, what=method)


async def explain(served: Served, who: SpiffeId = COLLEAGUE, **request: Any) -> pb.ExplainPolicyResponse:
    found = await call(served, "PolicyService", "ExplainPolicy", pb.ExplainPolicyRequest(**request), who)
    assert isinstance(found, pb.ExplainPolicyResponse)
    return found


async def replay(served: Served, who: SpiffeId = COLLEAGUE, **request: Any) -> list[pb.ReplayPolicyResponse]:
    broker, endpoint = served
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=broker.ca.credentials(who)) as channel:
        method = rpc.PolicyServiceStub(channel).ReplayPolicy
        return [answer async for answer in stream(method, pb.ReplayPolicyRequest(**request), what="replay")]


def failed(answer: Any) -> list[str]:
    return [block.name for block in (answer.blocks if hasattr(answer, "blocks") else answer.failed) if not block.ok]


async def refused(work: Any, code: Code) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await work
    assert caught.value.code is code
    return caught.value


async def asks(broker: Broker, **changes: Any) -> None:
    """Ask for a data key, whatever becomes of it."""
    td = broker.td(changes.pop("who", RANK))
    with suppress(CloisterError):
        await td.release(**changes)


async def test_a_token_is_explained_under_the_policy_in_force(served: Served) -> None:
    token = served[0].td().token(b"\x0b" * 32)
    answer = await explain(served, key_uri=str(KEY), attestation_result=token)
    assert answer.granted
    names = [block.name for block in answer.blocks]
    assert names[0] == "token"
    assert {"workload.script", "evidence.nonce", "key.state", "key.version"} <= set(names)


async def test_a_token_is_explained_under_a_policy_that_is_not_in_force(served: Served) -> None:
    token = served[0].td().token(b"\x0b" * 32)
    answer = await explain(served, policy_yaml=a_policy(workload=OTHER_SCRIPT), attestation_result=token)
    assert (answer.granted, failed(answer)) == (False, ["workload.script"])


async def test_what_only_the_broker_knows_counts(served: Served) -> None:
    broker, _ = served
    approver = Approver()
    await broker.replace_policy(release={"approvals": {"threshold": "1", "of": [approver.name]}})
    token = broker.td().token(b"\x0b" * 32)
    asked = {"key_uri": str(KEY), "attestation_result": token}
    assert failed(await explain(served, **asked)) == ["release.approvals"]
    record = (await broker.owners.get(owner(), KEY)).record
    envelope = approver.approve(record.policy_digest, job_of(RANK), until=broker.clock() + timedelta(hours=1))
    answer = await call(served, "ApprovalService", "SubmitApproval", pb.SubmitApprovalRequest(envelope=envelope))
    assert (answer.have, answer.need) == (1, 1)
    assert (await explain(served, **asked)).granted
    await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
    assert failed(await explain(served, **asked)) == ["key.state"]


async def test_an_old_token_is_explained_and_a_forged_one_named(served: Served) -> None:
    broker, _ = served
    token = broker.td().token(b"\x0b" * 32)
    broker.clock.advance(days=30)
    assert (await explain(served, key_uri=str(KEY), attestation_result=token)).granted
    head, payload, signature = token.split(".")
    forged = ".".join((head, payload, signature[:-4] + "AAAA"))
    answer = await explain(served, key_uri=str(KEY), attestation_result=forged)
    assert (failed(answer), answer.blocks[0].wanted) == (["token"], "token.signature")
    answer = await explain(served, key_uri=str(KEY), attestation_result="no token")
    assert failed(answer) == ["token"]


async def test_the_purpose_can_be_chosen(served: Served) -> None:
    token = served[0].td().token(b"\x0b" * 32)
    answer = await explain(served, key_uri=str(KEY), attestation_result=token, purpose=pb.PURPOSE_SERVE)
    assert failed(answer) == ["key.purposes"]


async def test_a_logged_request_is_explained(served: Served) -> None:
    broker, _ = served
    await asks(broker, ear={"workload": {"script": b"\x99" * 48}})
    index = (await broker.log())[0].index
    answer = await explain(served, index=index)
    recorded = (await broker.log())[0].entry.blocks
    assert failed(answer) == ["workload.script"]
    assert [(b.name, b.ok, b.wanted, b.got) for b in answer.blocks] == [
        (b.name, b.ok, b.wanted, b.got) for b in recorded
    ]
    assert (await explain(served, index=index, policy_yaml=a_policy(workload=OTHER_SCRIPT))).granted


async def test_what_is_no_request_of_the_tenant_is_not_explained(served: Served) -> None:
    broker, _ = served
    await asks(broker)
    index = (await broker.log())[0].index
    await refused(explain(served, STRANGER, index=index), Code.DECISION_NOT_FOUND)
    await refused(explain(served, index=index + 1), Code.DECISION_NOT_FOUND)
    await refused(explain(served, index=2**64 - 1), Code.DECISION_NOT_FOUND)
    await refused(explain(served, index=1), Code.ARGUMENT_INVALID)  # the key's creation
    await refused(explain(served), Code.ARGUMENT_INVALID)
    other = as_yaml(policy_document(OTHER_KEY))
    await refused(explain(served, index=index, policy_yaml=other), Code.ARGUMENT_INVALID)


async def test_another_tenants_policy_or_key_does_not_exist(served: Served) -> None:
    token = served[0].td().token()
    for asked in ({"key_uri": str(KEY)}, {"policy_yaml": a_policy()}):
        await refused(explain(served, STRANGER, attestation_result=token, **asked), Code.KEY_NOT_FOUND)
    await refused(replay(served, STRANGER, policy_yaml=a_policy()), Code.KEY_NOT_FOUND)
    await refused(explain(served, key_uri=str(OTHER_KEY), attestation_result=token), Code.KEY_NOT_FOUND)


async def test_a_policy_that_does_not_parse_is_refused(served: Served) -> None:
    await refused(replay(served, policy_yaml=b"kind: x"), Code.POLICY_INVALID)
    await refused(replay(served), Code.KEY_URI_INVALID)
    await refused(replay(served, policy_yaml=a_policy(), limit=10_001), Code.ARGUMENT_INVALID)


async def test_a_replay_says_who_would_gain_and_who_would_lose(served: Served) -> None:
    broker, _ = served
    await asks(broker)  # granted
    await asks(broker, ear={"workload": {"script": b"\x99" * 48}})  # denied
    await asks(broker, who=ANOTHER_RANK)  # granted
    narrow = await replay(served, policy_yaml=a_policy(workload=OTHER_SCRIPT))
    assert [(a.caller, a.was_granted, a.would_be_granted, failed(a)) for a in narrow] == [
        (str(ANOTHER_RANK), True, False, ["workload.script"]),
        (str(RANK), False, True, []),
        (str(RANK), True, False, ["workload.script"]),
    ]
    assert [answer.index for answer in narrow] == sorted((answer.index for answer in narrow), reverse=True)
    identity = {"spiffe": [f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/job/j-1/rank/*"]}
    by_name = await replay(served, policy_yaml=a_policy(identity=identity))
    assert [(a.was_granted, a.would_be_granted) for a in by_name] == [(True, False), (False, False), (True, True)]


async def test_the_policy_in_force_replays_as_it_decided(served: Served) -> None:
    broker, _ = served
    await broker.replace_policy(release={"max_per_job": "2"})
    for _ in range(3):
        await asks(broker)
    await asks(broker, purpose=Purpose.SERVE)
    await asks(broker, ear={"tee": {"debug": True}})
    await asks(broker, renewal=True, key_version=1)
    stored = await broker.owners.get(owner(), KEY)
    answers = await replay(served, policy_yaml=stored.policy_yaml)
    assert [answer.was_granted for answer in answers] == [True, False, False, False, True, True]
    assert [answer.would_be_granted for answer in answers] == [answer.was_granted for answer in answers]
    assert failed(answers[3]) == ["release.max_per_job"]


async def test_counters_of_a_replay_are_those_of_the_time(served: Served) -> None:
    broker, _ = served
    for _ in range(3):
        await asks(broker)
    await asks(broker, who=ANOTHER_RANK)
    answers = await replay(served, policy_yaml=a_policy({"max_per_job": "2"}))
    assert [answer.would_be_granted for answer in answers] == [True, False, True, True]


async def test_a_replay_is_bounded_in_time_and_number(served: Served) -> None:
    broker, _ = served
    for _ in range(3):
        await asks(broker)
        broker.clock.advance(hours=1)
    everything = await replay(served, policy_yaml=a_policy())
    assert len(everything) == 3
    assert await replay(served, policy_yaml=a_policy(), limit=2) == everything[:2]
    assert await replay(served, policy_yaml=a_policy(), since_s=2 * 3600) == everything[:2]
    assert await replay(served, policy_yaml=a_policy(), since_s=60) == []
    assert await replay(served, policy_yaml=a_policy(), since_s=2**64 - 1) == everything


async def test_a_long_log_is_replayed_in_order_and_whole(served: Served) -> None:
    broker, _ = served
    for _ in range(40):
        await asks(broker)
        await broker.td().begin()
        await broker.generate()  # an owner's: no request of a workload
    answers = await replay(served, policy_yaml=a_policy())
    assert len(answers) == 40
    assert all(answer.would_be_granted for answer in answers)
    assert len({answer.index for answer in answers}) == 40


async def test_requests_for_other_keys_are_not_replayed(served: Served) -> None:
    broker, _ = served
    await broker.create_key(policy_document(OTHER_KEY), OTHER_KEY)
    await asks(broker, key=OTHER_KEY)
    assert await replay(served, policy_yaml=a_policy()) == []
    assert len(await replay(served, policy_yaml=as_yaml(policy_document(OTHER_KEY)))) == 1


async def test_what_had_no_authentic_token_would_be_granted_by_no_policy(served: Served) -> None:
    broker, _ = served
    td = broker.td()
    nonce = await td.begin()
    head, payload, signature = td.token(nonce).split(".")
    with suppress(CloisterError):
        await broker.releases.release(td.workload, td.asked(nonce, ".".join((head, payload, "AAAA" + signature[4:]))))
    (answer,) = await replay(served, policy_yaml=a_policy())
    assert (answer.was_granted, answer.would_be_granted, failed(answer)) == (False, False, ["token"])


async def test_asking_changes_nothing(served: Served) -> None:
    broker, _ = served
    await asks(broker)
    before = await broker.log()
    await replay(served, policy_yaml=a_policy())
    await explain(served, index=before[0].index)
    assert await broker.log() == before


async def test_workloads_neither_ask_nor_approve(served: Served) -> None:
    for service, method, request in (
        ("PolicyService", "ExplainPolicy", pb.ExplainPolicyRequest(index=1)),
        ("ApprovalService", "SubmitApproval", pb.SubmitApprovalRequest(envelope=b"{}")),
        ("ApprovalService", "ListApprovals", pb.ListApprovalsRequest(key_uri=str(KEY))),
    ):
        await refused(call(served, service, method, request, RANK), Code.CALLER_NOT_ALLOWED)
    await refused(replay(served, RANK, policy_yaml=a_policy()), Code.CALLER_NOT_ALLOWED)


async def test_approvals_are_listed_with_what_they_say(served: Served) -> None:
    broker, _ = served
    approver = Approver()
    await broker.replace_policy(release={"approvals": {"threshold": "1", "of": [approver.name]}})
    digest = (await broker.owners.get(owner(), KEY)).record.policy_digest
    until = broker.clock() + timedelta(hours=1)
    envelope = approver.approve(digest, job_of(RANK), until=until)
    await call(served, "ApprovalService", "SubmitApproval", pb.SubmitApprovalRequest(envelope=envelope), OWNER)
    answer = await call(served, "ApprovalService", "ListApprovals", pb.ListApprovalsRequest(key_uri=str(KEY)))
    (found,) = answer.approvals
    assert (found.approver, found.job, found.purpose) == (approver.name, f"{TENANT}/job/j-1", pb.PURPOSE_TRAIN)
    assert (found.policy_digest, found.expires_unix_ms) == (digest, int(until.timestamp() * 1000))
    assert found.envelope == envelope


@pytest.mark.parametrize("envelope", [b"", b"{}", b"\xff", b'{"payload":"","payloadType":"x","signatures":[]}'])
async def test_what_is_no_approval_is_refused(served: Served, envelope: bytes) -> None:
    request = pb.SubmitApprovalRequest(envelope=envelope)
    await refused(call(served, "ApprovalService", "SubmitApproval", request), Code.ENVELOPE_INVALID)
