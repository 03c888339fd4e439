# SPDX-License-Identifier: Apache-2.0
"""A certificate with the owner's name is not enough: keys, policies and opened data need the owner's signature.

The attacker here is an operator who can have any certificate issued, and who keeps what owners sent before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import hpke
from cloister.didkey import did_key
from cloister.errors import CloisterError, Code
from cloister.hpke import HpkeKeyPair
from cloister.keyuri import KeyUri
from cloister.protocol import import_info
from cloister.release.keys import KeyState, Purpose
from cloister.secret import SecretBytes
from cloister.tlv import sha384
from cloister_keybroker.backends import KeyRef
from cloister_keybroker.datakeys import WrappedKey
from cloister_keybroker.owners import NewKey
from fakes.keybroker_harness import (
    COLLEAGUE,
    KEY,
    OTHER_KEY,
    OWNER,
    Broker,
    Clock,
    a_broker,
    as_yaml,
    new_key,
    owner,
    policy_document,
    recipient,
)
from fakes.signing import OWNER_KEY, provisioned, signed_policy, signing_key

OPERATOR_KEY = signing_key("the operator")
TRAIN = frozenset({Purpose.TRAIN})
MATERIAL = SecretBytes(b"\x5a" * 32)


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[Broker]:
    async with a_broker(tmp_path, Clock()) as found:
        yield found


async def refused(attempt: Any, code: Code = Code.SIGNATURE_INVALID) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await attempt
    assert caught.value.code is code, caught.value
    return caught.value


async def last_failed(broker: Broker) -> tuple[str, str]:
    """Return action and failed block of the newest entry of the log."""
    entry = (await broker.log())[0].entry
    [block] = [block for block in entry.blocks if not block.ok]
    return entry.action, block.name


# New keys.


@pytest.mark.parametrize(
    ("what", "statement"),
    [
        ("nothing", b""),
        ("another key", provisioned(OTHER_KEY, OWNER, TRAIN)),
        ("another owner", provisioned(KEY, COLLEAGUE, TRAIN)),
        ("other purposes", provisioned(KEY, OWNER, TRAIN | {Purpose.EXPORT})),
        ("a policy that is not there", provisioned(KEY, OWNER, TRAIN, as_yaml(policy_document()))),
        ("an import", provisioned(KEY, OWNER, TRAIN, sealed_digest=bytes(48), nonce=bytes(32))),
    ],
)
async def test_a_key_is_not_created_from_a_statement_about(broker: Broker, what: str, statement: bytes) -> None:
    await refused(broker.owners.create(owner(), NewKey(KEY, TRAIN, b"", statement)))
    assert await last_failed(broker) == ("create-key", "provisioning")
    await broker.owners.create(owner(), new_key(KEY, TRAIN))


async def test_a_key_is_not_created_with_a_policy_of_somebody_else(broker: Broker) -> None:
    yaml = as_yaml(policy_document())
    statement = provisioned(KEY, OWNER, TRAIN, yaml)
    await refused(broker.owners.create(owner(), NewKey(KEY, TRAIN, signed_policy(yaml, OPERATOR_KEY), statement)))
    await refused(broker.owners.create(owner(), NewKey(KEY, TRAIN, yaml, statement)), Code.ENVELOPE_INVALID)
    await broker.owners.create(owner(), NewKey(KEY, TRAIN, signed_policy(yaml), statement))


async def test_a_key_shows_who_signed_for_it(broker: Broker) -> None:
    """An operator can take an unused name; the owner sees whose key it is, and the client seals nothing with it."""
    statement = provisioned(KEY, OWNER, TRAIN, key=OPERATOR_KEY)
    record = await broker.owners.create(owner(), NewKey(KEY, TRAIN, b"", statement))
    assert record.signer == did_key(OPERATOR_KEY)


# Policies.


async def test_a_policy_of_the_operators_is_not_put_in_force(broker: Broker) -> None:
    await broker.create_key()
    before = await broker.owners.get(owner(), KEY)
    yaml = as_yaml(policy_document(version=2, previous=before.record.policy_digest))
    error = await refused(broker.owners.put_policy(owner(), KEY, signed_policy(yaml, OPERATOR_KEY)))
    assert did_key(OPERATOR_KEY) in error.why
    assert await last_failed(broker) == ("put-policy", "policy.signer")
    await refused(broker.owners.put_policy(owner(), KEY, b""))
    await refused(broker.owners.put_policy(owner(), KEY, yaml), Code.ENVELOPE_INVALID)
    assert await broker.owners.get(owner(), KEY) == before
    await broker.owners.put_policy(owner(), KEY, signed_policy(yaml, OPERATOR_KEY, OWNER_KEY))


async def test_a_policy_signed_for_one_key_is_not_put_on_another(broker: Broker) -> None:
    await broker.create_key()
    await broker.create_key(uri=OTHER_KEY)
    record = (await broker.owners.get(owner(), OTHER_KEY)).record
    yaml = as_yaml(policy_document(KEY, version=2, previous=record.policy_digest))
    await refused(broker.owners.put_policy(owner(), OTHER_KEY, signed_policy(yaml)), Code.POLICY_INVALID)


async def test_a_withdrawn_policy_comes_back_only_as_a_signed_successor(broker: Broker) -> None:
    await broker.create_key()
    first = await broker.owners.get(owner(), KEY)
    assert first.policy is not None
    await broker.owners.withdraw_policy(owner(), KEY)
    error = await refused(broker.td().release(), Code.RELEASE_DENIED)
    assert "block policy" in error.what
    await refused(broker.owners.put_policy(owner(), KEY, first.policy.envelope), Code.POLICY_VERSION)
    # Neither switching the key off and on nor a restart brings it back.
    for state in (KeyState.DISABLED, KeyState.ENABLED):
        await broker.owners.set_state(owner(), KEY, state)
    await refused(broker.td().release(), Code.RELEASE_DENIED)
    stored = await broker.owners.get(owner(), KEY)
    assert (stored.policy, stored.policy_yaml, stored.record.policy_withdrawn) == (first.policy, b"", True)
    yaml = as_yaml(policy_document(version=2, previous=first.record.policy_digest))
    await broker.owners.put_policy(owner(), KEY, signed_policy(yaml))
    await broker.td().release()


# Data keys on the owner's machine.


async def test_data_opens_on_a_machine_with_the_owners_signature_only(broker: Broker) -> None:
    await broker.create_key()
    made, secret = await broker.generate()
    assert await broker.open_key(made.wrapped) == secret
    await refused(broker.open_key(made.wrapped, key=OPERATOR_KEY))
    assert await last_failed(broker) == ("open", "owner.signature")
    to = recipient(HpkeKeyPair.generate())
    key = WrappedKey(KEY, 1, made.wrapped)
    for authorization in (b"", b"{}", provisioned(KEY, OWNER, TRAIN)):
        attempt = broker.data_keys.open(owner(), key, to, manifest_digest=b"", authorization=authorization)
        code = Code.SIGNATURE_INVALID if not authorization else Code.ENVELOPE_INVALID
        await refused(attempt, code)


@pytest.mark.parametrize(
    "signed",
    [
        {"uri": OTHER_KEY},
        {"key_version": 2},
        {"wrapped_digest": bytes(48)},
        {"client_nonce": bytes(32)},
        {"recipient_digest": bytes(48)},
    ],
)
async def test_a_signature_over_another_opening_opens_nothing(broker: Broker, signed: dict[str, Any]) -> None:
    await broker.create_key()
    made, _ = await broker.generate()
    await refused(broker.open_key(made.wrapped, signed=signed))


# Material that owners bring.


async def imported(
    broker: Broker,
    secret: SecretBytes = MATERIAL,
    *,
    nonce: bytes | None = None,
    key: Ed25519PrivateKey = OWNER_KEY,
    uri: KeyUri = KEY,
    signed_sealed: bytes | None = None,
    signed_nonce: bytes | None = None,
    info: dict[str, Any] | None = None,
) -> Any:
    """Import a key as its owner does, with parts exchanged for others."""
    nonce = broker.owners.begin_import(owner()) if nonce is None else nonce
    facts: dict[str, Any] = {"key_uri": str(KEY), "key_version": 1, "policy_digest": b"", "nonce": nonce}
    sealed = hpke.seal(broker.owners.hpke_public_key, secret, info=import_info(**facts | (info or {})))
    statement = provisioned(
        KEY,
        OWNER,
        Purpose,
        key=key,
        sealed_digest=sha384(sealed if signed_sealed is None else signed_sealed),
        nonce=nonce if signed_nonce is None else signed_nonce,
    )
    return await broker.owners.import_key(
        owner(), NewKey(uri, frozenset(Purpose), b"", statement), sealed=sealed, nonce=nonce
    )


async def test_an_imported_key_is_the_owners_own(broker: Broker) -> None:
    receipt = await imported(broker)
    assert receipt.place.index == (await broker.log())[0].index
    stored = await broker.owners.get(owner(), KEY)
    assert stored.record.imported
    # Whoever has the material opens what the broker wraps, so it is this very key.
    made, secret = await broker.generate()
    other = await broker.office.backend.import_key(KeyRef.of(stored.record, 1), MATERIAL)
    assert await broker.office.backend.unwrap(KeyRef.of(stored.record, 1), other, made.wrapped) == secret


async def test_a_nonce_of_an_import_works_once_and_for_its_owner(broker: Broker) -> None:
    nonce = broker.owners.begin_import(owner())
    await refused(imported(broker, nonce=broker.owners.begin_import(owner(COLLEAGUE))), Code.NONCE_UNKNOWN)
    await refused(imported(broker, nonce=bytes(32)), Code.NONCE_UNKNOWN)
    await imported(broker, nonce=nonce)
    await refused(imported(broker, nonce=nonce), Code.NONCE_UNKNOWN)
    nonce = broker.owners.begin_import(owner())
    broker.clock.advance(seconds=61)
    await refused(imported(broker, nonce=nonce), Code.NONCE_UNKNOWN)


@pytest.mark.parametrize(
    "changes",
    [
        {"signed_sealed": b"what the operator sealed"},
        {"signed_nonce": bytes(32)},
        {"uri": OTHER_KEY},
    ],
)
async def test_material_that_the_owner_did_not_sign_for_is_not_imported(broker: Broker, changes: Any) -> None:
    await refused(imported(broker, **changes))
    assert await last_failed(broker) == ("import-key", "provisioning")


@pytest.mark.parametrize(
    "info", [{"key_uri": str(OTHER_KEY)}, {"key_version": 2}, {"policy_digest": bytes(48)}, {"nonce": bytes(32)}]
)
async def test_material_sealed_for_another_import_is_not_opened(broker: Broker, info: dict[str, Any]) -> None:
    await refused(imported(broker, info=info), Code.ARGUMENT_INVALID)
    assert await broker.log() == []


@pytest.mark.parametrize("size", [0, 16, 31, 33])
async def test_material_of_another_size_is_not_imported(broker: Broker, size: int) -> None:
    await refused(imported(broker, SecretBytes(bytes(size))), Code.ARGUMENT_INVALID)
    await imported(broker)
