# SPDX-License-Identifier: Apache-2.0
"""An attacker with a certificate authority of his own, or with real certificates in the wrong places (P1 to P8)."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.errors import CloisterError, Code
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.verify import TrustRoot, VerifiedQuote, verify_quote
from cloister_sim import der
from fakes.forged_quotes import (
    BASIC_CONSTRAINTS,
    CA,
    ECDSA_SHA384,
    KEY_USAGE,
    LEAF,
    MAY_ISSUE,
    MAY_SIGN,
    NOW,
    ROOT,
    SGX,
    UNKNOWN,
    ForgedPlatform,
    Spec,
    ca_constraints,
    pem,
    sgx_extension,
    sgx_members,
)


def verify(
    platform: ForgedPlatform, *, chain: bytes | None = None, now: datetime = NOW, roots: list[TrustRoot] | None = None
) -> VerifiedQuote:
    trusted = [platform.trust_root] if roots is None else roots
    return verify_quote(platform.quote(chain=chain), roots=trusted, now=now)


def rejection(
    platform: ForgedPlatform, *, chain: bytes | None = None, now: datetime = NOW, roots: list[TrustRoot] | None = None
) -> str:
    with pytest.raises(QuoteRejected) as caught:
        verify(platform, chain=chain, now=now, roots=roots)
    assert caught.value.reason
    return caught.value.check


@pytest.fixture(scope="module")
def honest() -> ForgedPlatform:
    # Signatures vary in size by a byte or two; base64 of this leaf ends in "==", which some tests take away.
    return next(platform for platform in iter(ForgedPlatform, None) if len(platform.leaf_der) % 3 == 1)


def test_an_unchanged_platform_verifies(honest: ForgedPlatform) -> None:
    verified = verify(honest)
    assert verified.fmspc.hex() == "00806f050000"
    assert (verified.ppid, verified.platform_instance_id) == (bytes(range(16)), bytes(range(16, 32)))
    assert verified.pceid == bytes(2)


def test_the_processor_ca_is_one_too() -> None:
    members = sgx_members()
    del members["instance"]
    platform = ForgedPlatform(
        ca=replace(CA, name="Intel SGX PCK Processor CA"), leaf=LEAF.changed(SGX, sgx_extension(members))
    )
    assert verify(platform).platform_instance_id == b""


# P1: exactly three certificates.


@pytest.mark.parametrize(
    "chain",
    [
        lambda p: pem(p.leaf_der, p.ca_der),
        lambda p: pem(p.leaf_der, p.leaf_der, p.ca_der, p.root_der),
        lambda p: pem(p.leaf_der, p.ca_der, p.root_der, p.root_der),
        lambda p: pem(p.leaf_der, *[p.ca_der] * 30, p.root_der),
        lambda p: b"",
        lambda p: b"\0",
        lambda p: pem(*p.chain) + b"\0\0",
        lambda p: b"\n" + pem(*p.chain),
        lambda p: pem(*p.chain) + b"junk",
        lambda p: pem(p.leaf_der) + b"junk\n" + pem(p.ca_der, p.root_der),
        lambda p: pem(*p.chain, label="TRUSTED CERTIFICATE"),
        lambda p: pem(p.leaf_der, p.ca_der) + pem(p.root_der, label="X509 CRL"),
        lambda p: pem(*p.chain).replace(b"\n", b"\r\n"),
        lambda p: pem(*p.chain).replace(b"MI", b"M*", 1),
        lambda p: pem(*p.chain).replace(b"=", b"", 1),
        lambda p: pem(*p.chain).replace(b"=\n", b"=\n\n", 1),
        lambda p: pem(*p.chain).replace(b"MI", b"M\nI", 1),
        lambda p: pem(p.leaf_der + b"\0", p.ca_der, p.root_der),
        lambda p: pem(p.leaf_der, p.ca_der + p.ca_der, p.root_der),
        lambda p: pem(p.leaf_der[:-1], p.ca_der, p.root_der),
        lambda p: pem(b"", p.ca_der, p.root_der),
        lambda p: pem(b"\x30\x80" + p.leaf_der[4:] + b"\0\0", p.ca_der, p.root_der),
    ],
)
def test_anything_but_three_pem_certificates_is_refused(
    honest: ForgedPlatform, chain: Callable[[ForgedPlatform], bytes]
) -> None:
    assert rejection(honest, chain=chain(honest)) in {"P1", "P2"}


def test_a_missing_last_newline_or_a_nul_is_as_intel_writes_it(honest: ForgedPlatform) -> None:
    assert verify(honest, chain=pem(*honest.chain) + b"\0").simulated
    assert verify(honest, chain=pem(*honest.chain)[:-1]).simulated


@pytest.mark.parametrize(("field", "value"), [("version", 0), ("version", 1), ("serial", 0), ("serial", 1 << 160)])
def test_a_certificate_of_another_version_or_serial_is_refused(field: str, value: int) -> None:
    for which in ("ca", "leaf"):
        spec = replace(CA if which == "ca" else LEAF, **{field: value})
        assert rejection(ForgedPlatform(**{which: spec})) == "P1"


def test_a_signature_has_no_unused_bits() -> None:
    """The bits of a BIT STRING that are not used say nothing, so that a certificate could be written in eight ways."""
    platform = next(platform for platform in iter(ForgedPlatform, None) if platform.leaf_der[-1] % 2 == 0)
    signature = x509.load_der_x509_certificate(platform.leaf_der).signature
    start = len(platform.leaf_der) - len(signature) - 1
    assert platform.leaf_der[start] == 0
    padded = platform.leaf_der[:start] + b"\1" + platform.leaf_der[start + 1 :]
    assert rejection(platform, chain=pem(padded, platform.ca_der, platform.root_der)) == "P1"


def test_a_negative_serial_is_refused() -> None:
    assert rejection(ForgedPlatform(leaf=replace(LEAF, serial=-5))) == "P1"


# P2: the root is a configured one, never the one that came along.


def test_a_whole_pki_with_intels_names_is_refused(honest: ForgedPlatform) -> None:
    assert rejection(ForgedPlatform(), roots=[honest.trust_root]) == "P2"


def test_an_evil_chain_in_front_of_the_real_root_is_refused(honest: ForgedPlatform) -> None:
    evil = ForgedPlatform()
    mixed = pem(evil.leaf_der, evil.ca_der, honest.root_der)
    assert rejection(evil, chain=mixed, roots=[honest.trust_root]) == "P3"


def test_no_configured_root_means_no_quote(honest: ForgedPlatform) -> None:
    assert rejection(honest, roots=[]) == "P2"


def edition(honest: ForgedPlatform, **change: object) -> bytes:
    """Return another certificate of the honest root's name and key, as it would sign it itself."""
    other = ForgedPlatform()
    other.keys["root"] = honest.keys["root"]
    return other.certificate(replace(ROOT, **change), "root")  # type: ignore[arg-type]


