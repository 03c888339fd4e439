# SPDX-License-Identifier: Apache-2.0
"""The broker over mutual TLS: who may call what, what comes back, and what a caller's certificate decides."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.protocol import LeaseTerms, ReleaseBinding
from cloister.provisioning import OpenRequest
from cloister.release.keys import Purpose
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.runtime.pem import read_leaf
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from fakes.certs import TRUST_DOMAIN, TestCa
from fakes.keybroker_harness import (
    COLLEAGUE,
    KEY,
    OTHER_KEY,
    OWNER,
    RANK,
    STRANGER,
    Broker,
    Td,
    a_served_broker,
    as_yaml,
    leaf_sha256,
    policy_document,
)
from fakes.signing import OWNER_KEY, OWNER_SIGNER, provisioned, signed_policy

Served = tuple[Broker, str]
BROKER_ID = f"spiffe://{TRUST_DOMAIN}/service/keybroker"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with a_served_broker(tmp_path) as found:
        yield found


async def call(served: Served, who: SpiffeId | StaticCredentials, service: str, method: str, request: Any) -> Any:
    broker, endpoint = served
    credentials = who if isinstance(who, StaticCredentials) else broker.ca.credentials(who)
    async with open_channel(endpoint, role=Role.KEYBROKER, credentials=credentials) as channel:
        stub = getattr(rpc, f"{service}Stub")(channel)
        return await invoke(getattr(stub, method), request, timeout_s=10, what=method)


async def refused(
    served: Served, who: SpiffeId | StaticCredentials, service: str, method: str, request: Any
) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await call(served, who, service, method, request)
    return caught.value


async def create(served: Served, uri: str = str(KEY), **policy: Any) -> pb.Key:
    document = policy_document(**policy) if uri == str(KEY) else policy_document(OTHER_KEY, **policy)
    purposes = [pb.PURPOSE_TRAIN, pb.PURPOSE_SERVE, pb.PURPOSE_EXPORT]
    request = pb.CreateKeyRequest(
        uri=uri,
        purposes=purposes,
        policy_envelope=signed_policy(as_yaml(document)),
        provisioning=provisioned(
            KeyUri.parse(uri), OWNER, [Purpose.TRAIN, Purpose.SERVE, Purpose.EXPORT], as_yaml(document)
        ),
    )
    return (await call(served, OWNER, "KeyOwnerService", "CreateKey", request)).key


async def test_a_rank_gets_a_data_key_sealed_to_itself_with_a_receipt(served: Served) -> None:
    broker, _ = served
    await create(served)
    credentials = broker.ca.credentials(RANK)
    td = Td(broker, RANK, leaf_sha256(credentials.current().chain_pem))
    first, _ = await release(served, credentials, td)
    again, response = await release(served, credentials, td, wrapped=first.wrapped)
    assert again.secret == first.secret
    assert len(first.secret) == 32
    assert response.policy_version == 1
    assert response.lease_until_unix_ms == (int(broker.clock().timestamp()) + 3600) * 1000


class Opened:
    def __init__(self, secret: SecretBytes, wrapped: bytes) -> None:
        self.secret, self.wrapped = secret, wrapped


async def release(
    served: Served, credentials: StaticCredentials, td: Td, wrapped: bytes = b""
) -> tuple[Opened, pb.ReleaseResponse]:
    """Do what a TD does, on the wire, and verify the receipt."""
    broker, _ = served
    begin = await call(
        served,
        credentials,
        "KeyReleaseService",
        "BeginRelease",
        pb.BeginReleaseRequest(key_uri=str(KEY), purpose=pb.PURPOSE_TRAIN, attestation_result=td.token()),
    )
    assert not begin.fresh_enough
    assert list(begin.hpke_kem_ids) == [KEM_MLKEM768_X25519]
    token, client_nonce = td.token(begin.nonce), secrets.token_bytes(32)
    request = pb.ReleaseRequest(
        attestation_result=token,
        key_uri=str(KEY),
        key_version=1 if wrapped else 0,
        purpose=pb.PURPOSE_TRAIN,
        client_nonce=client_nonce,
        broker_nonce=begin.nonce,
        hpke_kem_id=KEM_MLKEM768_X25519,
        hpke_public_key=td.hpke.public_bytes,
    )
    if wrapped:
        request.wrapped = wrapped
    else:
        request.generate.SetInParent()
    response: pb.ReleaseResponse = await call(served, credentials, "KeyReleaseService", "Release", request)
    binding = ReleaseBinding(
        key_uri=str(KEY),
        key_version=response.data_key.key_version,
        purpose="train",
        policy_digest=begin.policy_digest,
        evidence_digest=sha384(token.encode()),
        client_nonce=client_nonce,
        broker_nonce=begin.nonce,
        broker_id=BROKER_ID,
        wrapped_digest=sha384(response.data_key.wrapped),
    )
    receipt = response.receipt
    terms = LeaseTerms(response.policy_version, response.decided_unix_ms, response.lease_until_unix_ms)
    assert receipt.log_id == broker.log_key.log_id
    broker.receipt_key.public_key().verify(
        receipt.signature,
        binding.receipt_message(
            sealed=response.data_key.sealed, terms=terms, log_id=receipt.log_id, index=receipt.index, root=receipt.root
        ),
    )
    secret = td.hpke.open(response.data_key.sealed, info=binding.hpke_info())
    return Opened(secret, response.data_key.wrapped), response


OWNER_CALLS = [
    ("CreateKey", pb.CreateKeyRequest(uri=str(KEY), purposes=[pb.PURPOSE_TRAIN])),
    ("GetKey", pb.GetKeyRequest(uri=str(KEY))),
    ("ListKeys", pb.ListKeysRequest()),
    ("EnableKey", pb.EnableKeyRequest(uri=str(KEY))),
    ("DisableKey", pb.DisableKeyRequest(uri=str(KEY))),
    ("PutReleasePolicy", pb.PutReleasePolicyRequest(uri=str(KEY))),
    ("GetReleasePolicy", pb.GetReleasePolicyRequest(uri=str(KEY))),
    ("GenerateDataKey", pb.GenerateDataKeyRequest(key_uri=str(KEY))),
    ("OpenDataKey", pb.OpenDataKeyRequest(key_uri=str(KEY))),
]
RELEASE_CALLS = [
    ("BeginRelease", pb.BeginReleaseRequest(key_uri=str(KEY), purpose=pb.PURPOSE_TRAIN)),
    ("Release", pb.ReleaseRequest(key_uri=str(KEY), purpose=pb.PURPOSE_TRAIN)),
]


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.USER])
async def test_only_users_are_owners(served: Served, role: Role) -> None:
    credentials = served[0].ca.credentials(role)
    for method, request in OWNER_CALLS:
        error = await refused(served, credentials, "KeyOwnerService", method, request)
        assert error.code is Code.CALLER_NOT_ALLOWED
    error = await refused(served, credentials, "DecisionLogService", "ListDecisions", pb.ListDecisionsRequest())
    assert error.code is Code.CALLER_NOT_ALLOWED


@pytest.mark.parametrize("role", [role for role in Role if role not in (Role.RANK, Role.BACKEND)])
async def test_only_ranks_and_backends_are_released_to(served: Served, role: Role) -> None:
    credentials = served[0].ca.credentials(role)
    for method, request in RELEASE_CALLS:
        error = await refused(served, credentials, "KeyReleaseService", method, request)
        assert error.code is Code.CALLER_NOT_ALLOWED


async def test_a_certificate_of_another_ca_or_role_gets_nowhere(served: Served) -> None:
    broker, _ = served
    outsider = dataclasses.replace(TestCa().material(OWNER), bundle=broker.ca.bundle)
    wrong = [StaticCredentials(outsider), broker.ca.credentials(OWNER, issued_by=Role.RANK)]
    for credentials in wrong:
        error = await refused(served, credentials, "KeyOwnerService", "ListKeys", pb.ListKeysRequest())
        assert error.code in (Code.UNREACHABLE, Code.CALLER_UNKNOWN, Code.TLS_FAILED)


async def test_an_owners_day(served: Served) -> None:
    key = await create(served)
    assert (key.version, key.state, key.owner, key.policy_version) == (1, pb.KEY_STATE_ENABLED, str(OWNER), 1)
    assert sorted(key.purposes) == [pb.PURPOSE_TRAIN, pb.PURPOSE_SERVE, pb.PURPOSE_EXPORT]
    assert await create(served, str(OTHER_KEY))
    policy = await call(
        served, COLLEAGUE, "KeyOwnerService", "GetReleasePolicy", pb.GetReleasePolicyRequest(uri=key.uri)
    )
    assert (policy.version, policy.digest) == (1, key.policy_digest)
    assert policy.policy_yaml == as_yaml(policy_document())
    assert policy.policy_envelope == signed_policy(policy.policy_yaml)
    assert (key.signer, key.min_version, key.backend, key.imported) == (OWNER_SIGNER, 1, "embedded", False)
    successor = as_yaml(policy_document(version=2, previous=policy.digest))
    unsigned = pb.PutReleasePolicyRequest(uri=key.uri, policy_yaml=successor)
    error = await refused(served, OWNER, "KeyOwnerService", "PutReleasePolicy", unsigned)
    assert (error.code, "plain YAML" in error.why) == (Code.SIGNATURE_INVALID, True)
    request = pb.PutReleasePolicyRequest(uri=key.uri, policy_envelope=signed_policy(successor))
    assert (await call(served, OWNER, "KeyOwnerService", "PutReleasePolicy", request)).key.policy_version == 2
    error = await refused(served, OWNER, "KeyOwnerService", "PutReleasePolicy", request)
    assert error.code is Code.POLICY_VERSION
    disabled = await call(served, OWNER, "KeyOwnerService", "DisableKey", pb.DisableKeyRequest(uri=key.uri))
    assert disabled.key.state == pb.KEY_STATE_DISABLED
    enabled = await call(served, OWNER, "KeyOwnerService", "EnableKey", pb.EnableKeyRequest(uri=key.uri))
    assert enabled.key.state == pb.KEY_STATE_ENABLED
    error = await refused(served, COLLEAGUE, "KeyOwnerService", "DisableKey", pb.DisableKeyRequest(uri=key.uri))
    assert error.code is Code.CALLER_NOT_ALLOWED
    log = await call(served, OWNER, "DecisionLogService", "ListDecisions", pb.ListDecisionsRequest(key_uri=key.uri))
    assert [(entry.action, entry.granted) for entry in log.decisions] == [
        ("disable", False),
        ("enable", True),
        ("disable", True),
        ("put-policy", False),
        ("put-policy", True),
        ("create-key", True),
    ]
    assert [entry.index for entry in log.decisions] == [7, 6, 5, 4, 3, 1]


async def test_keys_are_listed_in_pages_and_per_tenant(served: Served) -> None:
    await create(served)
    await create(served, str(OTHER_KEY))
    request = pb.ListKeysRequest(page_size=1)
    first = await call(served, COLLEAGUE, "KeyOwnerService", "ListKeys", request)
    request.page_token = first.next_page_token
    second = await call(served, COLLEAGUE, "KeyOwnerService", "ListKeys", request)
    assert [key.uri for key in (*first.keys, *second.keys)] == [str(KEY), str(OTHER_KEY)]
    assert second.next_page_token == ""
    assert not (await call(served, STRANGER, "KeyOwnerService", "ListKeys", pb.ListKeysRequest())).keys
    assert not (
        await call(served, STRANGER, "DecisionLogService", "ListDecisions", pb.ListDecisionsRequest())
    ).decisions
    too_many = pb.ListKeysRequest(page_size=1001)
    assert (await refused(served, OWNER, "KeyOwnerService", "ListKeys", too_many)).code is Code.ARGUMENT_INVALID


async def test_a_denial_reaches_the_caller_with_block_wanted_and_got(served: Served) -> None:
    broker, _ = served
    await create(served, tee={"type": "tdx", "simulated": "deny"})
    credentials = broker.ca.credentials(RANK)
    td = Td(broker, RANK, leaf_sha256(credentials.current().chain_pem))
    with pytest.raises(CloisterError) as caught:
        await release(served, credentials, td)
    error = caught.value
    assert error.code is Code.RELEASE_DENIED
    assert error.what == f"{KEY} is not released for train: block tee.simulated"
    assert error.why == "wanted a hardware TD; got a simulated TD"
    log = await call(served, OWNER, "DecisionLogService", "ListDecisions", pb.ListDecisionsRequest(limit=1))
    failed = [block for block in log.decisions[0].blocks if not block.ok]
    assert [(block.name, block.wanted, block.got) for block in failed] == [
        ("tee.simulated", "a hardware TD", "a simulated TD")
    ]


@pytest.mark.parametrize(
    "request_",
    [
        pb.BeginReleaseRequest(key_uri=str(KEY)),
        pb.BeginReleaseRequest(key_uri=str(KEY), purpose=9),  # type: ignore[arg-type]
    ],
)
async def test_an_unknown_purpose_is_an_error(served: Served, request_: pb.BeginReleaseRequest) -> None:
    error = await refused(served, RANK, "KeyReleaseService", "BeginRelease", request_)
    assert error.code is Code.ARGUMENT_INVALID


@pytest.mark.parametrize("uri", ["", "hospital-a/x", "cloister-key://", "cloister-key://hospital-a/../x", "x" * 5000])
async def test_what_is_no_key_uri_is_an_error(served: Served, uri: str) -> None:
    error = await refused(served, OWNER, "KeyOwnerService", "GetKey", pb.GetKeyRequest(uri=uri))
    assert error.code is Code.KEY_URI_INVALID


async def test_a_release_names_a_wrapped_key_or_asks_for_a_new_one(served: Served) -> None:
    await create(served)
    for request in (pb.ReleaseRequest(), pb.ReleaseRequest(wrapped=b"")):
        error = await refused(served, RANK, "KeyReleaseService", "Release", request)
        assert (error.code, "data_key" in error.what) == (Code.ARGUMENT_INVALID, True)


async def test_an_owner_makes_and_opens_data_keys(served: Served) -> None:
    await create(served)
    pair, nonce = HpkeKeyPair.generate(), secrets.token_bytes(32)
    request = pb.GenerateDataKeyRequest(
        key_uri=str(KEY), client_nonce=nonce, hpke_kem_id=KEM_MLKEM768_X25519, hpke_public_key=pair.public_bytes
    )
    credentials = served[0].ca.credentials(OWNER)
    made = await call(served, credentials, "KeyOwnerService", "GenerateDataKey", request)
    opened = await call(
        served,
        credentials,
        "KeyOwnerService",
        "OpenDataKey",
        pb.OpenDataKeyRequest(
            key_uri=str(KEY),
            key_version=1,
            wrapped=made.data_key.wrapped,
            client_nonce=nonce,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=pair.public_bytes,
            authorization=OpenRequest(
                uri=KEY,
                key_version=1,
                signer=OWNER_SIGNER,
                wrapped_digest=sha384(made.data_key.wrapped),
                client_nonce=nonce,
                recipient_digest=sha384(pair.public_bytes),
            ).signed(OWNER_KEY),
        ),
    )
    secrets_ = []
    for response, purpose in ((made, "seal"), (opened, "export")):
        binding = ReleaseBinding(
            key_uri=str(KEY),
            key_version=1,
            purpose=purpose,
            policy_digest=b"",
            evidence_digest=sha384(certificate_of(credentials)),
            client_nonce=nonce,
            broker_nonce=b"",
            broker_id=BROKER_ID,
            wrapped_digest=sha384(made.data_key.wrapped),
        )
        secrets_.append(pair.open(response.data_key.sealed, info=binding.hpke_info()))
    assert secrets_[0] == secrets_[1]


def certificate_of(credentials: StaticCredentials) -> bytes:
    return read_leaf(credentials.current().chain_pem).der
