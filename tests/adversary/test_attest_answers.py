# SPDX-License-Identifier: Apache-2.0
"""A TD and an owner take no answer that is not about their own request: neither attest's nor the broker's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519

from cloister.api.attest.v1 import attest_pb2
from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.api.keybroker.v1 import keybroker_pb2
from cloister.cli.policyfile import PolicyDraft
from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.keys import KeyClient
from cloister.guest.owner import verify_service_evidence
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister.identity import Role
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.secret import SecretBytes
from cloister.tdx.workload import read_workload
from fakes.attest_broker import DATA_KEY, Broker, broker, lies
from fakes.attest_harness import ATTEST_ID, JOB, SCRIPT, TRUST_DOMAIN, LocalAttest, csr, local_attest, user_material
from fakes.signing import OWNER_KEY, signing_key

URI = "cloister-key://hospital-a/datasets/reviews"
POLICY = (
    PolicyDraft(
        "reviews",
        f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/user/owner",
        URI,
        ("train",),
        ["sha384:" + "23" * 48],
        [f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/job/*/rank/*"],
    )
    .to_yaml()
    .encode()
)
OTHER_URI = "cloister-key://hospital-a/datasets/other"
WRAPPED = b"the wrapped key of the header"


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest() as local:
        await local.registry.register_job(JOB)
        yield local


@pytest.fixture
async def serving(attest: LocalAttest) -> AsyncIterator[Broker]:
    async with broker(attest) as running:
        yield running


@pytest.fixture
async def rank(attest: LocalAttest) -> Identity:
    return await attest.enrol(attest.td(Role.RANK))


@pytest.fixture
async def owner(attest: LocalAttest) -> StaticCredentials:
    request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key))
    response = await attest.enrolment.issue_user(request)
    return StaticCredentials(user_material(attest.user_key, response.certificate_chain_pem, attest.bundle))


# attest's answers


class LyingAttest:
    """Attest, with its answer changed on the way."""

    def __init__(self, attest: LocalAttest, spoil: Callable[[attest_pb2.AttestResponse], None]) -> None:
        self._enrolment, self._spoil = attest.enrolment, spoil

    async def challenge(self, request: attest_pb2.ChallengeRequest) -> attest_pb2.ChallengeResponse:
        return await self._enrolment.challenge(request)

    async def attest(self, request: attest_pb2.AttestRequest) -> attest_pb2.AttestResponse:
        response = await self._enrolment.attest(request)
        self._spoil(response)
        return response

    async def trust_update(self, sequence: int) -> bytes:
        return await self._enrolment.trust_update(sequence)

    def follow(self, bundle: TrustBundle) -> None:
        self._enrolment.follow(bundle)


async def test_a_td_refuses_answers_that_are_not_about_itself(attest: LocalAttest) -> None:
    stranger = await attest.enrolment.attest(await attest.request(attest.td(Role.TRAINER)))
    guest = attest.td(Role.TRAINER)
    earlier = await attest.enrolment.attest(await attest.request(guest))
    with local_attest() as elsewhere:
        foreign = await elsewhere.enrolment.attest(await elsewhere.request(elsewhere.td(Role.TRAINER)))

    def take(response: attest_pb2.AttestResponse, other: attest_pb2.AttestResponse, *fields: str) -> None:
        for field in fields:
            setattr(response, field, getattr(other, field))

    for spoil, code in (
        (lambda r: take(r, stranger, "certificate_chain_pem"), Code.TLS_FAILED),
        (lambda r: take(r, stranger, "attestation_result"), Code.TOKEN_INVALID),
        (lambda r: take(r, earlier, "attestation_result"), Code.TOKEN_INVALID),
        (lambda r: take(r, earlier, "certificate_chain_pem"), Code.TOKEN_INVALID),
        (lambda r: take(r, earlier, "certificate_chain_pem", "attestation_result"), Code.TOKEN_INVALID),
        (lambda r: take(r, foreign, "attestation_result"), Code.TOKEN_INVALID),
        (lambda r: take(r, foreign, "trust_bundle"), Code.BUNDLE_INVALID),
        (lambda r: take(r, foreign, "trust_update"), Code.BUNDLE_INVALID),
        (lambda r: take(r, foreign, "trust_bundle", "trust_update"), Code.BUNDLE_INVALID),
        (lambda r: take(r, attest_pb2.AttestResponse(), "certificate_chain_pem"), Code.TLS_FAILED),
        (lambda r: take(r, attest_pb2.AttestResponse(), "attestation_result"), Code.TOKEN_INVALID),
    ):
        with pytest.raises(CloisterError) as caught:
            await Identity.enrol_through(LyingAttest(attest, spoil), guest, bundle=attest.bundle, clock=attest.clock)
        assert caught.value.code is code
    honest = LyingAttest(attest, lambda response: None)
    assert await Identity.enrol_through(honest, guest, bundle=attest.bundle, clock=attest.clock)


async def test_a_refused_refresh_leaves_the_identity_as_it_was(attest: LocalAttest) -> None:
    spoil: list[Callable[[attest_pb2.AttestResponse], None]] = [lambda response: None]
    transport = LyingAttest(attest, lambda response: spoil[0](response))
    guest = attest.td(Role.TRAINER)
    identity = await Identity.enrol_through(transport, guest, bundle=attest.bundle, clock=attest.clock)
    before = await identity.attested()
    spoil[0] = lambda response: response.ClearField("attestation_result")
    with pytest.raises(CloisterError):
        await identity.refresh()
    assert await identity.attested() is before


async def test_results_are_renewed_when_half_of_their_life_is_over(attest: LocalAttest, rank: Identity) -> None:
    first = await rank.attested()
    attest.clock.turn(seconds=149)
    assert await rank.attested() is first
    attest.clock.turn(seconds=2)
    assert await rank.attested() is not first


async def test_a_certificate_about_to_end_is_not_shown_even_with_a_young_result(attest: LocalAttest) -> None:
    short = replace(attest.enrolment._terms, svid=timedelta(seconds=40))
    attest.enrolment._terms = short
    identity = await attest.enrol(attest.td(Role.TRAINER))
    first = await identity.attested()
    attest.clock.turn(seconds=29)
    assert await identity.attested() is first
    attest.clock.turn(seconds=2)
    assert await identity.attested() is not first


async def test_an_expired_identity_says_so(attest: LocalAttest, rank: Identity) -> None:
    attest.clock.turn(hours=1, seconds=1)
    with pytest.raises(CloisterError) as caught:
        rank.current()
    assert caught.value.code is Code.CERTIFICATE_EXPIRED
    await rank.refresh()
    assert rank.current().not_after > attest.clock()


# the broker's answers


async def test_a_rank_gets_its_key_and_records_it(serving: Broker, rank: Identity) -> None:
    key = await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert key.secret == SecretBytes(DATA_KEY)
    assert (key.key_uri, key.key_version, key.wrapped) == (URI, 3, WRAPPED)
    (claim,) = read_workload(rank.guest.event_log).keys_received
    assert (claim.uri, claim.version) == (URI, 3)


async def test_a_rank_gets_a_new_key_for_its_output(serving: Broker, rank: Identity) -> None:
    key = await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=None)
    assert (key.key_version, key.wrapped) == (1, b"a new wrapped key")


async def test_fresh_evidence_is_shown_over_the_very_certificate_it_is_bound_to(
    serving: Broker, rank: Identity
) -> None:
    serving.wants_fresh = True
    before = rank.current()
    client = KeyClient(rank, serving.endpoint)
    await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert rank.current() is not before


async def test_renewals_in_between_do_not_part_a_result_from_its_certificate(
    attest: LocalAttest, serving: Broker, rank: Identity
) -> None:
    client = KeyClient(rank, serving.endpoint)
    releases = [client.release(URI, "train", wrapped=WRAPPED, key_version=3) for _ in range(10)]
    renewals = [rank.refresh() for _ in range(20)]
    keys = await asyncio.gather(*releases, *renewals)
    assert all(key.secret == SecretBytes(DATA_KEY) for key in keys[:10])


@pytest.mark.parametrize(
    "lie",
    [
        {"key_uri": OTHER_URI},
        {"key_version": 2},
        {"purpose": "serve"},
        {"policy_digest": b"\x00" * 48},
        {"evidence_digest": b"\x00" * 48},
        {"client_nonce": b"\x00" * 32},
        {"broker_nonce": b"\x00" * 32},
        {"broker_id": "spiffe://cloister.test/service/gateway"},
        {"wrapped_digest": b"\x00" * 48},
    ],
    ids=lambda lie: next(iter(lie)),
)
async def test_an_answer_bound_to_anything_else_is_refused(
    serving: Broker, rank: Identity, lie: dict[str, object]
) -> None:
    serving.bind = lies(**lie)
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID
    assert read_workload(rank.guest.event_log).keys_received == ()


SPOILT: dict[str, Callable[[Any], None]] = {
    "another key": lambda r: setattr(r.data_key, "key_uri", OTHER_URI),
    "another version": lambda r: setattr(r.data_key, "key_version", 2),
    "another wrapped key": lambda r: setattr(r.data_key, "wrapped", b"other"),
    "a flipped bit in the sealed key": lambda r: setattr(
        r.data_key, "sealed", r.data_key.sealed[:-1] + bytes([r.data_key.sealed[-1] ^ 1])
    ),
    "a flipped bit in the signature": lambda r: setattr(
        r.receipt, "signature", bytes([r.receipt.signature[0] ^ 1]) + r.receipt.signature[1:]
    ),
    "no signature": lambda r: setattr(r.receipt, "signature", b""),
    "another place in the log": lambda r: setattr(r.receipt, "index", 8),
    "another root": lambda r: setattr(r.receipt, "root", b"\x00" * 32),
    "a root of another size": lambda r: setattr(r.receipt, "root", b"\x00"),
    "another log": lambda r: setattr(r.receipt, "log_id", b"\x00" * 48),
    "another receipt key": lambda r: setattr(r.receipt, "receipt_spki_der", b"\x00" * 44),
}
SPOILT_RELEASES: dict[str, Callable[[Any], None]] = {
    **SPOILT,
    "another policy": lambda r: setattr(r, "policy_digest", b"\x00" * 48),
    "another policy version": lambda r: setattr(r, "policy_version", 2),
    "a longer lease": lambda r: setattr(r, "lease_until_unix_ms", r.lease_until_unix_ms + 1),
    "an earlier decision": lambda r: setattr(r, "decided_unix_ms", r.decided_unix_ms - 1),
}


@pytest.mark.parametrize("how", SPOILT_RELEASES)
async def test_a_spoilt_answer_is_refused(serving: Broker, rank: Identity, how: str) -> None:
    serving.spoil = SPOILT_RELEASES[how]
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID


async def test_a_receipt_under_a_key_that_the_evidence_does_not_name_is_refused(
    serving: Broker, rank: Identity
) -> None:
    serving.receipt_key = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID


async def test_a_pinned_receipt_key_is_the_only_one_accepted(serving: Broker, rank: Identity) -> None:
    pinned = serving.identity.guest.keys.receipt_spki_der
    client = KeyClient(rank, serving.endpoint, expected_receipt_spki=pinned)
    await client.release(URI, "train", wrapped=WRAPPED, key_version=3)
    stranger = KeyClient(rank, serving.endpoint, expected_receipt_spki=rank.guest.keys.receipt_spki_der)
    with pytest.raises(CloisterError) as caught:
        await stranger.release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: setattr(r, "nonce", b""),
        lambda r: setattr(r, "nonce", b"\x00" * 31),
        lambda r: r.ClearField("hpke_kem_ids"),
        lambda r: setattr(r, "policy_digest", b"\x00" * 48),
    ],
)
async def test_a_broker_that_begins_badly_is_refused(serving: Broker, rank: Identity, spoil: Any) -> None:
    serving.spoil_begin = spoil
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID


@pytest.mark.parametrize(
    ("uri", "purpose", "wrapped", "version"),
    [
        (URI, "export", WRAPPED, 1),
        (URI, "", WRAPPED, 1),
        (URI, "train", b"", 1),
        (URI, "train", WRAPPED, 0),
        ("cloister-key://", "train", WRAPPED, 1),
    ],
)
async def test_a_senseless_request_never_leaves_the_td(
    rank: Identity, uri: str, purpose: str, wrapped: bytes, version: int
) -> None:
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, "127.0.0.1:1").release(uri, purpose, wrapped=wrapped, key_version=version)
    assert caught.value.code in {Code.ARGUMENT_INVALID, Code.KEY_URI_INVALID}


async def test_a_data_key_of_another_size_is_refused(serving: Broker, rank: Identity) -> None:
    serving.secret = b"\x77" * 16
    with pytest.raises(CloisterError) as caught:
        await KeyClient(rank, serving.endpoint).release(URI, "train", wrapped=WRAPPED, key_version=3)
    assert caught.value.code is Code.RECEIPT_INVALID


# the owner's side


def an_owner(credentials: StaticCredentials, serving: Broker) -> OwnerKeyClient:
    return OwnerKeyClient(credentials, serving.endpoint, signing_key=OWNER_KEY)


async def test_an_owner_gets_data_keys(serving: Broker, owner: StaticCredentials) -> None:
    client = an_owner(owner, serving)
    new = await client.generate_data_key(URI)
    assert (new.secret, new.key_version, new.wrapped) == (SecretBytes(DATA_KEY), 1, b"a new wrapped key")
    again = await client.open_data_key(URI, key_version=3, wrapped=WRAPPED)
    assert (again.secret, again.key_version, again.wrapped) == (SecretBytes(DATA_KEY), 3, WRAPPED)
    assert [key.uri for key in await client.list()] == [
        "cloister-key://hospital-a/one",
        "cloister-key://hospital-a/two",
    ]


@pytest.mark.parametrize("how", SPOILT)
async def test_an_owner_refuses_a_spoilt_answer(serving: Broker, owner: StaticCredentials, how: str) -> None:
    serving.spoil = SPOILT[how]
    with pytest.raises(CloisterError) as caught:
        await an_owner(owner, serving).open_data_key(URI, key_version=3, wrapped=WRAPPED)
    assert caught.value.code is Code.RECEIPT_INVALID


@pytest.mark.parametrize("lie", [{"purpose": "seal"}, {"client_nonce": b"\x00" * 32}, {"policy_digest": b"x"}])
async def test_an_owner_refuses_an_answer_bound_to_anything_else(
    serving: Broker, owner: StaticCredentials, lie: dict[str, object]
) -> None:
    serving.bind = lies(**lie)
    with pytest.raises(CloisterError) as caught:
        await an_owner(owner, serving).open_data_key(URI, key_version=3, wrapped=WRAPPED)
    assert caught.value.code is Code.RECEIPT_INVALID


async def test_an_owner_manages_keys(serving: Broker, owner: StaticCredentials) -> None:
    client = an_owner(owner, serving)
    created = await client.create_key(URI, purposes=["train", "export"], policy=POLICY)
    assert sorted(created.purposes) == [keybroker_pb2.PURPOSE_TRAIN, keybroker_pb2.PURPOSE_EXPORT]
    assert (await client.show(URI)).uri == URI
    assert (await client.enable(URI)).state == keybroker_pb2.KEY_STATE_ENABLED
    assert (await client.disable(URI)).state == keybroker_pb2.KEY_STATE_DISABLED
    assert (await client.put_policy(URI, POLICY)).policy_version == 2
    assert (await client.policy(URI)).policy_yaml == b"policy"


async def test_an_owner_seals_nothing_with_a_key_that_somebody_else_provisioned(
    serving: Broker, owner: StaticCredentials
) -> None:
    stranger = signing_key("a stranger")
    serving.signer = did_key(stranger)
    client = an_owner(owner, serving)
    for attempt in (client.generate_data_key(URI), client.create_key(URI, purposes=["train"])):
        with pytest.raises(CloisterError, match="not created with your signing key") as caught:
            await attempt
        assert caught.value.code is Code.SIGNATURE_INVALID
    # The very broker serves whose key it is.
    assert await OwnerKeyClient(owner, serving.endpoint, signing_key=stranger).generate_data_key(URI)


async def test_an_owner_who_verified_the_broker_speaks_to_that_leaf_only(
    attest: LocalAttest, serving: Broker, owner: StaticCredentials
) -> None:
    verified = await verify_service_evidence(
        serving.endpoint,
        role=Role.KEYBROKER,
        credentials=owner,
        verifier=attest.verifier,
        expected_scripts=[SCRIPT],
        now=attest.clock(),
    )
    assert verified.evidence.receipt_spki_der == serving.identity.guest.keys.receipt_spki_der
    client = OwnerKeyClient(owner, serving.endpoint, verified=verified, signing_key=OWNER_KEY)
    await client.generate_data_key(URI)
    async with broker(attest) as other:  # as well attested, but not the one that was verified
        with pytest.raises(CloisterError) as caught:
            await OwnerKeyClient(owner, other.endpoint, verified=verified, signing_key=OWNER_KEY).generate_data_key(URI)
    assert caught.value.code is Code.UNREACHABLE


async def test_evidence_is_addressed_to_its_caller_only(serving: Broker, owner: StaticCredentials) -> None:
    me = str(owner.current().spiffe_id)
    async with open_channel(serving.endpoint, role=Role.KEYBROKER, credentials=owner) as channel:
        method = evidence_pb2_grpc.EvidenceServiceStub(channel).GetEvidence
        for audience, nonce in ((ATTEST_ID, b"\x01" * 32), ("", b"\x01" * 32), (me, b""), (me, b"\x01" * 33)):
            request = evidence_pb2.GetEvidenceRequest(nonce=nonce, audience=audience)
            with pytest.raises(CloisterError) as caught:
                await invoke(method, request, timeout_s=5, what="get evidence")
            assert caught.value.code is Code.ARGUMENT_INVALID
        request = evidence_pb2.GetEvidenceRequest(nonce=b"\x01" * 32, audience=me)
        assert (await invoke(method, request, timeout_s=5, what="get evidence")).evidence.audience == me


async def test_an_owner_names_only_purposes_that_exist(serving: Broker, owner: StaticCredentials) -> None:
    with pytest.raises(CloisterError) as caught:
        await an_owner(owner, serving).create_key(URI, purposes=["mine"])
    assert caught.value.code is Code.ARGUMENT_INVALID