def test_another_edition_of_the_root_is_not_the_configured_root(honest: ForgedPlatform) -> None:
    """Intel issued its root more than once; chains of 2018 end in an edition of path length 0. One is configured."""
    extensions = ROOT.changed(BASIC_CONSTRAINTS, ca_constraints(0)).extensions
    later = edition(honest, not_after=NOW + timedelta(days=3650))
    for root in (edition(honest, serial=77), edition(honest, extensions=extensions), later):
        assert rejection(honest, chain=pem(honest.leaf_der, honest.ca_der, root)) == "P2"


def test_what_only_looks_like_the_root_is_refused(honest: ForgedPlatform) -> None:
    flipped = honest.root_der[:-1] + bytes([honest.root_der[-1] ^ 1])
    for root in (flipped, edition(honest, signed_by="stranger"), ForgedPlatform().root_der, b"\x30\0"):
        assert rejection(honest, chain=pem(honest.leaf_der, honest.ca_der, root)) == "P2"


def test_each_root_marks_what_is_under_it(honest: ForgedPlatform) -> None:
    other = ForgedPlatform()
    roots = [TrustRoot(other.root_der, simulated=False), honest.trust_root]
    assert verify(honest, roots=roots).simulated
    assert not verify(other, roots=roots).simulated


@pytest.mark.parametrize(
    "spec",
    [
        replace(ROOT, name="Some Root CA"),
        ROOT.without(BASIC_CONSTRAINTS),
        ROOT.changed(BASIC_CONSTRAINTS, ca_constraints(0)),
        ROOT.changed(KEY_USAGE, MAY_SIGN),
        ROOT.with_extension(UNKNOWN, b"\x05\0", critical=True),
        replace(ROOT, curve=ec.SECP384R1()),
    ],
)
def test_a_root_that_cannot_be_one_is_not_configured(spec: Spec) -> None:
    with pytest.raises(CloisterError) as caught:
        TrustRoot(ForgedPlatform(root=spec).root_der, simulated=True)
    assert caught.value.code is Code.CONFIG_INVALID


