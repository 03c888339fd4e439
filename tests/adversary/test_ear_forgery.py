# SPDX-License-Identifier: Apache-2.0
"""Tokens that an attacker would try are refused, each by the check that is meant for it."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import hmac
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from hypothesis import given
from hypothesis import strategies as st

from cloister import ear
from fakes.ear_sample import AUDIENCE, ISSUER, NOW, sample_ear

KEY = ec.generate_private_key(ec.SECP256R1())
JWK = ear.public_jwk(KEY.public_key())
HEADER = {"alg": "ES256", "typ": "eat+jwt", "kid": JWK["kid"]}
TOKEN = ear.issue(sample_ear(), key=KEY, key_id=JWK["kid"])


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


CLAIMS: dict[str, Any] = json.loads(unb64(TOKEN.split(".")[1]))


def sign(signing_input: str, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    r, s = decode_dss_signature(key.sign(signing_input.encode(), ec.ECDSA(SHA256())))
    return signing_input + "." + b64(r.to_bytes(32, "big") + s.to_bytes(32, "big"))


def forge(header: object = HEADER, payload: object = CLAIMS, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    """Sign what attest would not: raw bytes or any JSON value as header and payload."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    return sign(".".join(b64(part) for part in parts), key)


def rejected_by(token: str, **changes: Any) -> str:
    arguments = {"keys": [JWK], "issuer": ISSUER, "audience": AUDIENCE, "now": NOW, **changes}
    with pytest.raises(ear.TokenRejected) as caught:
        ear.verify(token, **arguments)
    return caught.value.check


def test_the_forger_of_these_tests_can_make_an_acceptable_token() -> None:
    assert ear.verify(forge(), keys=[JWK], issuer=ISSUER, audience=AUDIENCE, now=NOW) == sample_ear()


@pytest.mark.parametrize("alg", ["none", "None", "HS256", "ES384", "RS256", "EdDSA", "", None, ["ES256"]])
def test_any_other_algorithm_is_refused(alg: object) -> None:
    assert rejected_by(forge(HEADER | {"alg": alg})) == "alg"


def test_an_unsigned_token_is_refused() -> None:
    head, body, _ = TOKEN.split(".")
    assert rejected_by(f"{head}.{body}.") == "form"
    assert rejected_by(f"{head}.{body}") == "form"
    none = b64(json.dumps(HEADER | {"alg": "none"}).encode())
    assert rejected_by(f"{none}.{body}.{b64(b'x')}") == "alg"


def test_a_mac_under_the_public_key_is_refused() -> None:
    head = b64(json.dumps(HEADER | {"alg": "HS256"}).encode())
    signing_input = f"{head}.{TOKEN.split('.')[1]}"
    public = KEY.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    mac = hmac.new(public, signing_input.encode(), hashlib.sha256).digest()
    assert rejected_by(f"{signing_input}.{b64(mac)}") == "alg"


def test_a_key_that_the_token_brings_along_is_refused() -> None:
    own = ec.generate_private_key(ec.SECP256R1())
    for extra in (
        {"jwk": ear.public_jwk(own.public_key())},
        {"jku": "https://evil"},
        {"x5u": "https://evil"},
        {"x5c": ["AA"]},
        {"crit": ["b64"], "b64": False},
    ):
        assert rejected_by(forge(HEADER | extra, key=own)) == "header"


def test_another_key_id_is_refused() -> None:
    own = ec.generate_private_key(ec.SECP256R1())
    kid = ear.public_jwk(own.public_key())["kid"]
    assert rejected_by(forge(HEADER | {"kid": kid}, key=own)) == "kid"
    assert rejected_by(forge(HEADER | {"kid": ["x"]})) == "kid"


def test_another_key_under_the_right_key_id_is_refused() -> None:
    assert rejected_by(forge(key=ec.generate_private_key(ec.SECP256R1()))) == "signature"


def test_no_key_accepts_nothing() -> None:
    assert rejected_by(TOKEN, keys=[]) == "kid"


def test_a_bundle_key_of_another_kind_is_refused() -> None:
    public = ed25519.Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    okp = {"kty": "OKP", "crv": "Ed25519", "x": b64(public), "kid": JWK["kid"]}
    assert rejected_by(TOKEN, keys=[okp]) == "kid"
    assert rejected_by(TOKEN, keys=[{**JWK, "x": b64(b"\x01" * 32)}]) == "kid"


def test_another_type_of_token_is_refused() -> None:
    assert rejected_by(forge(HEADER | {"typ": "JWT"})) == "typ"


def test_a_token_for_or_from_someone_else_is_refused() -> None:
    assert rejected_by(TOKEN, audience="spiffe://other.test") == "aud"
    assert rejected_by(TOKEN, issuer="spiffe://other.test/service/attest") == "iss"
    assert rejected_by(forge(payload=CLAIMS | {"aud": [AUDIENCE]})) == "shape"


def test_a_token_that_is_not_valid_yet_is_refused() -> None:
    later = CLAIMS["iat"] + 31
    assert rejected_by(forge(payload=CLAIMS | {"iat": later, "nbf": later, "exp": later + 10})) == "iat"
    assert rejected_by(forge(payload=CLAIMS | {"nbf": later})) == "nbf"


def test_an_expired_token_is_refused() -> None:
    assert rejected_by(forge(payload=CLAIMS | {"iat": CLAIMS["iat"] - 400, "exp": CLAIMS["iat"] - 100})) == "exp"


def test_a_long_lived_token_is_refused_even_when_attest_signed_it() -> None:
    assert rejected_by(forge(payload=CLAIMS | {"exp": CLAIMS["exp"] + 1})) == "lifetime"


