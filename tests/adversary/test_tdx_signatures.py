# SPDX-License-Identifier: Apache-2.0
"""An attacker with genuine parts of quotes: other keys, other reports, flipped bits (E1 to E4, Q7)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.tdx.quote import QuoteRejected
from cloister.tdx.verify import VerifiedQuote, verify_quote
from fakes.forged_quotes import BODY, NOW, QE_REPORT, ForgedPlatform, pem

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
FIELD = 0xFFFFFFFF00000001000000000000000000000000FFFFFFFFFFFFFFFFFFFFFFFF
SIGNATURE = 636
KEY = 700
QE_REPORT_START = 770
QE_SIGNATURE = 1154


@pytest.fixture(scope="module")
def platform() -> ForgedPlatform:
    return ForgedPlatform()


def verify(platform: ForgedPlatform, quote: bytes) -> VerifiedQuote:
    return verify_quote(quote, roots=[platform.trust_root], now=NOW)


def rejection(platform: ForgedPlatform, quote: bytes) -> str:
    with pytest.raises(QuoteRejected) as caught:
        verify(platform, quote)
    assert caught.value.reason
    return caught.value.check


def patched(quote: bytes, offset: int, new: bytes) -> bytes:
    return quote[:offset] + new + quote[offset + len(new) :]


def flipped(quote: bytes, offset: int) -> bytes:
    return patched(quote, offset, bytes([quote[offset] ^ 1]))


def number(value: int) -> bytes:
    return value.to_bytes(32, "big")


def test_a_flipped_bit_in_any_field_of_the_td_is_refused(platform: ForgedPlatform) -> None:
    quote = platform.quote()
    fields = [28, 44, 48, 64, 112, 160, 168, 176, 184, 232, 280, 328, 376, 424, 472, 520, 568, 631]
    assert {rejection(platform, flipped(quote, offset)) for offset in fields} == {"E3"}


def test_a_flipped_bit_in_any_field_of_the_qe_report_is_refused(platform: ForgedPlatform) -> None:
    quote = platform.quote()
    fields = [0, 16, 20, 48, 64, 96, 128, 160, 256, 258, 260, 320, 352, 383]
    assert {rejection(platform, flipped(quote, QE_REPORT_START + offset)) for offset in fields} == {"E1"}


def test_the_qe_report_of_another_platform_is_refused(platform: ForgedPlatform) -> None:
    mine, other = platform.quote(), ForgedPlatform().quote()
    report_and_signature = other[QE_REPORT_START : QE_REPORT_START + 384 + 64]
    assert rejection(platform, patched(mine, QE_REPORT_START, report_and_signature)) == "E1"


def test_an_attackers_key_under_a_genuine_qe_report_is_refused(platform: ForgedPlatform) -> None:
    attacker = ec.generate_private_key(ec.SECP256R1())
    point = platform.attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    genuine = hashlib.sha256(point).digest() + bytes(32)
    assert rejection(platform, platform.quote(attestation_key=attacker, qe_report_data=genuine)) == "E2"


@pytest.mark.parametrize("auth", [b"", b"a" * 32])
def test_authentication_data_is_bound(platform: ForgedPlatform, auth: bytes) -> None:
    assert verify(platform, platform.quote(qe_auth_data=auth)).simulated
    point = platform.attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    other = hashlib.sha256(point + auth + b"x").digest() + bytes(32)
    assert rejection(platform, platform.quote(qe_auth_data=auth, qe_report_data=other)) == "E2"


def test_the_hash_of_the_key_stands_in_the_first_half_and_zeros_in_the_second(platform: ForgedPlatform) -> None:
    point = platform.attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]
    digest = hashlib.sha256(point).digest()
    for wrong in (bytes(32) + digest, digest + digest, digest + bytes(31) + b"\1"):
        assert rejection(platform, platform.quote(qe_report_data=wrong)) == "E2"


def test_a_debug_quoting_enclave_is_refused_even_when_certified(platform: ForgedPlatform) -> None:
    debug = replace(QE_REPORT, attributes=b"\x17" + QE_REPORT.attributes[1:])
    assert rejection(platform, platform.quote(qe_report=debug)) == "Q7"


def test_the_signature_of_another_quote_is_refused(platform: ForgedPlatform) -> None:
    one, two = platform.quote(), platform.quote(body=replace(BODY, report_data=bytes(64)))
    assert rejection(platform, patched(one, SIGNATURE, two[SIGNATURE:KEY])) == "E3"


def test_reserved_bytes_are_refused_even_when_signed(platform: ForgedPlatform) -> None:
    assert rejection(platform, platform.resigned(patched(platform.quote(), 8, b"\1\0\0\0"))) == "H9"


def test_a_change_that_is_signed_again_is_accepted(platform: ForgedPlatform) -> None:
    quote = platform.resigned(patched(platform.quote(), 568, b"X" * 64))
    assert verify(platform, quote).quote.body.report_data == b"X" * 64


@pytest.mark.parametrize("offset", [SIGNATURE, SIGNATURE + 32, QE_SIGNATURE, QE_SIGNATURE + 32])
@pytest.mark.parametrize("value", [0, ORDER, ORDER + 1, 2**256 - 1])
def test_numbers_that_no_signature_has_are_refused(platform: ForgedPlatform, offset: int, value: int) -> None:
    assert rejection(platform, patched(platform.quote(), offset, number(value))) == "E4"


@pytest.mark.parametrize(("offset", "check"), [(SIGNATURE, "E3"), (QE_SIGNATURE, "E1")])
def test_the_largest_numbers_that_a_signature_has_are_merely_wrong(
    platform: ForgedPlatform, offset: int, check: str
) -> None:
    assert rejection(platform, patched(platform.quote(), offset, number(ORDER - 1) * 2)) == check


@pytest.mark.parametrize("offset", [SIGNATURE + 32, QE_SIGNATURE + 32])
def test_high_s_is_valid(platform: ForgedPlatform, offset: int) -> None:
    quote = platform.quote()
    s = int.from_bytes(quote[offset : offset + 32], "big")
    assert verify(platform, patched(quote, offset, number(ORDER - s))).simulated


@pytest.mark.parametrize(
    "point",
    [
        bytes(64),
        b"\xff" * 64,
        number(1) + number(1),
        number(FIELD) + number(0),
        # x = 5 has a point on the curve; the same x plus p is another spelling of it.
        number(5 + FIELD) + number(0x459243B9AA581806FE913BCE99817ADE11CA503C64D9A3C533415C083248FBCC),
    ],
)
def test_points_that_are_not_on_the_curve_are_refused(platform: ForgedPlatform, point: bytes) -> None:
    assert rejection(platform, patched(platform.quote(), KEY, point)) == "E4"


def test_a_quote_of_one_platform_with_the_chain_of_another_is_refused() -> None:
    one, two = ForgedPlatform(), ForgedPlatform()
    with pytest.raises(QuoteRejected) as caught:
        verify_quote(one.quote(chain=pem(*two.chain)), roots=[two.trust_root], now=NOW)
    assert caught.value.check == "E1"