@pytest.mark.parametrize("data", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_root_file_without_a_certificate_is_a_configuration_error(data: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        TrustRoot.from_pem(data, simulated=False)
    assert caught.value.code is Code.CONFIG_INVALID


# P3: algorithms and signatures.

WITH_NULL = bytes.fromhex("300c06082a8648ce3d0403020500")  # parameters that must be absent


@pytest.mark.parametrize("which", ["ca", "leaf"])
@pytest.mark.parametrize(
    "change",
    [
        {"curve": ec.SECP384R1()},
        {"curve": ec.SECP256K1()},
        {"inner_algorithm": ECDSA_SHA384},
        {"outer_algorithm": ECDSA_SHA384},
        {"inner_algorithm": ECDSA_SHA384, "outer_algorithm": ECDSA_SHA384, "digest": SHA384()},
        {"inner_algorithm": WITH_NULL, "outer_algorithm": WITH_NULL},
        {"digest": SHA384()},
        {"signed_by": "stranger"},
    ],
)
def test_other_algorithms_keys_and_signers_are_refused(which: str, change: dict[str, object]) -> None:
    spec = replace(CA if which == "ca" else LEAF, **change)  # type: ignore[arg-type]
    assert rejection(ForgedPlatform(**{which: spec})) == "P3"


def test_a_key_that_is_not_on_the_curve_is_refused() -> None:
    point = ec.generate_private_key(ec.SECP256R1()).public_key()
    spki = point.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    off_curve = spki[:-1] + bytes([spki[-1] ^ 1])
    assert rejection(ForgedPlatform(leaf=replace(LEAF, spki=off_curve))) == "P3"
    compressed = point.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    assert rejection(ForgedPlatform(leaf=replace(LEAF, spki=spki[:23] + compressed))) in {"P1", "P3"}


@pytest.mark.parametrize("position", [0, 1])
def test_a_flipped_bit_in_a_certificate_is_refused(honest: ForgedPlatform, position: int) -> None:
    certificate = honest.chain[position]
    for offset in range(0, len(certificate), 7):
        chain = list(honest.chain)
        chain[position] = certificate[:offset] + bytes([certificate[offset] ^ 0x10]) + certificate[offset + 1 :]
        assert rejection(honest, chain=pem(*chain)) in {"P1", "P3", "E1"}


def test_certificates_in_another_order_are_refused(honest: ForgedPlatform) -> None:
    leaf, ca, root = honest.chain
    assert rejection(honest, chain=pem(root, ca, leaf)) == "P2"
    assert rejection(honest, chain=pem(ca, leaf, root)) == "P3"
    assert rejection(honest, chain=pem(leaf, leaf, root)) == "P3"
    assert rejection(honest, chain=pem(leaf, root, root)) == "P3"


# P4: who may issue.


@pytest.mark.parametrize(
    "ca",
    [
        CA.changed(BASIC_CONSTRAINTS, der.sequence()),
        CA.changed(KEY_USAGE, MAY_SIGN),
        CA.without(BASIC_CONSTRAINTS),
        CA.without(KEY_USAGE),
    ],
)
def test_a_ca_that_may_not_issue_is_refused(ca: Spec) -> None:
    assert rejection(ForgedPlatform(ca=ca)) == "P4"


@pytest.mark.parametrize(
    "leaf",
    [
        LEAF.changed(BASIC_CONSTRAINTS, ca_constraints(None)),
        LEAF.changed(KEY_USAGE, MAY_ISSUE),
        LEAF.changed(KEY_USAGE, bytes.fromhex("03020640")),
        LEAF.without(BASIC_CONSTRAINTS),
        LEAF.without(KEY_USAGE),
    ],
)
def test_a_leaf_that_is_a_ca_or_may_not_sign_is_refused(leaf: Spec) -> None:
    assert rejection(ForgedPlatform(leaf=leaf)) == "P4"


def test_a_pck_certificate_is_no_ca_for_another(honest: ForgedPlatform) -> None:
    below = ForgedPlatform(leaf=replace(LEAF, issuer=LEAF.name, signed_by="stranger"))
    assert (
        rejection(below, chain=pem(below.leaf_der, honest.leaf_der, honest.root_der), roots=[honest.trust_root]) == "P3"
    )


# P5: roles by name and position.


@pytest.mark.parametrize(
    ("which", "spec"),
    [
        ("ca", replace(CA, name="Intel SGX PCK Platform CA ")),
        ("ca", replace(CA, name="Intel SGX TCB Signing")),
        ("ca", replace(CA, name="Intel SGX Root CA")),
        ("leaf", replace(LEAF, name="Intel SGX TCB Signing")),
        ("leaf", replace(LEAF, name="intel sgx pck certificate")),
        ("leaf", replace(LEAF, issuer="Intel SGX PCK Processor CA")),
        ("leaf", replace(LEAF, issuer="Intel SGX Root CA")),
        ("ca", replace(CA, issuer="Intel SGX PCK Platform CA")),
    ],
)
def test_another_name_or_position_is_refused(which: str, spec: Spec) -> None:
    assert rejection(ForgedPlatform(**{which: spec})) == "P5"


def test_a_leaf_directly_under_the_root_is_refused() -> None:
    platform = ForgedPlatform(leaf=replace(LEAF, issuer=ROOT.name, signed_by="root"))
    assert rejection(platform) == "P3"


# P6: validity.


@pytest.mark.parametrize("which", ["root", "ca", "leaf"])
def test_each_certificate_must_be_valid_now(which: str) -> None:
    spec = {"root": ROOT, "ca": CA, "leaf": LEAF}[which]
    second = timedelta(seconds=1)
    for start, end, accepted in (
        (NOW, NOW + second, True),
        (NOW - second, NOW, True),
        (NOW + second, NOW + 2 * second, False),
        (NOW - 2 * second, NOW - second, False),
    ):
        platform = ForgedPlatform(**{which: replace(spec, not_before=start, not_after=end)})
        if accepted:
            assert verify(platform).simulated
        else:
            assert rejection(platform) == "P6"


def test_the_time_zone_of_now_does_not_matter(honest: ForgedPlatform) -> None:
    assert verify(honest, now=NOW.astimezone(timezone(timedelta(hours=14)))).simulated


def test_unused_bits_of_base64_are_zero(honest: ForgedPlatform) -> None:
    chain = pem(*honest.chain)
    at = chain.index(b"=")
    alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    loose = alphabet[alphabet.index(chain[at - 1]) + 1]
    assert rejection(honest, chain=chain[: at - 1] + bytes([loose]) + chain[at:]) == "P1"


def test_base64_is_strict(honest: ForgedPlatform) -> None:
    text = base64.b64encode(honest.leaf_der)
    block = b"-----BEGIN CERTIFICATE-----\n" + text + b"====\n-----END CERTIFICATE-----\n"
    assert rejection(honest, chain=block + pem(honest.ca_der, honest.root_der)) == "P1"
