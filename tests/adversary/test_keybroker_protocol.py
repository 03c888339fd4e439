# SPDX-License-Identifier: Apache-2.0
"""Attacks of the release protocol's table that no other room tries: an operator with the owner's certificate, a relay,
a TD that is asked to quote for outsiders. docs/attacks.md says for every row where it is tried."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.api.common.v1 import evidence_pb2, evidence_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import report_data_of
from cloister.identity import Role
from cloister.policyblocks import digest_text
from cloister.provisioning import Provisioning
from cloister.release.keys import Purpose
from cloister.runtime.channel import invoke, open_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.tdx.quote import Quote
from cloister_keybroker.owners import NewKey
from fakes.attest_broker import broker as a_quoting_broker
from fakes.attest_harness import JOB, local_attest
from fakes.keybroker_harness import (
    KEY,
    OWNER,
    Broker,
    Document,
    a_broker,
    as_yaml,
    new_key,
    owner,
    policy_document,
    provisioned,
)
from fakes.signing import OWNER_KEY, OWNER_SIGNER, signed_policy

# Whoever runs the certificate authority can have a certificate of the owner's name, and not the owner's signing key.
OPERATOR_KEY = Ed25519PrivateKey.generate()
WIDE: Document = {"script": [digest_text(b"\x23" * 48), digest_text(b"\x99" * 48)]}


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path) as opened:
        yield opened


async def refused(work: object, code: Code, block: str = "") -> None:
    with pytest.raises(CloisterError) as caught:
        await work  # type: ignore[misc]
    assert caught.value.code is code
    assert caught.value.block == block


async def test_an_operator_with_the_owners_certificate_changes_no_policy(broker: Broker) -> None:
    await broker.create_key()
    record = (await broker.owners.get(owner(), KEY)).record
    wide = as_yaml(policy_document(version=2, previous=record.policy_digest, workload=WIDE))
    put = broker.owners.put_policy
    await refused(put(owner(), KEY, wide), Code.ENVELOPE_INVALID)
    await refused(put(owner(), KEY, b""), Code.SIGNATURE_INVALID)
    await refused(put(owner(), KEY, signed_policy(wide, OPERATOR_KEY)), Code.SIGNATURE_INVALID, "policy.signer")
    assert (await broker.log())[0].entry.blocks[0].wanted == OWNER_SIGNER
    # A good envelope of the owner's, around another policy.
    genuine = signed_policy(as_yaml(policy_document()), OWNER_KEY)
    await refused(put(owner(), KEY, genuine), Code.POLICY_VERSION, "policy.version")
    with pytest.raises(CloisterError):
        await broker.td().release(ear={"workload": {"script": b"\x99" * 48}})
    await put(owner(), KEY, signed_policy(wide, OPERATOR_KEY, OWNER_KEY))
    await broker.td().release(ear={"workload": {"script": b"\x99" * 48}})


async def test_an_operator_with_the_owners_certificate_plants_no_key_of_the_owners(broker: Broker) -> None:
    yaml = as_yaml(policy_document())
    planted = new_key(KEY, frozenset(Purpose), yaml)
    mine = provisioned(KEY, OWNER, Purpose, yaml, key=OPERATOR_KEY)
    statement = Provisioning.verified(planted.provisioning)
    with pytest.raises(ValueError, match="signed by the key it names"):
        statement.signed(OPERATOR_KEY)
    for new in (
        replace(planted, provisioning=b""),
        replace(planted, provisioning=mine),  # the policy is the owner's, the statement is not
        replace(planted, policy=signed_policy(yaml, OPERATOR_KEY)),
        replace(planted, policy=signed_policy(as_yaml(policy_document(workload=WIDE)))),  # the owner's, of another key
        replace(planted, purposes=frozenset({Purpose.EXPORT})),
    ):
        with pytest.raises(CloisterError) as caught:
            await broker.owners.create(owner(), new)
        assert caught.value.code is Code.SIGNATURE_INVALID
        assert (await broker.log())[0].entry.blocks[0].name == "provisioning"
    with pytest.raises(CloisterError) as caught:
        await broker.owners.get(owner(), KEY)
    assert caught.value.code is Code.KEY_NOT_FOUND
    # What the operator signs for itself bears the operator's signer, which is what owners compare.
    own = NewKey(KEY, frozenset(Purpose), signed_policy(yaml, OPERATOR_KEY), mine)
    await broker.owners.create(owner(), own)
    assert (await broker.owners.get(owner(), KEY)).record.signer != OWNER_SIGNER


async def test_a_platform_that_is_not_listed_gets_nothing_however_genuine_its_quotes(broker: Broker) -> None:
    known, extracted = b"\x05" * 16, b"\x06" * 16
    tee = {"type": "tdx", "simulated": "allow", "platforms": {"piid": [known.hex()]}}
    await broker.create_key(policy_document(tee=tee))
    await broker.td().release(ear={"tee": {"piid": known}})
    for piid in (extracted, b""):
        await refused(broker.td().release(ear={"tee": {"piid": piid}}), Code.RELEASE_DENIED, "tee.platforms.piid")


async def test_a_td_quotes_over_its_own_keys_whatever_it_is_asked() -> None:
    """There is no call that quotes bytes of a caller's choosing: what a relay could pass on names the TD's own keys."""
    fields = evidence_pb2.GetEvidenceRequest.DESCRIPTOR.fields_by_name
    assert set(fields) == {"nonce", "audience"}
    methods = evidence_pb2.DESCRIPTOR.services_by_name["EvidenceService"].methods_by_name
    assert set(methods) == {"GetEvidence"}
    with local_attest() as attest:
        await attest.registry.register_job(JOB)
        async with a_quoting_broker(attest) as serving:
            rank = await attest.enrol(attest.td(Role.RANK))
            material = (await rank.attested()).material
            async with open_channel(
                serving.endpoint, role=Role.KEYBROKER, credentials=StaticCredentials(material)
            ) as channel:
                method = evidence_pb2_grpc.EvidenceServiceStub(channel).GetEvidence
                me = str(material.spiffe_id)
                # 32 bytes that are the beginning of somebody's report_data, and a whole one.
                mine = rank.guest.evidence(nonce=bytes(32), audience=me, trust_domain=material.spiffe_id.trust_domain)
                wanted = report_data_of(mine)
                request = evidence_pb2.GetEvidenceRequest(nonce=wanted[:32], audience=me)
                answer = (await invoke(method, request, timeout_s=5, what="get evidence")).evidence
                quoted = Quote.parse(answer.quote).body.report_data
                assert quoted == report_data_of(answer) != wanted
                assert answer.tls_spki_der == serving.identity.guest.keys.tls_spki_der
                assert answer.role == str(Role.KEYBROKER)
                for nonce in (wanted, wanted[:48]):
                    request = evidence_pb2.GetEvidenceRequest(nonce=nonce, audience=me)
                    await refused(invoke(method, request, timeout_s=5, what="get evidence"), Code.ARGUMENT_INVALID)
