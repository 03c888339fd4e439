# SPDX-License-Identifier: Apache-2.0
"""The user's key and certificate: made once, private, renewed in time, never used for another stack."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from cloister.cli import login
from cloister.cli.state import StateDirectory
from cloister.errors import CloisterError
from cloister.identity import Role
from fakes.certs import TestCa


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path / "state").create()


def give_certificate(state: StateDirectory, ca: TestCa) -> tuple[login.UserCertificate, ec.EllipticCurvePrivateKey]:
    """Put a certificate of a CA, and its key, where `cloister` looks for them."""
    material = ca.material(Role.USER)
    state.user_key.write_bytes(material.private_key_pem.reveal())
    state.user_key.chmod(0o600)
    state.user_chain.write_bytes(material.chain_pem)
    certificate = login.UserCertificate.read(state)
    assert certificate is not None
    return certificate, login.load_user_key(state)


def test_a_key_is_made_once_and_for_its_owner_only(state: StateDirectory) -> None:
    first = login.make_user_key(state)
    assert state.user_key.stat().st_mode & 0o777 == 0o600
    assert login.spki_sha256(login.make_user_key(state)) == login.spki_sha256(first)


def test_a_key_that_others_can_read_is_refused(state: StateDirectory) -> None:
    login.make_user_key(state)
    state.user_key.chmod(0o640)
    with pytest.raises(CloisterError, match="cannot be used") as caught:
        login.load_user_key(state)
    assert "chmod 600" in caught.value.todo


def test_a_symbolic_link_is_no_key(state: StateDirectory, tmp_path: Path) -> None:
    login.make_user_key(state)
    state.user_key.rename(tmp_path / "elsewhere.pem")
    state.user_key.symlink_to(tmp_path / "elsewhere.pem")
    with pytest.raises(CloisterError, match="cannot be read"):
        login.load_user_key(state)


@pytest.mark.parametrize("kind", ["nothing", "text", "ed25519", "p384"])
def test_what_is_no_p256_key_is_refused(state: StateDirectory, kind: str) -> None:
    private = {"ed25519": ed25519.Ed25519PrivateKey.generate, "p384": lambda: ec.generate_private_key(ec.SECP384R1())}
    if kind in private:
        content = private[kind]().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    else:
        content = {"nothing": b"", "text": b"hello"}[kind]
    state.user_key.write_bytes(content)
    state.user_key.chmod(0o600)
    with pytest.raises(CloisterError, match="cannot be used"):
        login.load_user_key(state)


def test_a_certificate_is_renewed_when_half_its_life_is_over(state: StateDirectory) -> None:
    ca = TestCa()
    certificate, key = give_certificate(state, ca)
    start, end = certificate.leaf.not_valid_before_utc, certificate.leaf.not_valid_after_utc
    half = start + (end - start) / 2
    bundle = ca.bundle
    assert not certificate.is_due(bundle=bundle, key=key, now=half - timedelta(seconds=1))
    assert certificate.is_due(bundle=bundle, key=key, now=half)
    assert certificate.is_due(bundle=bundle, key=key, now=end + timedelta(days=1))


def test_a_certificate_of_another_authority_or_key_is_replaced(state: StateDirectory) -> None:
    ca = TestCa()
    certificate, key = give_certificate(state, ca)
    now = certificate.leaf.not_valid_before_utc
    assert not certificate.is_due(bundle=ca.bundle, key=key, now=now)
    assert certificate.is_due(bundle=TestCa().bundle, key=key, now=now)
    assert certificate.is_due(bundle=ca.bundle, key=ec.generate_private_key(ec.SECP256R1()), now=now)


@pytest.mark.parametrize("content", [b"", b"garbage", None])
def test_a_certificate_that_does_not_parse_counts_as_none(state: StateDirectory, content: bytes | None) -> None:
    if content is not None:
        state.user_chain.write_bytes(content)
    assert login.UserCertificate.read(state) is None


def test_a_missing_bundle_is_named(state: StateDirectory) -> None:
    with pytest.raises(CloisterError, match=r"bundle\.json"):
        login.read_bundle(state)
