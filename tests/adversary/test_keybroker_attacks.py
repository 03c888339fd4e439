# SPDX-License-Identifier: Apache-2.0
"""The attacks the broker has to stop, each against a whole broker with a neighbour that is let through.

Whatever is denied stands in the log with the block that failed, before the caller hears of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator, Awaitable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from cloister.ear import issue
from cloister.errors import CloisterError, Code
from cloister.hpke import HpkeError, HpkeKeyPair
from cloister.identity import SpiffeId
from cloister.keyuri import KeyUri
from cloister.policyblocks import digest_text
from cloister.release.keys import KeyState, Purpose
from cloister_keybroker.answers import Recipient
from cloister_keybroker.datakeys import WrappedKey
from cloister_keybroker.datasets import Publication
from cloister_keybroker.owners import NewKey
from fakes.certs import TRUST_DOMAIN, TestCa
from fakes.keybroker_harness import (
    COLLEAGUE,
    KEY,
    OTHER_KEY,
    OWNER,
    RANK,
    STRANGER,
    TENANT,
    Broker,
    Clock,
    Document,
    a_broker,
    as_yaml,
    new_key,
    owner,
    policy_document,
    recipient,
)
from fakes.signing import provisioned, signed_policy

FOREIGN_RANK = SpiffeId.of_rank(TRUST_DOMAIN, tenant="hospital-b", job="j-1", rank=1)
SIBLING = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job="j-1", rank=0)
BACKEND = SpiffeId.of_backend(TRUST_DOMAIN, tenant=TENANT, model="reviews", backend="b-0")


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path, Clock()) as found:
        yield found


async def denied(
    broker: Broker, attempt: Awaitable[object], code: Code, block: str, tenant: str = TENANT
) -> CloisterError:
    """Expect this error, and the denial with its failed block as the newest entry of the log."""
    before = len(await broker.log(tenant))
    with pytest.raises(CloisterError) as caught:
        await attempt
    assert caught.value.code is code, caught.value
    log = await broker.log(tenant)
    assert len(log) == before + 1
    assert not log[0].entry.granted
    assert next(b.name for b in log[0].entry.blocks if not b.ok) == block
    return caught.value


async def test_the_right_workload_gets_its_key_and_the_same_one_again(broker: Broker) -> None:
    await broker.create_key()
    td, sibling = broker.td(), broker.td(SIBLING)
    first = await td.release()
    again = await sibling.release(wrapped=first.data_key.wrapped)
    assert sibling.open(again) == td.open(first)
    assert len(td.open(first)) == 32
    assert [logged.entry.granted for logged in await broker.log()] == [True, True, True]


# A token is worth something on one channel, for one HPKE key, for five minutes.


async def test_a_stolen_token_is_worth_nothing_on_another_channel(broker: Broker) -> None:
    await broker.create_key()
    victim = broker.td()
    thief = broker.td()  # same SPIFFE id, even: another certificate
    nonce = await thief.begin()
    asked = thief.asked(nonce, victim.token(nonce), recipient=recipient(victim.hpke))
    await denied(broker, broker.releases.release(thief.workload, asked), Code.TOKEN_INVALID, "token.certificate")


async def test_a_stolen_token_is_worth_nothing_to_another_identity(broker: Broker) -> None:
    await broker.create_key()
    victim, thief = broker.td(), broker.td(SIBLING)
    nonce = await thief.begin()
    asked = thief.asked(nonce, victim.token(nonce))
    await denied(broker, broker.releases.release(thief.workload, asked), Code.TOKEN_INVALID, "token.subject")


async def test_a_swapped_hpke_key_gets_nothing(broker: Broker) -> None:
    await broker.create_key()
    td, attacker = broker.td(), HpkeKeyPair.generate()
    nonce = await td.begin()
    asked = td.asked(nonce, td.token(nonce), recipient=recipient(attacker))
    await denied(broker, broker.releases.release(td.workload, asked), Code.TOKEN_INVALID, "token.hpke_key")


async def test_an_answer_opens_for_no_other_hpke_key_and_no_other_question(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    released = await td.release()
    with pytest.raises(HpkeError):
        HpkeKeyPair.generate().open(released.data_key.sealed, info=released.data_key.binding.hpke_info())
    for field, value in (
        ("client_nonce", bytes(32)),
        ("key_version", 2),
        ("purpose", "serve"),
        ("wrapped_digest", b""),
    ):
        other = dataclasses.replace(released.data_key.binding, **{field: value})
        with pytest.raises(HpkeError):
            td.hpke.open(released.data_key.sealed, info=other.hpke_info())


async def test_a_token_that_has_expired_is_refused(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    token = td.token(bytes(32))
    broker.clock.advance(minutes=5, seconds=31)
    nonce = await td.begin()
    await denied(broker, broker.releases.release(td.workload, td.asked(nonce, token)), Code.TOKEN_INVALID, "token")


async def test_a_token_older_than_the_policy_allows_is_refused(broker: Broker) -> None:
    await broker.create_key(policy_document(evidence={"max_age": "60s", "nonce": "verifier"}))
    td = broker.td()
    token = td.token()
    broker.clock.advance(seconds=59)
    nonce = await td.begin()
    await broker.releases.release(td.workload, td.asked(nonce, token))
    broker.clock.advance(seconds=2)
    nonce = await td.begin()
    asked = td.asked(nonce, token)
    await denied(broker, broker.releases.release(td.workload, asked), Code.RELEASE_DENIED, "evidence.max_age")


async def test_a_token_of_before_the_brokers_nonce_is_refused(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    earlier = td.token()
    nonce = await td.begin()
    asked = td.asked(nonce, earlier)
    await denied(broker, broker.releases.release(td.workload, asked), Code.RELEASE_DENIED, "evidence.nonce")


@pytest.mark.parametrize("forgery", ["other key", "flipped bit", "none", "garbage", "other audience", "other issuer"])
async def test_a_forged_token_is_refused(broker: Broker, forgery: str) -> None:
    await broker.create_key()
    td = broker.td()
    nonce = await td.begin()
    good, ear = td.token(nonce), td.ear(nonce)
    head, body, signature = good.split(".")
    token = {
        "other key": issue(ear, key=TestCa().token_key, key_id=broker.ca.token_key_id),
        "flipped bit": f"{head}.{body[:40]}{'A' if body[40] != 'A' else 'B'}{body[41:]}.{signature}",
        "none": f"eyJhbGciOiJub25lIn0.{body}.",
        "garbage": "no token",
        "other audience": broker.sign(dataclasses.replace(ear, audience="spiffe://elsewhere.test")),
        "other issuer": broker.sign(dataclasses.replace(ear, issuer=f"spiffe://{TRUST_DOMAIN}/service/trainer")),
    }[forgery]
    await denied(broker, broker.releases.release(td.workload, td.asked(nonce, token)), Code.TOKEN_INVALID, "token")


async def test_a_bad_verdict_of_attest_is_refused(broker: Broker) -> None:
    """Events after the seal, a debug TD and the like never come as more than this."""
    await broker.create_key()
    attempt = broker.td().release(ear={"status": "contraindicated"})
    await denied(broker, attempt, Code.RELEASE_DENIED, "token.status")


# The broker's nonce is single use, for a minute, for one caller, key and purpose.


async def test_a_replayed_request_is_refused(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    nonce = await td.begin()
    asked = td.asked(nonce, td.token(nonce))
    await broker.releases.release(td.workload, asked)
    await denied(broker, broker.releases.release(td.workload, asked), Code.NONCE_UNKNOWN, "nonce")


async def test_a_denied_request_uses_its_nonce_up(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    nonce = await td.begin()
    bad, good = td.token(nonce, workload={"script": bytes(48)}), td.token(nonce)
    await denied(
        broker, broker.releases.release(td.workload, td.asked(nonce, bad)), Code.RELEASE_DENIED, "workload.script"
    )
    await denied(broker, broker.releases.release(td.workload, td.asked(nonce, good)), Code.NONCE_UNKNOWN, "nonce")


async def test_a_nonce_of_another_caller_is_refused(broker: Broker) -> None:
    await broker.create_key()
    td, sibling = broker.td(), broker.td(SIBLING)
    nonce = await sibling.begin()
    asked = td.asked(nonce, td.token(nonce))
    await denied(broker, broker.releases.release(td.workload, asked), Code.NONCE_UNKNOWN, "nonce")


@pytest.mark.parametrize(("key", "purpose"), [(OTHER_KEY, Purpose.TRAIN), (KEY, Purpose.EVALUATE)])
async def test_a_nonce_for_another_key_or_purpose_is_refused(broker: Broker, key: KeyUri, purpose: Purpose) -> None:
    await broker.create_key()
    await broker.create_key(uri=OTHER_KEY)
    td = broker.td()
    nonce = await td.begin(key, purpose)
    asked = td.asked(nonce, td.token(nonce))
    await denied(broker, broker.releases.release(td.workload, asked), Code.NONCE_UNKNOWN, "nonce")


async def test_a_nonce_that_has_expired_is_refused(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    nonce = await td.begin()
    broker.clock.advance(seconds=60)
    asked = td.asked(nonce, td.token(nonce))
    await denied(broker, broker.releases.release(td.workload, asked), Code.NONCE_UNKNOWN, "nonce")


# What the key is for, and whose it is.


async def test_a_key_that_is_not_for_this_purpose_is_not_released(broker: Broker) -> None:
    await broker.create_key(purposes=frozenset({Purpose.SERVE}))
    await denied(broker, broker.td().release(), Code.RELEASE_DENIED, "key.purposes")


async def test_a_purpose_the_policy_does_not_name_is_not_released(broker: Broker) -> None:
    document = policy_document()
    document["spec"]["key"]["purposes"] = ["serve"]
    await broker.create_key(document)
    await denied(broker, broker.td().release(), Code.RELEASE_DENIED, "policy.key.purposes")


async def test_a_backend_does_not_train_and_a_rank_does_not_serve(broker: Broker) -> None:
    await broker.create_key(policy_document(identity=None))
    await broker.td(BACKEND).release(purpose=Purpose.SERVE)
    await denied(broker, broker.td(BACKEND).release(), Code.RELEASE_DENIED, "key.purposes")
    await denied(broker, broker.td().release(purpose=Purpose.SERVE), Code.RELEASE_DENIED, "key.purposes")


async def test_a_workload_never_exports(broker: Broker) -> None:
    await broker.create_key()
    attempt = broker.td().release(purpose=Purpose.EXPORT)
    await denied(broker, attempt, Code.RELEASE_DENIED, "policy.key.purposes")


async def test_a_disabled_key_is_not_released_until_it_is_enabled_again(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    released = await td.release()
    await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
    await denied(broker, td.release(wrapped=released.data_key.wrapped), Code.KEY_DISABLED, "key.state")
    await denied(broker, broker.generate(), Code.KEY_DISABLED, "key.state")
    await broker.owners.set_state(owner(), KEY, KeyState.ENABLED)
    assert td.open(await td.release(wrapped=released.data_key.wrapped)) == td.open(released)


async def test_a_key_disabled_between_begin_and_release_is_not_released(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    nonce = await td.begin()
    await broker.owners.set_state(owner(), KEY, KeyState.DISABLED)
    asked = td.asked(nonce, td.token(nonce))
    await denied(broker, broker.releases.release(td.workload, asked), Code.KEY_DISABLED, "key.state")


async def test_a_foreign_key_cannot_be_told_from_one_that_does_not_exist(broker: Broker) -> None:
    await broker.create_key()
    foreign, absent = str(KEY), f"{KEY}-not"
    texts = []
    for uri in (foreign, absent):
        key = KeyUri.parse(uri)
        errors = [
            await denied(broker, broker.td(FOREIGN_RANK).begin(key), Code.KEY_NOT_FOUND, "key", "hospital-b"),
            await denied(broker, call_release(broker, key), Code.KEY_NOT_FOUND, "key", "hospital-b"),
            await denied(broker, disable(broker, STRANGER, key), Code.KEY_NOT_FOUND, "key", "hospital-b"),
            await denied(broker, generate(broker, STRANGER, key), Code.KEY_NOT_FOUND, "key", "hospital-b"),
        ]
        with pytest.raises(CloisterError) as caught:
            await broker.owners.get(owner(STRANGER), key)
        texts.append([str(error).replace(uri, "<key>") for error in (*errors, caught.value)])
    assert texts[0] == texts[1]
    # Nothing of it stands in the owner's log.
    assert [logged.entry.action for logged in await broker.log()] == ["create-key"]


async def call_release(broker: Broker, key: KeyUri) -> object:
    td = broker.td(FOREIGN_RANK)
    return await broker.releases.release(td.workload, td.asked(secrets.token_bytes(32), td.token(), key=key))


async def disable(broker: Broker, who: SpiffeId, key: KeyUri) -> object:
    return await broker.owners.set_state(owner(who), key, KeyState.DISABLED)


async def generate(broker: Broker, who: SpiffeId, key: KeyUri) -> object:
    return await broker.data_keys.generate(owner(who), key, recipient(HpkeKeyPair.generate()))


async def test_a_colleague_sees_a_key_but_neither_changes_nor_uses_it(broker: Broker) -> None:
    await broker.create_key()
    assert (await broker.owners.get(owner(COLLEAGUE), KEY)).record.uri == KEY
    assert len(await broker.owners.list(owner(COLLEAGUE), after="", limit=10)) == 1
    yaml = as_yaml(policy_document(version=2))
    for attempt in (
        disable(broker, COLLEAGUE, KEY),
        generate(broker, COLLEAGUE, KEY),
        broker.owners.put_policy(owner(COLLEAGUE), KEY, signed_policy(yaml)),
        broker.owners.withdraw_policy(owner(COLLEAGUE), KEY),
        broker.owners.rotate(owner(COLLEAGUE), KEY),
        broker.owners.retire(owner(COLLEAGUE), KEY, 1),
        broker.destruction.schedule(owner(COLLEAGUE), KEY, timedelta()),
        broker.destruction.cancel(owner(COLLEAGUE), KEY),
        broker.open_key(bytes(61), who=COLLEAGUE),
        broker.data_keys.rewrap(owner(COLLEAGUE), WrappedKey(KEY, 1, bytes(61))),
        broker.data_keys.publish(
            owner(COLLEAGUE), WrappedKey(KEY, 1, bytes(61)), Publication("reviews", 1, bytes(48)), b""
        ),
    ):
        await denied(broker, attempt, Code.CALLER_NOT_ALLOWED, "key.owner")


async def test_nobody_creates_keys_in_another_tenant(broker: Broker) -> None:
    attempt = broker.owners.create(owner(STRANGER), new_key(KEY, [Purpose.TRAIN]))
    await denied(broker, attempt, Code.CALLER_NOT_ALLOWED, "key.tenant", "hospital-b")


async def test_a_key_is_not_created_twice(broker: Broker) -> None:
    await broker.create_key()
    for who in (OWNER, COLLEAGUE):
        statement = provisioned(KEY, who, [Purpose.TRAIN])
        with pytest.raises(CloisterError) as caught:
            await broker.owners.create(owner(who), NewKey(KEY, frozenset({Purpose.TRAIN}), b"", statement))
        assert caught.value.code is Code.KEY_EXISTS
    await broker.td().release()  # the key and its policy are as they were


# Policies.


async def test_without_a_policy_nothing_is_released(broker: Broker) -> None:
    await broker.owners.create(owner(), new_key(KEY, [Purpose.TRAIN]))
    await denied(broker, broker.td().release(), Code.RELEASE_DENIED, "policy")


async def test_an_empty_policy_cannot_be_put_in_force(broker: Broker) -> None:
    await broker.create_key()
    for yaml in (b"", b"{}", as_yaml(policy_document(version=2, workload={"script": []}))):
        with pytest.raises(CloisterError) as caught:
            await broker.owners.put_policy(owner(), KEY, signed_policy(yaml))
        assert caught.value.code is Code.POLICY_INVALID
    await broker.td().release()


async def test_a_policy_is_neither_rolled_back_nor_skipped_nor_forked(broker: Broker) -> None:
    first = policy_document()
    await broker.create_key(first)
    stored = await broker.owners.get(owner(), KEY)
    await broker.replace_policy(workload={"script": [digest_text(bytes(48))]})
    second = await broker.owners.get(owner(), KEY)
    attempts: list[Document] = [
        first,
        policy_document(version=2, previous=stored.record.policy_digest),
        policy_document(version=4, previous=second.record.policy_digest),
        policy_document(version=3, previous=stored.record.policy_digest),
        policy_document(version=3, previous=bytes(48)),
    ]
    for document in attempts:
        attempt = broker.owners.put_policy(owner(), KEY, signed_policy(as_yaml(document)))
        await denied(broker, attempt, Code.POLICY_VERSION, "policy.version")
    # The narrower policy is still the one in force.
    await denied(broker, broker.td().release(), Code.RELEASE_DENIED, "workload.script")
    third = as_yaml(policy_document(version=3, previous=second.record.policy_digest))
    await broker.owners.put_policy(owner(), KEY, signed_policy(third))
    await broker.td().release()


async def test_a_first_policy_has_no_version_but_one(broker: Broker) -> None:
    with pytest.raises(CloisterError) as caught:
        await broker.create_key(policy_document(version=2, previous=bytes(48)))
    assert caught.value.code is Code.POLICY_VERSION


@pytest.mark.parametrize("wrong", ["key", "owner"])
async def test_a_policy_for_another_key_or_owner_is_refused(broker: Broker, wrong: str) -> None:
    document = policy_document(OTHER_KEY if wrong == "key" else KEY)
    if wrong == "owner":
        document["metadata"]["owner"] = str(COLLEAGUE)
    with pytest.raises(CloisterError) as caught:
        await broker.create_key(document)
    assert caught.value.code is Code.POLICY_INVALID


@pytest.mark.parametrize(
    ("block", "when", "ear"),
    [
        ("workload.script", {}, {"workload": {"script": b"\x99" * 48}}),
        ("workload.config", {"workload": {"script": ["sha384:" + "23" * 48], "config": ["sha384:" + "00" * 48]}}, {}),
        ("tee.simulated", {"tee": {"type": "tdx"}}, {}),
        ("tee.simulated", {"tee": {"type": "tdx", "simulated": "deny"}}, {}),
        ("tee.debug", {}, {"tee": {"debug": True}}),
        ("tee.platforms.piid", {"tee": {"type": "tdx", "simulated": "allow", "platforms": {"piid": ["00" * 16]}}}, {}),
        ("measurements.mr_td", {"measurements": {"mr_td": ["00" * 48]}}, {}),
        ("identity.spiffe", {"identity": {"spiffe": [f"spiffe://{TRUST_DOMAIN}/ns/{TENANT}/job/j-2/rank/*"]}}, {}),
    ],
)
async def test_a_workload_that_is_not_the_policys_gets_nothing(
    broker: Broker, block: str, when: dict[str, Any], ear: dict[str, Any]
) -> None:
    await broker.create_key(policy_document(**when))
    error = await denied(broker, broker.td().release(ear=ear), Code.RELEASE_DENIED, block)
    assert f"block {block}" in error.what
    assert error.why.startswith("wanted ")


@pytest.mark.parametrize("group", ["X25519", ""])
async def test_a_channel_without_the_key_exchange_that_the_policy_wants_gets_nothing(
    broker: Broker, group: str
) -> None:
    await broker.create_key(policy_document(channel={"key_exchange": ["X25519MLKEM768"]}))
    td = broker.td()
    assert len(td.open(await td.release())) == 32
    nonce = await td.begin()
    weaker = dataclasses.replace(td.workload, peer=dataclasses.replace(td.workload.peer, key_exchange_group=group))
    attempt = broker.releases.release(weaker, td.asked(nonce, td.token(nonce)))
    await denied(broker, attempt, Code.RELEASE_DENIED, "channel.key_exchange")


async def test_a_job_gets_a_key_as_often_as_the_policy_says_across_restarts(tmp_path: Path) -> None:
    ca, clock = TestCa(), Clock()
    paths = tmp_path / "store.sqlite", tmp_path / "root.key"
    document = policy_document()
    document["spec"]["release"]["max_per_job"] = "3"
    broker = await Broker.open(*paths, ca, clock)
    await broker.create_key(document)
    await broker.td().release()
    await broker.td(SIBLING).release()
    await denied(broker, broker.td().release(ear={"status": "warning"}), Code.RELEASE_DENIED, "token.status")
    broker.store.close()
    broker = await Broker.open(*paths, ca, clock)
    await broker.td().release()  # the denial did not count
    await denied(broker, broker.td().release(), Code.RELEASE_DENIED, "release.max_per_job")
    other_job = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job="j-2", rank=0)
    await broker.td(other_job).release()
    await broker.replace_policy(release={"max_per_job": "1"})  # a new policy counts anew
    await broker.td().release()
    await denied(broker, broker.td().release(), Code.RELEASE_DENIED, "release.max_per_job")
    broker.store.close()


async def test_releases_that_race_are_counted_one_by_one(broker: Broker) -> None:
    document = policy_document()
    document["spec"]["release"]["max_per_job"] = "3"
    await broker.create_key(document)
    outcomes = await asyncio.gather(*(broker.td().release() for _ in range(12)), return_exceptions=True)
    denials = [outcome for outcome in outcomes if isinstance(outcome, CloisterError)]
    assert len(denials) == 9
    assert all("release.max_per_job" in denial.what for denial in denials)


async def test_a_policy_that_changes_while_keys_are_released_is_obeyed_at_once(broker: Broker) -> None:
    await broker.create_key()
    narrow = broker.replace_policy(workload={"script": [digest_text(bytes(48))]})
    await asyncio.gather(narrow, *(broker.td().release() for _ in range(12)), return_exceptions=True)
    changed = next(logged.index for logged in await broker.log() if logged.entry.action == "put-policy")
    for logged in await broker.log():
        if logged.entry.action == "generate":
            assert logged.entry.granted == (logged.index < changed)


# Wrapped data keys.


async def test_a_wrapped_key_of_another_key_does_not_open(broker: Broker) -> None:
    await broker.create_key()
    await broker.create_key(uri=OTHER_KEY)
    other = await broker.td().release(key=OTHER_KEY)
    attempt = broker.td().release(wrapped=other.data_key.wrapped)
    await denied(broker, attempt, Code.WRAPPED_KEY_INVALID, "data_key")


async def test_a_wrapped_key_with_any_bit_flipped_does_not_open(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    wrapped = (await td.release()).data_key.wrapped
    for position in range(len(wrapped)):
        bad = bytearray(wrapped)
        bad[position] ^= 1 << position % 8
        await denied(broker, td.release(wrapped=bytes(bad)), Code.WRAPPED_KEY_INVALID, "data_key")
    for bad_size in (wrapped[:-1], wrapped + b"\0", b"\x01"):
        await denied(broker, td.release(wrapped=bad_size), Code.WRAPPED_KEY_INVALID, "data_key")


async def test_a_wrapped_key_is_not_unwrapped_for_whom_the_policy_denies(broker: Broker) -> None:
    """A denied caller does not even learn whether its wrapped key is one."""
    await broker.create_key()
    attempt = broker.td().release(wrapped=bytes(61), ear={"workload": {"script": bytes(48)}})
    await denied(broker, attempt, Code.RELEASE_DENIED, "workload.script")
    assert "data_key" not in [block.name for block in (await broker.log())[0].entry.blocks]


@pytest.mark.parametrize("version", [0, 2, 2**32 - 1])
async def test_a_version_that_the_key_does_not_have_is_refused(broker: Broker, version: int) -> None:
    await broker.create_key()
    td = broker.td()
    wrapped = (await td.release()).data_key.wrapped
    attempt = td.release(wrapped=wrapped, key_version=version)
    await denied(broker, attempt, Code.RELEASE_DENIED, "key.version" if version else "policy.key.versions")


# The owner's own machine.


async def test_an_owner_seals_and_opens_on_their_own_machine_with_purpose_export_only(broker: Broker) -> None:
    await broker.create_key()
    await broker.create_key(uri=OTHER_KEY, purposes=frozenset({Purpose.TRAIN}))
    made, secret = await broker.generate()
    assert await broker.open_key(made.wrapped) == secret
    made, _ = await broker.generate(OTHER_KEY)
    attempt = broker.open_key(made.wrapped, uri=OTHER_KEY)
    await denied(broker, attempt, Code.RELEASE_DENIED, "key.purposes")


async def test_an_owners_wrapped_key_of_another_key_or_version_does_not_open(broker: Broker) -> None:
    await broker.create_key()
    await broker.create_key(uri=OTHER_KEY)
    made, _ = await broker.generate(OTHER_KEY)
    attempt = broker.open_key(made.wrapped)
    await denied(broker, attempt, Code.WRAPPED_KEY_INVALID, "data_key")
    attempt = broker.open_key(made.wrapped, uri=OTHER_KEY, version=2)
    await denied(broker, attempt, Code.WRAPPED_KEY_INVALID, "key.version")


async def test_requests_that_cannot_be_right_are_refused_before_any_decision(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    good = recipient(td.hpke)
    bad_recipients = [
        Recipient(bytes(31), good.kem_id, good.public_key),
        Recipient(good.client_nonce, 0x0020, good.public_key),
        Recipient(good.client_nonce, good.kem_id, good.public_key[:-1]),
    ]
    nonce = await td.begin()
    asked = td.asked(nonce, td.token(nonce))
    bad = [dataclasses.replace(asked, recipient=one) for one in bad_recipients]
    bad += [dataclasses.replace(asked, broker_nonce=b""), dataclasses.replace(asked, wrapped=bytes(5000))]
    for request in bad:
        with pytest.raises(CloisterError) as caught:
            await broker.releases.release(td.workload, request)
        assert caught.value.code is Code.ARGUMENT_INVALID
    for one in bad_recipients:
        with pytest.raises(CloisterError) as caught:
            await broker.data_keys.generate(owner(), KEY, one)
        assert caught.value.code is Code.ARGUMENT_INVALID
    await broker.releases.release(td.workload, asked)  # none of them used the nonce up


async def test_the_log_says_who_asked_for_what_and_never_the_key(broker: Broker) -> None:
    await broker.create_key()
    td = broker.td()
    secret = td.open(await td.release())
    entry = (await broker.log())[0].entry
    assert (entry.action, entry.caller, entry.key_uri) == ("generate", str(RANK), str(KEY))
    assert (entry.purpose, entry.channel, entry.request_id) == ("train", "TLSv1.3, X25519MLKEM768", "request-1")
    assert secret.reveal() not in entry.to_bytes(index=0, time_ms=0, salt=bytes(16))
