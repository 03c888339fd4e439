# SPDX-License-Identifier: Apache-2.0
"""Claims about signed envelopes, the names of signing keys, and the JSON both are made of."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister import strictjson
from cloister.didkey import did_key, is_did_key, parse_did_key
from cloister.dsse import MAX_SIGNATURES, MAX_SIZE, Envelope, Signature, pae, sign
from cloister.errors import CloisterError, Code
from cloister.strictjson import Members, StrictJsonError

KIND = "application/vnd.cloister.test.v1+json"
ALICE, BOB = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))


def envelope(**changes: Any) -> bytes:
    """Return a good envelope by ALICE with members replaced (None: left out)."""
    members = json.loads(sign(KIND, b"hello", ALICE).to_bytes()) | changes
    return json.dumps({name: value for name, value in members.items() if value is not None}).encode()


def code_of(data: bytes, kind: str = KIND) -> Code | None:
    try:
        Envelope.parse(data).signers(kind)
    except CloisterError as error:
        return error.code
    return None


# --- did:key ---


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        # Published examples of the did:key method, from these private keys.
        (bytes(32), "did:key:z6MkiTBz1ymuepAQ4HEHYSF1H8quG5GLVVQR3djdX3mDooWp"),
        (bytes(31) + b"\x01", "did:key:z6MkjchhfUsD6mmvni8mCdXHw216Xrm9bQe2mBH1P5RDjVJG"),
    ],
)
def test_a_key_has_its_published_name(seed: bytes, name: str) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed)
    assert did_key(key) == did_key(key.public_key()) == name
    assert parse_did_key(name) == key.public_key()


@given(st.binary(min_size=32, max_size=32))
def test_every_name_parses_back(seed: bytes) -> None:
    key = Ed25519PrivateKey.from_private_bytes(seed).public_key()
    assert parse_did_key(did_key(key)) == key


@pytest.mark.parametrize(
    "text",
    [
        "",
        "did:key:",
        did_key(ALICE)[:-1],
        did_key(ALICE) + "1",
        did_key(ALICE) + "\n",
        did_key(ALICE).replace("did:key:z", "did:key:m"),
        "did:key:z" + "z" * 47,  # more than 34 bytes
        "did:key:z" + "1" * 47,  # zeros
        "did:key:zDnaerDaTF5BXEavCrfRZEk316dpbLsfPDZ3WJ5hRTPFU2169",  # P-256
        did_key(ALICE)[:-1] + "0",  # not of the alphabet
        did_key(ALICE)[:-1] + "\N{FULLWIDTH DIGIT ONE}",
    ],
)
def test_anything_else_is_no_name_of_an_ed25519_key(text: str) -> None:
    assert not is_did_key(text)
    with pytest.raises(CloisterError, match="did:key"):
        parse_did_key(text)


@given(st.text(max_size=80))
def test_any_text_is_a_name_in_its_one_form_or_refused(text: str) -> None:
    if is_did_key(text):
        assert did_key(parse_did_key(text)) == text


# --- envelopes ---


def test_what_is_signed_is_the_specifications_encoding() -> None:
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("é", b"") == "DSSEv1 2 é 0 ".encode()  # lengths are of bytes


def test_an_envelope_names_exactly_its_signers() -> None:
    both = sign(KIND, b"hello", ALICE, BOB)
    found = Envelope.parse(both.to_bytes())
    assert found == both
    assert found.payload == b"hello"
    assert found.signers(KIND) == {did_key(ALICE), did_key(BOB)}
    assert sign(KIND, b"hello", ALICE).signers(KIND) == {did_key(ALICE)}


def test_signing_twice_with_one_key_is_one_signature() -> None:
    assert len(sign(KIND, b"hello", ALICE, ALICE).signatures) == 1


def test_both_alphabets_of_base64_are_read() -> None:
    signed = sign(KIND, b"\xfb\xff\xfe", ALICE)
    payload = base64.urlsafe_b64encode(signed.payload).decode()
    assert payload == "-__-"
    members = json.loads(signed.to_bytes()) | {"payload": payload}
    assert Envelope.parse(json.dumps(members).encode()) == signed


def test_members_that_nobody_signed_are_passed_over() -> None:
    assert code_of(envelope(more={"a": [1, None]})) is None


def test_a_payload_is_never_taken_for_another_kind() -> None:
    assert code_of(envelope(), "application/vnd.cloister.other.v1+json") is Code.ENVELOPE_INVALID
    # Relabelled, it is not what was signed.
    assert code_of(envelope(payloadType="x/y"), "x/y") is Code.SIGNATURE_INVALID


def test_another_payload_or_another_signer_is_refused() -> None:
    assert code_of(envelope()) is None
    assert code_of(envelope(payload=base64.b64encode(b"hullo").decode())) is Code.SIGNATURE_INVALID
    [signature] = sign(KIND, b"hello", ALICE).signatures
    stolen = Envelope(KIND, b"hello", (Signature(did_key(BOB), signature.value),))
    assert code_of(stolen.to_bytes()) is Code.SIGNATURE_INVALID


def test_one_bad_signature_spoils_the_envelope() -> None:
    good = sign(KIND, b"hello", ALICE)
    for bad in (Signature(did_key(BOB), bytes(64)), Signature("bob", bytes(64)), good.signatures[0]):
        spoiled = Envelope(KIND, b"hello", (*good.signatures, bad))
        assert code_of(spoiled.to_bytes()) is Code.SIGNATURE_INVALID


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": None},
        {"payloadType": None},
        {"signatures": None},
        {"signatures": []},
        {"signatures": {}},
        {"signatures": [1]},
        {"signatures": [{"keyid": "a"}]},
        {"signatures": [{"keyid": "a", "sig": ""}]},
        {"signatures": [{"keyid": did_key(ALICE), "sig": base64.b64encode(bytes(63)).decode()}]},
        {"payload": "aGVsbG8"},  # no padding
        {"payload": "aGVsbG9="},  # stray bits
        {"payload": "aGVs bG8="},
        {"payload": "-_+/"},  # both alphabets at once
        {"payload": 5},
        {"payloadType": "x" * 256},
        {"signatures": [{"keyid": did_key(ALICE), "sig": "AA=="}] * (MAX_SIGNATURES + 1)},
    ],
)
def test_a_malformed_envelope_is_refused(changes: dict[str, Any]) -> None:
    assert code_of(envelope(**changes)) is Code.ENVELOPE_INVALID


def test_an_envelope_has_a_largest_size() -> None:
    large = sign(KIND, bytes(MAX_SIZE), ALICE).to_bytes()
    assert code_of(large) is Code.ENVELOPE_INVALID


@given(st.binary(max_size=300))
def test_any_bytes_are_an_envelope_or_one_error(data: bytes) -> None:
    assert code_of(data) in (None, Code.ENVELOPE_INVALID, Code.SIGNATURE_INVALID)


@given(st.integers(0, 10_000), st.binary(min_size=1, max_size=3))
def test_a_damaged_envelope_is_refused_or_means_the_same(place: int, damage: bytes) -> None:
    whole = sign(KIND, b"hello", ALICE).to_bytes()
    place %= len(whole)
    data = whole[:place] + damage + whole[place + len(damage) :]
    if code_of(data) is None:
        assert Envelope.parse(data).payload == b"hello"
        assert Envelope.parse(data).signers(KIND) == {did_key(ALICE)}


# --- strict JSON ---


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b"\xff",
        b'{"a":1,"a":1}',
        b'{"a":{"b":1,"b":2}}',
        b"NaN",
        b"[1.5]",
        b"[1e3]",
        b"[9007199254740992]",
        b"[-9007199254740992]",
        b"[" + b"9" * 5000 + b"]",
        b'["\\ud800"]',
        b'{"\\ud800":1}',
        b"[" * 18 + b"]" * 18,
        b"[" * 20_000,
        b"{} {}",
        b'{"a":1,}',
    ],
)
def test_json_that_two_readers_could_take_differently_is_refused(data: bytes) -> None:
    with pytest.raises(StrictJsonError):
        strictjson.load(data, max_size=1 << 20)


def test_the_rest_of_json_is_read() -> None:
    value = {"a": [1, -2, True, None, "\U0001f511"], "b": {}}
    assert strictjson.load(json.dumps(value).encode(), max_size=100) == value
    assert strictjson.load(b"[-9007199254740991]", max_size=100) == [-(2**53 - 1)]
    assert strictjson.load(strictjson.dump(value), max_size=100) == value
    with pytest.raises(StrictJsonError, match="longer than 1"):
        strictjson.load(b"{}", max_size=1)


def test_members_are_taken_by_type_and_all_of_them() -> None:
    def members(**values: Any) -> Members:
        return Members(values, "x")

    whole = members(t="a", n=1, h="00ff", l=["a"])
    assert (whole.text("t"), whole.integer("n"), whole.octets("h", sizes=(2,))) == ("a", 1, b"\x00\xff")
    assert whole.texts("l", most=1) == ("a",)
    whole.end()
    for refused in (
        lambda: Members([], "x"),
        lambda: members(t=1).text("t"),
        lambda: members().text("t"),
        lambda: members(t="aa").text("t", longest=1),
        lambda: members(n=True).integer("n"),
        lambda: members(n=-1).integer("n"),
        lambda: members(n=2).integer("n", highest=1),
        lambda: members(h="0 0f").octets("h", sizes=(2,)),
        lambda: members(h="00FF").octets("h", sizes=(2,)),
        lambda: members(h="00").octets("h", sizes=(0, 2)),
        lambda: members(l=["a", "b"]).texts("l", most=1),
        lambda: members(l=[1]).texts("l", most=1),
        lambda: members(t="a").end(),
    ):
        with pytest.raises(StrictJsonError):
            refused()