def test_a_claim_that_stands_twice_is_refused() -> None:
    text = json.dumps(CLAIMS)
    for twice in ('{"exp": 9999999999, ' + text[1:], text.replace('"debug": false', '"debug": true, "debug": false')):
        assert rejected_by(forge(payload=twice.encode())) == "json"
    assert rejected_by(forge(header=json.dumps(HEADER)[:-1].encode() + b', "alg": "ES256"}')) == "json"


@pytest.mark.parametrize("payload", [b"", b"null", b"[]", b"{", b"\xff", b'{"a": NaN}', b"[" * 6000])
def test_a_payload_that_is_no_json_object_is_refused(payload: bytes) -> None:
    assert rejected_by(forge(payload=payload)) in {"json", "form"}


def test_another_encoding_of_the_same_token_is_refused() -> None:
    head, body, signature = TOKEN.split(".")
    # 64 bytes leave four unused bits in the last character.
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    sibling = alphabet[alphabet.index(signature[-1]) ^ 1]
    assert unb64(signature[:-1] + sibling) == unb64(signature)
    for token in (f"{head}.{body}.{signature[:-1]}{sibling}", TOKEN + "=", TOKEN + "\n", " " + TOKEN):
        assert rejected_by(token) == "form"


def test_an_overlong_token_is_refused() -> None:
    assert rejected_by(TOKEN + "A" * 16_384) == "size"


def test_a_flipped_bit_anywhere_is_refused() -> None:
    for index in range(0, len(TOKEN), 7):
        flipped = bytearray(TOKEN.encode())
        flipped[index] ^= 0x01
        rejected_by(flipped.decode("latin-1"))


def change(path: str, value: object) -> dict[str, Any]:
    claims = copy.deepcopy(CLAIMS)
    *parents, last = path.split("/")
    place = claims
    for parent in parents:
        place = place[parent]
    if value is DELETED:
        del place[last]
    else:
        place[last] = value
    return claims


DELETED = object()
TDX, WORKLOAD = "submods/cpu0/cloister_tdx", "submods/workload0/cloister_workload"


def paths(value: object, prefix: str = "") -> list[str]:
    if not isinstance(value, dict):
        return []
    return [p for name, child in value.items() for p in [prefix + name, *paths(child, f"{prefix}{name}/")]]


VECTOR = "submods/cpu0/ear_trustworthiness_vector"
OPTIONAL = {path for path in paths(CLAIMS) if path.startswith(("cloister_inputs/", f"{VECTOR}/"))}
# Values that are right for a claim, whatever else they are.
FITTING: dict[str, list[object]] = {
    f"{TDX}/tcb_status": [None],
    f"{TDX}/tcb_date": [None],
    f"{TDX}/tcb_evaluation": [None],
    f"{TDX}/collateral_issued": [None],
    f"{TDX}/collateral_expires": [None],
    f"{TDX}/advisories": [[]],
    f"{TDX}/debug": [True],
    f"{TDX}/simulated": [True],
    f"{WORKLOAD}/datasets": [[]],
    "cloister_inputs": [{}],
    VECTOR: [{}],
}


@pytest.mark.parametrize("path", sorted(set(paths(CLAIMS)) - OPTIONAL))
def test_a_missing_or_retyped_claim_is_refused(path: str) -> None:
    assert rejected_by(forge(payload=change(path, DELETED))) == "shape"
    for value in (None, True, 1.5, "\u0000", [], {}, [1], "x" * 3000):
        if value not in FITTING.get(path, []):
            assert rejected_by(forge(payload=change(path, value))) in {"shape", "sub", "eat_profile", "form"}, value


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        ("extra", 1, "shape"),
        (f"{TDX}/extra", 1, "shape"),
        ("eat_profile", "tag:other", "eat_profile"),
        ("eat_nonce", ["0a" * 31], "shape"),
        ("eat_nonce", ["0A" * 32], "shape"),
        ("cnf/x5t#S256", b64(b"\x00" * 31), "shape"),
        (f"{TDX}/rtmrs", ["00" * 48] * 3, "shape"),
        (f"{TDX}/mr_td", "00" * 47, "shape"),
        (f"{WORKLOAD}/script", "sha256:" + "00" * 32, "shape"),
        (f"{WORKLOAD}/role", "root", "shape"),
        (f"{WORKLOAD}/rank", 0, "sub"),
        (f"{WORKLOAD}/tenant", "hospital-b", "sub"),
        ("sub", "spiffe://cloister.test/ns/hospital-b/job/j-1/rank/1", "sub"),
        ("sub", "https://cloister.test", "sub"),
        ("submods/workload0/ear_status", "warning", "shape"),
        ("submods/cpu0/ear_trustworthiness_vector/magic", 2, "shape"),
        ("submods/cpu0/ear_trustworthiness_vector/executables", 200, "shape"),
    ],
)
def test_a_wrong_claim_is_refused(path: str, value: object, check: str) -> None:
    assert rejected_by(forge(payload=change(path, value))) == check


@given(st.text(max_size=200) | st.from_regex(r"[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,40}"))
def test_arbitrary_text_ends_in_one_error_type(text: str) -> None:
    rejected_by(text)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=10),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)


@given(st.sampled_from(sorted(set(paths(CLAIMS)))), json_values)
def test_arbitrary_claims_under_the_right_key_end_in_a_result_or_one_error_type(path: str, value: Any) -> None:
    token = forge(payload=change(path, value))
    with contextlib.suppress(ear.TokenRejected):
        ear.verify(token, keys=[JWK], issuer=ISSUER, audience=AUDIENCE, now=NOW)
