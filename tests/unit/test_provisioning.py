# SPDX-License-Identifier: Apache-2.0
"""Claims about what owners sign: statements read back as they were, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.didkey import did_key
from cloister.dsse import OPEN_REQUEST, PROVISIONING, RELEASE_POLICY, Envelope, sign
from cloister.errors import CloisterError, Code
from cloister.provisioning import OpenRequest, Provisioning, SignedPolicy, is_envelope, owner_envelope
from cloister.release.keys import Purpose
from fakes.keybroker_harness import KEY, OTHER_KEY, OWNER, as_yaml, policy_document
from fakes.signing import OWNER_KEY, OWNER_SIGNER, signing_key

STRANGER_KEY = signing_key("a stranger")
KEY_STATEMENT = Provisioning(
    uri=KEY,
    owner=str(OWNER),
    signer=OWNER_SIGNER,
    purposes=frozenset({Purpose.TRAIN, Purpose.EXPORT}),
    policy_digest=bytes(48),
    sealed_digest=b"\x01" * 48,
    nonce=b"\x02" * 32,
)
OPENING = OpenRequest(
    uri=KEY,
    key_version=3,
    signer=OWNER_SIGNER,
    wrapped_digest=bytes(48),
    client_nonce=bytes(32),
    recipient_digest=bytes(48),
)
POLICY = as_yaml(policy_document())


def members_of(envelope: bytes) -> dict[str, Any]:
    return dict(json.loads(Envelope.parse(envelope).payload))


def code_of(kind: type[Provisioning] | type[OpenRequest], envelope: bytes) -> Code | None:
    try:
        kind.verified(envelope)
    except CloisterError as error:
        return error.code
    return None


def test_statements_read_back_as_they_were_signed() -> None:
    assert Provisioning.verified(KEY_STATEMENT.signed(OWNER_KEY)) == KEY_STATEMENT
    assert OpenRequest.verified(OPENING.signed(OWNER_KEY)) == OPENING
    bare = dataclasses.replace(KEY_STATEMENT, policy_digest=b"", sealed_digest=b"", nonce=b"")
    assert Provisioning.verified(bare.signed(OWNER_KEY)) == bare


def test_a_statement_is_signed_by_the_key_it_names_and_by_nobody_else() -> None:
    with pytest.raises(ValueError, match="signed by the key it names"):
        KEY_STATEMENT.signed(STRANGER_KEY)
    payload = Envelope.parse(KEY_STATEMENT.signed(OWNER_KEY)).payload
    for keys in ((STRANGER_KEY,), (OWNER_KEY, STRANGER_KEY)):
        assert code_of(Provisioning, sign(PROVISIONING, payload, *keys).to_bytes()) is Code.SIGNATURE_INVALID
    assert code_of(Provisioning, sign(PROVISIONING, payload, OWNER_KEY).to_bytes()) is None


def test_one_kind_of_statement_is_never_taken_for_another() -> None:
    assert code_of(Provisioning, OPENING.signed(OWNER_KEY)) is Code.ENVELOPE_INVALID
    assert code_of(OpenRequest, KEY_STATEMENT.signed(OWNER_KEY)) is Code.ENVELOPE_INVALID
    payload = Envelope.parse(KEY_STATEMENT.signed(OWNER_KEY)).payload
    assert code_of(OpenRequest, sign(OPEN_REQUEST, payload, OWNER_KEY).to_bytes()) is Code.ENVELOPE_INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"uri": "hospital-a/x"},
        {"uri": None},
        {"owner": 1},
        {"purposes": ["train", "train"]},
        {"purposes": ["everything"]},
        {"purposes": "train"},
        {"policy_digest": "00"},
        {"policy_digest": "AA" * 48},
        {"sealed_digest": None},
        {"nonce": "00" * 31},
        {"more": 1},
    ],
)
def test_a_malformed_statement_is_refused_though_it_is_signed(changes: dict[str, Any]) -> None:
    members = members_of(KEY_STATEMENT.signed(OWNER_KEY)) | changes
    payload = json.dumps({name: value for name, value in members.items() if value is not None}).encode()
    assert code_of(Provisioning, sign(PROVISIONING, payload, OWNER_KEY).to_bytes()) is Code.ENVELOPE_INVALID


@given(st.binary(max_size=200))
def test_any_signed_bytes_are_a_statement_or_one_error(payload: bytes) -> None:
    assert code_of(Provisioning, sign(PROVISIONING, payload, OWNER_KEY).to_bytes()) is Code.ENVELOPE_INVALID
    assert code_of(OpenRequest, sign(OPEN_REQUEST, payload, OWNER_KEY).to_bytes()) is Code.ENVELOPE_INVALID


def test_a_policy_comes_with_those_who_signed_it() -> None:
    signed = SignedPolicy.verified(sign(RELEASE_POLICY, POLICY, OWNER_KEY, STRANGER_KEY).to_bytes())
    assert (signed.yaml, signed.policy.key) == (POLICY, KEY)
    assert signed.signers == {OWNER_SIGNER, did_key(STRANGER_KEY)}
    with pytest.raises(CloisterError) as caught:
        SignedPolicy.verified(sign(RELEASE_POLICY, b"kind: nothing", OWNER_KEY).to_bytes())
    assert caught.value.code is Code.POLICY_INVALID


def test_an_owner_signs_yaml_or_adds_a_signature_to_what_others_signed() -> None:
    assert not is_envelope(POLICY)
    alone = owner_envelope(POLICY, OWNER_KEY)
    assert alone.signers == {OWNER_SIGNER}
    theirs = sign(RELEASE_POLICY, POLICY, STRANGER_KEY).to_bytes()
    assert is_envelope(theirs)
    both = owner_envelope(theirs, OWNER_KEY)
    assert both.signers == {OWNER_SIGNER, did_key(STRANGER_KEY)}
    assert owner_envelope(both.envelope, OWNER_KEY) == both


def test_an_owner_signs_nothing_but_policies_as_policies() -> None:
    other = as_yaml(policy_document(OTHER_KEY))
    for data, code in (
        (b"kind: nothing", Code.POLICY_INVALID),
        (sign(PROVISIONING, other, STRANGER_KEY).to_bytes(), Code.ENVELOPE_INVALID),
        (b'{"payloadType": 1}', Code.ENVELOPE_INVALID),
    ):
        with pytest.raises(CloisterError) as caught:
            owner_envelope(data, OWNER_KEY)
        assert caught.value.code is code
