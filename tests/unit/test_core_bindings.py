# SPDX-License-Identifier: Apache-2.0
"""Claims about the bytes that are hashed, signed and sealed: TLV, HPKE and the protocol's bindings."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from hypothesis import given
from hypothesis import strategies as st

from cloister import hpke
from cloister.protocol import JobInput, LeaseTerms, ReleaseBinding, combined_nonce, job_config_digest
from cloister.secret import SecretBytes
from cloister.tlv import lp, parse_tlv, sha384, tlv


def test_a_length_prefix_is_four_bytes_big_endian() -> None:
    assert lp(b"abc") == b"\x00\x00\x00\x03abc"


def test_tlv_has_the_documented_bytes() -> None:
    assert tlv("l", b"\x01", "é", 258).hex(" ", 1) == (
        "00 00 00 01 6c 00 00 00 01 01 00 00 00 02 c3 a9 00 00 00 08 00 00 00 00 00 00 01 02"
    )


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_what_tlv_encodes_parses_back(fields: list[bytes]) -> None:
    assert parse_tlv(tlv("label", *fields), label="label", fields=len(fields)) == tuple(fields)


@given(st.lists(st.binary(max_size=8), max_size=4), st.lists(st.binary(max_size=8), max_size=4))
def test_different_fields_never_encode_alike(left: list[bytes], right: list[bytes]) -> None:
    assert (tlv("l", *left) == tlv("l", *right)) == (left == right)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_parse_or_raise_value_error(data: bytes) -> None:
    try:
        fields = parse_tlv(data, label="label", fields=2)
    except ValueError:
        return
    assert tlv("label", *fields) == data


@pytest.mark.parametrize("data", [tlv("other", b"", b""), tlv("label", b""), tlv("label", b"", b"", b""), b"", b"\0\0"])
def test_another_label_or_number_of_fields_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="TLV"):
        parse_tlv(data, label="label", fields=2)


def test_the_hpke_known_answer_holds() -> None:
    hpke.self_test()


def test_a_sealed_secret_opens_with_its_key_and_info_only() -> None:
    pair, other = hpke.HpkeKeyPair.generate(), hpke.HpkeKeyPair.generate()
    sealed = hpke.seal(pair.public_bytes, SecretBytes(b"key"), info=b"info")
    assert pair.open(sealed, info=b"info") == SecretBytes(b"key")
    for attempt in (lambda: other.open(sealed, info=b"info"), lambda: pair.open(sealed, info=b"other")):
        with pytest.raises(hpke.HpkeError):
            attempt()


@given(st.integers(min_value=0, max_value=8 * (1120 + 19) - 1))
def test_every_flipped_bit_of_a_sealed_secret_is_noticed(bit: int) -> None:
    pair = hpke.HpkeKeyPair.generate()
    sealed = bytearray(hpke.seal(pair.public_bytes, SecretBytes(b"key"), info=b"info"))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(hpke.HpkeError):
        pair.open(bytes(sealed), info=b"info")


@pytest.mark.parametrize("public", [b"", b"x" * 1215, b"\xff" * 1216, b"x" * 1217])
def test_a_public_key_of_another_shape_is_refused(public: bytes) -> None:
    with pytest.raises(hpke.HpkeError):
        hpke.seal(public, SecretBytes(b"key"), info=b"")


def _opened_by_the_specifications(sealed: bytes, info: bytes) -> bytes:
    """Open the known answer from primitives alone: X-Wing (draft-connolly-cfrg-xwing-kem, 5.3), RFC 9180, 5.1."""
    mlkem = MLKEM768PrivateKey.from_seed_bytes(bytes(range(64)))
    x25519 = X25519PrivateKey.from_private_bytes(bytes(range(64, 96)))
    ct_m, ct_x, ciphertext = sealed[:1088], sealed[1088:1120], sealed[1120:]
    ss_x = x25519.exchange(X25519PublicKey.from_public_bytes(ct_x))
    combined = (
        mlkem.decapsulate(ct_m) + ss_x + ct_x + x25519.public_key().public_bytes_raw() + bytes.fromhex("5c2e2f2f5e5c")
    )
    shared = hashlib.sha3_256(combined).digest()
    suite = b"HPKE" + (0x647A).to_bytes(2, "big") + (1).to_bytes(2, "big") + (2).to_bytes(2, "big")

    def extract(salt: bytes, label: bytes, ikm: bytes) -> bytes:
        return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + ikm, "sha256")

    def expand(prk: bytes, label: bytes, context: bytes, size: int) -> bytes:
        text = size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + context
        return HKDFExpand(SHA256(), size, text).derive(prk)

    context = b"\x00" + extract(b"", b"psk_id_hash", b"") + extract(b"", b"info_hash", info)
    secret = extract(shared, b"secret", b"")
    key, nonce = expand(secret, b"key", context, 32), expand(secret, b"base_nonce", context, 12)
    return AESGCM(key).decrypt(nonce, ciphertext, b"")


def test_an_implementation_written_from_the_specifications_opens_what_we_seal() -> None:
    public = hpke._fixed_pair().public_bytes
    assert _opened_by_the_specifications(hpke._KAT_SEALED, b"cloister-kat") == b"known answer"
    sealed = hpke.seal(public, SecretBytes(b"fresh"), info=b"info")
    assert _opened_by_the_specifications(sealed, b"info") == b"fresh"
    with pytest.raises(InvalidTag):
        _opened_by_the_specifications(sealed, b"other")


BINDING = ReleaseBinding(
    key_uri="cloister-key://a/b",
    key_version=1,
    purpose="train",
    policy_digest=b"p" * 48,
    evidence_digest=b"e" * 48,
    client_nonce=b"c" * 32,
    broker_nonce=b"b" * 32,
    broker_id="spiffe://cloister.dev/service/keybroker",
    wrapped_digest=b"w" * 48,
)
TERMS = LeaseTerms(policy_version=1, decided_ms=1_000, lease_until_ms=4_000)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ReleaseBinding)])
def test_every_field_of_a_release_is_bound_in_info_and_receipt(field: str) -> None:
    old = getattr(BINDING, field)
    new = old + 1 if isinstance(old, int) else old[:-1] + ("X" if isinstance(old, str) else b"X")
    changed = dataclasses.replace(BINDING, **{field: new})
    assert changed.hpke_info() != BINDING.hpke_info()
    receipt = {"sealed": b"s", "terms": TERMS, "log_id": b"l" * 48, "index": 3, "root": b"r" * 32}
    assert changed.receipt_message(**receipt) != BINDING.receipt_message(**receipt)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"sealed": b"t"},
        {"log_id": b"m" * 48},
        {"index": 4},
        {"root": b"s" * 32},
        {"terms": LeaseTerms(2, 1_000, 4_000)},
        {"terms": LeaseTerms(1, 1_001, 4_000)},
        {"terms": LeaseTerms(1, 1_000, 4_001)},
    ],
)
def test_a_receipt_is_over_the_answer_its_lease_and_its_place_in_the_log(change: dict[str, object]) -> None:
    receipt = {"sealed": b"s", "terms": TERMS, "log_id": b"l" * 48, "index": 3, "root": b"r" * 32}
    assert BINDING.receipt_message(**(receipt | change)) != BINDING.receipt_message(**receipt)  # type: ignore[arg-type]


def test_a_relying_partys_nonce_changes_the_nonce_that_is_quoted() -> None:
    assert combined_nonce(b"a" * 32, b"") == b"a" * 32
    assert combined_nonce(b"a" * 32, b"b" * 32) == sha384(tlv("cloister-nonce-v1", b"a" * 32, b"b" * 32))


INPUT = JobInput("reviews", "cloister-key://a/b", b"m" * 48)
JOB = {"args": ["--lr", "1"], "nodes": 2, "seed": 7, "inputs": [INPUT], "output_key_uri": "cloister-key://a/c"}


@pytest.mark.parametrize(
    "change",
    [
        {"args": ["--lr 1"]},
        {"args": ["--lr", "1", ""]},
        {"nodes": 3},
        {"seed": 8},
        {"inputs": []},
        {"inputs": [dataclasses.replace(INPUT, manifest_digest=b"n" * 48)]},
        {"inputs": [dataclasses.replace(INPUT, name="other")]},
        {"output_key_uri": "cloister-key://a/d"},
    ],
)
def test_everything_a_job_does_is_in_its_config_digest(change: dict[str, object]) -> None:
    assert job_config_digest(**(JOB | change)) != job_config_digest(**JOB)  # type: ignore[arg-type]
    assert len(job_config_digest(**JOB)) == 48  # type: ignore[arg-type]
