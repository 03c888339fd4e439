# SPDX-License-Identifier: Apache-2.0
"""What is a trust bundle, what are credentials, and what is neither."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import TlsMaterial
from cloister.secret import SecretBytes
from fakes.certs import TestCa

CA = TestCa()
OTHER = TestCa()


def fields() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CA.bundle.to_bytes())
    return found


def refused(data: bytes) -> str:
    with pytest.raises(CloisterError) as caught:
        TrustBundle.parse(data)
    assert caught.value.code is Code.BUNDLE_INVALID
    return caught.value.why


def test_a_bundle_survives_its_bytes_and_its_digest_is_of_the_canonical_form() -> None:
    bundle = CA.bundle
    assert TrustBundle.parse(bundle.to_bytes()) == bundle
    spaced = json.dumps(fields(), indent=4).encode()
    assert TrustBundle.parse(spaced).digest == bundle.digest
    assert len(bundle.digest) == 48
    assert bundle.to_bytes().startswith(b'{"epoch":"test-1","intermediates":{"attest":"-----BEGIN')


def test_bundles_that_differ_in_anything_differ_in_digest() -> None:
    bundle = CA.bundle
    assert len({bundle.digest, replace(bundle, epoch="2").digest, replace(bundle, token_keys=()).digest}) == 3


def test_two_cas_may_be_trusted_while_they_change() -> None:
    both = CA.bundle_with(OTHER.__class__(epoch="test-2"))
    assert TrustBundle.parse(both.to_bytes()) == both


@pytest.mark.parametrize("field", ["trust_domain", "epoch", "root_pem", "intermediates", "token_keys"])
def test_a_missing_field_is_refused(field: str) -> None:
    found = fields()
    del found[field]
    assert "exactly the fields" in refused(json.dumps(found).encode())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"extra": 1}, "exactly the fields"),
        ({"trust_domain": "UPPER"}, "trust domain"),
        ({"trust_domain": 5}, "ASCII text"),
        ({"epoch": ""}, "epoch"),
        ({"epoch": "ä"}, "ASCII"),
        ({"root_pem": ""}, "PEM"),
        ({"root_pem": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"}, "PEM"),
        ({"root_pem": OTHER.bundle.root_pem.decode()}, "not issued by the root"),
        ({"root_pem": CA.material(Role.USER).chain_pem.decode()}, "not a CA"),
        ({"intermediates": {}}, "no CA"),
        ({"intermediates": []}, "object"),
        ({"intermediates": {"admin": ""}}, "named by role"),
        ({"intermediates": {"user": OTHER.bundle.intermediates[Role.USER].decode()}}, "not issued by the root"),
        ({"intermediates": {"user": CA.material(Role.USER).chain_pem.decode()}}, "not a CA"),
        ({"token_keys": [{}]}, "exactly kty"),
        ({"token_keys": [1]}, "object of strings"),
        ({"token_keys": [dict(CA.bundle.token_keys[0]) | {"d": "AAAA"}]}, "exactly kty"),
        ({"token_keys": [dict(CA.bundle.token_keys[0]) | {"alg": "none"}]}, "P-256"),
        ({"token_keys": [dict(CA.bundle.token_keys[0])] * 2}, "same kid"),
        ({"token_keys": [dict(CA.bundle.token_keys[0])] * 9}, "more than 8"),
    ],
)
def test_a_bundle_with_anything_unexpected_is_refused(change: dict[str, Any], why: str) -> None:
    assert why in refused(json.dumps(fields() | change).encode())


def test_a_field_that_occurs_twice_is_refused() -> None:
    twice = CA.bundle.to_bytes().replace(b'{"epoch"', b'{"epoch":"evil","epoch"', 1)
    assert "twice" in refused(twice)


def test_a_bundle_of_any_size_or_depth_is_refused_in_peace() -> None:
    refused(b"[" * 100_000)
    refused(b" " * 300_000)


@given(st.binary(max_size=200))
def test_whatever_is_not_a_bundle_is_one_error(data: bytes) -> None:
    refused(data)


def test_a_role_without_a_ca_is_an_error_not_an_empty_trust() -> None:
    bundle = replace(CA.bundle, intermediates={Role.USER: CA.bundle.intermediates[Role.USER]})
    with pytest.raises(CloisterError) as caught:
        bundle.intermediate(Role.ATTEST)
    assert caught.value.code is Code.BUNDLE_INVALID


def test_credentials_carry_the_identity_and_expiry_of_their_leaf() -> None:
    material = CA.material(Role.KEYBROKER)
    read = TlsMaterial.from_pem(material.private_key_pem, material.chain_pem, CA.bundle)
    assert read == material
    assert str(read.spiffe_id) == "spiffe://cloister.test/service/keybroker"
    assert read.not_after.tzinfo is not None
    assert "BEGIN" not in repr(read.private_key_pem)


@pytest.mark.parametrize(
    ("key", "chain", "bundle", "code"),
    [
        (CA.material(Role.USER).private_key_pem, CA.material(Role.USER).chain_pem, CA.bundle, Code.TLS_FAILED),
        (SecretBytes(b"no key"), CA.material(Role.USER).chain_pem, CA.bundle, Code.TLS_FAILED),
        (CA.material(Role.USER).private_key_pem, b"no chain", CA.bundle, Code.TLS_FAILED),
    ],
)
def test_credentials_that_do_not_fit_together_are_refused(
    key: SecretBytes, chain: bytes, bundle: TrustBundle, code: Code
) -> None:
    with pytest.raises(CloisterError) as caught:
        TlsMaterial.from_pem(key, chain, bundle)
    assert caught.value.code is code


@pytest.mark.parametrize(
    ("material", "bundle", "code"),
    [
        (CA.material(Role.USER), OTHER.bundle, Code.TLS_FAILED),
        (CA.material(Role.USER), TestCa("elsewhere.test").bundle, Code.TLS_FAILED),
        (CA.material(Role.USER, issued_by=Role.RANK), CA.bundle, Code.TLS_FAILED),
        (CA.material(Role.USER, uris=[]), CA.bundle, Code.CALLER_UNKNOWN),
        (CA.material(Role.USER, uris=["spiffe://cloister.test/a", "https://b"]), CA.bundle, Code.CALLER_UNKNOWN),
    ],
)
def test_credentials_of_another_authority_or_without_one_id_are_refused(
    material: TlsMaterial, bundle: TrustBundle, code: Code
) -> None:
    with pytest.raises(CloisterError) as caught:
        TlsMaterial.from_pem(material.private_key_pem, material.chain_pem, bundle)
    assert caught.value.code is code
