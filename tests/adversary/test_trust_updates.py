# SPDX-License-Identifier: Apache-2.0
"""Trust updates come over a wire that is the operator's: what is forged, old or of somebody else changes nothing."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import Revoked
from cloister.runtime.trust import MAX_CERTIFICATES, MAX_UPDATE_BYTES, Trust, adopt, sign_update
from cloister_attest.authority import Authority, bundle_of
from cloister_attest.epochs import Epochs, Schedule

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
DOMAIN = "cloister.test"
PLAN = Schedule(lead=timedelta(minutes=3), overlap=timedelta(hours=13))
BEFORE = Epochs.begin(DOMAIN, now=NOW)
BOTH = BEFORE.start(PLAN, now=NOW)
AFTER = BOTH.advance(PLAN, now=NOW + timedelta(minutes=3)).advance(PLAN, now=NOW + timedelta(days=1))
OLD, NEW = BEFORE.issuing, AFTER.issuing
EVIL = Authority.create(now=NOW)
GONE = Revoked(certificates=frozenset({b"\x01" * 32, b"\x02" * 32}), authorities=frozenset({b"\x03" * 20}))


def trust(epochs: Epochs, counter: int = 1, revoked: Revoked = GONE) -> Trust:
    return Trust(epochs.bundle, epochs.sequence(counter), revoked)


def refused(held: Trust, update: bytes) -> str:
    with pytest.raises(CloisterError) as caught:
        adopt(held, update)
    assert caught.value.code is Code.BUNDLE_INVALID
    return caught.value.why


def test_an_update_by_a_root_that_is_held_is_believed_with_all_it_revokes() -> None:
    held = adopt(Trust.of(BEFORE.bundle), sign_update(trust(BOTH), [NEW.root, OLD.root]))
    assert held == trust(BOTH)
    assert adopt(held, sign_update(trust(AFTER), [NEW.root])) == trust(AFTER)


def test_the_same_update_again_changes_nothing() -> None:
    update = sign_update(trust(BOTH), [OLD.root])
    held = adopt(Trust.of(BEFORE.bundle), update)
    assert adopt(held, update) == held


def test_a_successor_that_nobody_of_ours_signed_is_refused() -> None:
    evil = bundle_of([EVIL], trust_domain=DOMAIN, sequence=AFTER.bundle.sequence)
    with_evil = bundle_of([EVIL, OLD], trust_domain=DOMAIN, sequence=AFTER.bundle.sequence)
    for bundle in (evil, with_evil, BOTH.bundle):
        for signers in ([], [EVIL.root], [NEW.root]):
            update = sign_update(Trust(bundle, 2**40, GONE), signers)
            assert "no root that is trusted here" in refused(Trust.of(BEFORE.bundle), update)


def test_a_signature_of_another_is_not_ours_because_it_says_so() -> None:
    forged = json.loads(sign_update(Trust(BOTH.bundle, 2**40, GONE), [EVIL.root]))
    genuine = json.loads(sign_update(trust(BEFORE), [OLD.root]))
    forged["signatures"][0]["root"] = genuine["signatures"][0]["root"]
    assert "no root" in refused(Trust.of(BEFORE.bundle), json.dumps(forged).encode())


def test_a_genuine_signature_over_something_else_is_refused() -> None:
    other, mine = (json.loads(sign_update(trust(BOTH, counter), [OLD.root])) for counter in (1, 2))
    swapped = {"payload": other["payload"], "signatures": mine["signatures"]}
    assert "no root" in refused(Trust.of(BEFORE.bundle), json.dumps(swapped).encode())


def test_the_ca_of_an_epoch_that_ended_says_nothing_any_more() -> None:
    """Whoever stole the keys of an old epoch signs with them: those who hold its successor do not listen."""
    held = adopt(Trust.of(BOTH.bundle), sign_update(trust(AFTER), [NEW.root]))
    bundle = bundle_of([EVIL], trust_domain=DOMAIN, sequence=2**40)
    assert "no root" in refused(held, sign_update(Trust(bundle, 2**41, GONE), [OLD.root]))


def test_an_older_update_does_not_bring_back_what_was_revoked() -> None:
    held = adopt(Trust.of(BOTH.bundle), sign_update(trust(BOTH, 2), [NEW.root]))
    assert "older" in refused(held, sign_update(trust(BOTH, 1, Revoked()), [NEW.root]))
    assert "older" in refused(held, sign_update(trust(BEFORE), [OLD.root]))


def test_an_older_bundle_does_not_come_back_to_one_who_just_started() -> None:
    """A TD starts with the present bundle and has seen no update yet; the retired epoch was signed for by the new."""
    assert "older" in refused(Trust.of(AFTER.bundle), sign_update(trust(BOTH), [NEW.root, OLD.root]))


def test_an_old_bundle_in_a_new_envelope_is_refused() -> None:
    held = Trust.of(AFTER.bundle)
    assert "older" in refused(held, sign_update(Trust(BOTH.bundle, 2**40, GONE), [NEW.root]))


def test_two_bundles_under_one_number_are_not_both_believed() -> None:
    other = bundle_of([NEW, EVIL], trust_domain=DOMAIN, sequence=AFTER.bundle.sequence)
    assert "another bundle" in refused(Trust.of(AFTER.bundle), sign_update(Trust(other, 2**40, GONE), [NEW.root]))


def test_a_bundle_numbered_above_its_update_is_refused() -> None:
    bundle = bundle_of([NEW], trust_domain=DOMAIN, sequence=2**40)
    assert "older" in refused(Trust.of(AFTER.bundle), sign_update(Trust(bundle, 2**40 - 1, GONE), [NEW.root]))


def test_an_update_of_another_trust_domain_is_refused() -> None:
    bundle = bundle_of([NEW], trust_domain="evil.test", sequence=2**40)
    assert "trust domain" in refused(Trust.of(AFTER.bundle), sign_update(Trust(bundle, 2**40, GONE), [NEW.root]))


def resigned(change: dict[str, object]) -> bytes:
    """Return an update whose payload was changed before it was signed: malformed, and genuine."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256

    from cloister.runtime import trust as module

    update = json.loads(sign_update(trust(AFTER), [NEW.root]))
    payload = json.loads(base64.b64decode(update["payload"])) | change
    data = json.dumps({name: value for name, value in payload.items() if value is not None}).encode()
    update["payload"] = base64.b64encode(data).decode()
    update["signatures"][0]["signature"] = NEW.root.key.sign(module._message(data), ec.ECDSA(SHA256())).hex()
    return json.dumps(update).encode()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "cloister-trust-update-2"},
        {"sequence": -1},
        {"sequence": True},
        {"sequence": 2**60},
        {"sequence": None},
        {"bundle": "{}"},
        {"bundle": "ä"},
        {"bundle": None},
        {"certificates": ["01"]},
        {"certificates": ["zz" * 32]},
        {"certificates": ["01" * 32] * (MAX_CERTIFICATES + 1)},
        {"certificates": None},
        {"authorities": ["01" * 32]},
        {"authorities": [1]},
        {"more": 1},
    ],
    ids=str,
)
def test_a_malformed_payload_is_refused_whoever_signed_it(change: dict[str, object]) -> None:
    assert adopt(Trust.of(AFTER.bundle), resigned({})) == trust(AFTER)
    refused(Trust.of(AFTER.bundle), resigned(change))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b'{"payload":"","signatures":[]}', b" " * (MAX_UPDATE_BYTES + 1), b"[" * 9999]
)
def test_what_is_no_update_is_refused(data: bytes) -> None:
    refused(Trust.of(AFTER.bundle), data)


UPDATE = sign_update(trust(AFTER), [NEW.root])
HELD = Trust.of(AFTER.bundle)


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0, max_value=len(UPDATE) - 1), st.binary(max_size=4))
def test_any_edit_is_refused_or_changes_nothing(place: int, edit: bytes) -> None:
    try:
        found = adopt(HELD, UPDATE[:place] + edit + UPDATE[place + len(edit) :])
    except CloisterError as error:
        found, code = trust(AFTER), error.code
    else:
        code = Code.BUNDLE_INVALID
    assert (found, code) == (trust(AFTER), Code.BUNDLE_INVALID)


def test_the_largest_update_is_small_enough_for_the_wire() -> None:
    many = Revoked(
        frozenset(number.to_bytes(32, "big") for number in range(MAX_CERTIFICATES)),
        frozenset(number.to_bytes(20, "big") for number in range(256)),
    )
    epochs = BOTH.advance(PLAN, now=NOW + timedelta(minutes=3)).start(PLAN, now=NOW + timedelta(minutes=3))
    update = sign_update(Trust(epochs.bundle, epochs.sequence(1), many), epochs.signers(NOW))
    assert len(update) < 1024 * 1024
    assert adopt(Trust.of(BEFORE.bundle), update).revoked == many


def test_a_bundle_is_not_a_bundle_without_its_number() -> None:
    fields = json.loads(AFTER.bundle.to_bytes())
    for wrong in (-1, 2**53, 1.5, True, "1", None):
        with pytest.raises(CloisterError) as caught:
            TrustBundle.parse(json.dumps({**fields, "sequence": wrong}).encode())
        assert caught.value.code is Code.BUNDLE_INVALID
    assert replace(AFTER.bundle, sequence=1).digest != AFTER.bundle.digest
