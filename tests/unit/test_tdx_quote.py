# SPDX-License-Identifier: Apache-2.0
"""Claims about quote bytes: one layout, read and written byte for byte, and nothing else accepted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cloister.tdx.body import SgxReport, TdBody15Ex
from cloister.tdx.quote import MAX_QUOTE_SIZE, QeReport, Quote, QuoteRejected, TdBody, parse_quote
from cloister.tdx.reportdata import report_data
from cloister.tdx.show import describe
from cloister.tdx.verify import TrustRoot, VerifiedQuote, verify_quote
from fakes.forged_collateral import BODY_15, BODY_15_EX, ENCLAVE
from fakes.forged_quotes import BODY, ForgedPlatform
from fakes.forged_quotes import NOW as FORGED_AT

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
QUOTE = (VECTORS / "quote.bin").read_bytes()
EXPECTED: dict[str, Any] = json.loads((VECTORS / "expected.json").read_text())
ROOT = TrustRoot.from_pem((VECTORS / "root.pem").read_bytes(), simulated=True)
NOW = datetime.fromisoformat(EXPECTED["verification_time"])


def with_u16(offset: int, value: int) -> bytes:
    return QUOTE[:offset] + struct.pack("<H", value) + QUOTE[offset + 2 :]


def with_u32(offset: int, value: int) -> bytes:
    return QUOTE[:offset] + struct.pack("<I", value) + QUOTE[offset + 4 :]


def rejection(data: bytes) -> str:
    with pytest.raises(QuoteRejected) as caught:
        Quote.parse(data)
    assert caught.value.reason
    return caught.value.check


SIGNATURE_SIZE = struct.unpack_from("<I", QUOTE, 632)[0]
CERTIFICATION = 636 + 128
AUTH = CERTIFICATION + 6 + 448
INNER = AUTH + 2 + 32


def test_the_pinned_quote_is_the_pinned_quote() -> None:
    assert hashlib.sha256(QUOTE).hexdigest() == EXPECTED["quote_sha256"]


def test_fields_are_where_the_specification_puts_them() -> None:
    body = Quote.parse(QUOTE).body
    found = {f.name: getattr(body, f.name) for f in dataclasses.fields(body) if f.name != "rtmrs"}
    found |= {f"rtmr{n}": rtmr for n, rtmr in enumerate(body.rtmrs)}
    assert {name: value.hex() for name, value in found.items()} == EXPECTED["body"]


def test_a_quote_is_written_as_it_was_read() -> None:
    assert Quote.parse(QUOTE).to_bytes() == QUOTE
    assert QeReport.parse(QUOTE[770:1154]).to_bytes() == QUOTE[770:1154]


def test_the_pinned_quote_verifies_and_says_that_it_is_simulated() -> None:
    verified = verify_quote(QUOTE, roots=[ROOT], now=NOW)
    assert verified.simulated
    assert verified.quote == Quote.parse(QUOTE)
    assert verified.root_fingerprint == ROOT.fingerprint
    assert [check.name for check in verified.checks if not check.ok] == []
    assert {"X1", "H1-H9", "D1-D4", "P1", "P2", "P3", "P4", "P5", "P6", "P7", "P8", "E1", "E2", "E3", "E4", "Q7"} == {
        check.name for check in verified.checks
    }


def test_report_data_is_the_protocols() -> None:
    inputs = {
        name: bytes.fromhex(value)
        if name in ("nonce", "tls_spki_der", "hpke_public_key", "receipt_spki_der")
        else value
        for name, value in EXPECTED["report_data_inputs"].items()
    }
    assert report_data(**inputs).hex() == EXPECTED["body"]["report_data"]
    assert len(report_data(**inputs)) == 64
    assert report_data(**inputs).endswith(b"cloister-rd-v1\0\0")


@pytest.mark.parametrize(
    "change",
    [
        {"role": "gateway"},
        {"trust_domain": "other.example"},
        {"audience": "someone else"},
        {"nonce": bytes(32)},
        {"tls_spki_der": b"other"},
        {"hpke_kem_id": 0x20},
        {"hpke_public_key": b"other"},
        {"receipt_spki_der": b"other"},
        {"tls_spki_der": b"tls spkih", "hpke_public_key": b"pke key"},  # a field that runs into the next
    ],
)
def test_every_field_changes_report_data(change: dict[str, Any]) -> None:
    fields: dict[str, Any] = {
        "role": "rank",
        "trust_domain": "cloister.example",
        "audience": "attest",
        "nonce": b"n" * 32,
        "tls_spki_der": b"tls spki",
        "hpke_kem_id": 0x647A,
        "hpke_public_key": b"hpke key",
        "receipt_spki_der": b"",
    }
    assert report_data(**fields) != report_data(**fields | change)


def test_zeros_behind_a_quote_are_kept_and_allowed() -> None:
    padded = QUOTE + bytes(3000)
    assert Quote.parse(padded).trailing_zeros == 3000
    assert Quote.parse(padded).to_bytes() == padded
    assert verify_quote(padded, roots=[ROOT], now=NOW).quote.trailing_zeros == 3000


@pytest.mark.parametrize("tail", [b"A" * 64, bytes(63) + b"\1", QUOTE])
def test_anything_else_behind_a_quote_is_refused(tail: bytes) -> None:
    assert rejection(QUOTE + tail) == "H8"


def test_a_quote_cut_anywhere_is_refused() -> None:
    # The last byte of the pinned quote is the NUL behind the PEM chain, so every cut is noticed by a size.
    assert {rejection(QUOTE[:size]) for size in range(636)} == {"H1"}
    assert {rejection(QUOTE[:size]) for size in range(636, len(QUOTE))} == {"H8"}


def test_sizes_are_limited_before_anything_is_read() -> None:
    assert rejection(b"") == "H1"
    assert rejection(bytes(1024 * 1024)) == "H1"
    assert rejection(QUOTE + bytes(MAX_QUOTE_SIZE)) == "H1"
    assert Quote.parse(QUOTE + bytes(MAX_QUOTE_SIZE - len(QUOTE))).version == 4


@pytest.mark.parametrize("version", [0, 1, 2, 6, 0x0400, 0xFFFF])
def test_other_versions_are_refused(version: int) -> None:
    assert rejection(with_u16(0, version)) == "H2"


@pytest.mark.parametrize("kind", [0, 1, 3, 4, 0xFFFF])
def test_other_attestation_keys_are_refused(kind: int) -> None:
    assert rejection(with_u16(2, kind)) == "H3"


@pytest.mark.parametrize("tee", [1, 0x80, 0x82, 0x81000000, 0xFFFFFFFF])
def test_other_tees_are_refused(tee: int) -> None:
    assert rejection(with_u32(4, tee)) == "H4"


def test_a_version_4_quote_of_sgx_is_refused() -> None:
    assert rejection(with_u32(4, 0)) == "H5"


@pytest.mark.parametrize("vendor", [bytes(16), bytes([QUOTE[12] ^ 1]) + QUOTE[13:28]])
def test_other_vendors_are_refused(vendor: bytes) -> None:
    assert rejection(QUOTE[:12] + vendor + QUOTE[28:]) == "H6"


@pytest.mark.parametrize("offset", [8, 9, 10, 11])
def test_reserved_header_bytes_are_zero(offset: int) -> None:
    assert rejection(QUOTE[:offset] + b"\1" + QUOTE[offset + 1 :]) == "H9"


@pytest.mark.parametrize(
    ("size", "check"),
    [(0, "H8"), (SIGNATURE_SIZE - 1, "D3"), (SIGNATURE_SIZE + 1, "H8"), (2**31, "H8"), (2**32 - 1, "H8")],
)
def test_the_size_of_the_signature_data_is_exact(size: int, check: str) -> None:
    assert rejection(with_u32(632, size)) == check


def test_no_signature_data_at_all_is_refused() -> None:
    assert rejection(QUOTE[:632] + bytes(4)) == "D3"
    assert rejection(QUOTE[:632] + struct.pack("<I", 134) + QUOTE[636:764] + struct.pack("<HI", 6, 0)) == "D3"


@pytest.mark.parametrize("kind", [0, 1, 5, 7, 0xFFFF])
def test_other_outer_certification_data_is_refused(kind: int) -> None:
    assert rejection(with_u16(CERTIFICATION, kind)) == "D1"


@pytest.mark.parametrize("kind", [0, 1, 2, 3, 4, 6, 7, 0xFFFF])
def test_other_inner_certification_data_is_refused(kind: int) -> None:
    assert rejection(with_u16(INNER, kind)) == "D2"


@pytest.mark.parametrize("offset", [CERTIFICATION + 2, INNER + 2])
@pytest.mark.parametrize("difference", [-1, 1, 65_536])
def test_nested_sizes_are_exact(offset: int, difference: int) -> None:
    size = struct.unpack_from("<I", QUOTE, offset)[0]
    assert rejection(with_u32(offset, size + difference)) == "D3"


def test_junk_inside_the_certification_data_is_refused() -> None:
    outer, total = SIGNATURE_SIZE - 134, SIGNATURE_SIZE
    grown = bytearray(QUOTE + b"junk")
    struct.pack_into("<I", grown, 632, total + 4)
    struct.pack_into("<I", grown, CERTIFICATION + 2, outer + 4)
    assert rejection(bytes(grown)) == "D3"


@pytest.mark.parametrize("size", [0, 1, 20, 31, 33, 64, 1000, 1024])
def test_authentication_data_of_any_length_is_read(size: int) -> None:
    quote = Quote.parse(QUOTE)
    signature = dataclasses.replace(quote.signature, qe_auth_data=b"a" * size)
    data = dataclasses.replace(quote, signature=signature).to_bytes()
    assert Quote.parse(data).signature.qe_auth_data == b"a" * size


def test_too_much_authentication_data_is_refused() -> None:
    assert rejection(with_u16(AUTH, 0xFFFF)) == "D4"
    assert rejection(with_u16(AUTH, 1025)) == "D4"
    short = dataclasses.replace(Quote.parse(QUOTE).signature, pck_chain_pem=b"", qe_auth_data=b"")
    data = bytearray(dataclasses.replace(Quote.parse(QUOTE), signature=short).to_bytes())
    struct.pack_into("<H", data, AUTH, 7)
    assert rejection(bytes(data)) == "D4"


def test_values_of_wrong_sizes_do_not_exist() -> None:
    body = Quote.parse(QUOTE).body
    with pytest.raises(ValueError, match="TdBody"):
        dataclasses.replace(body, report_data=bytes(63))
    with pytest.raises(ValueError, match="SgxReport"):
        dataclasses.replace(QeReport.parse(bytes(384)), isv_svn=b"\0")
    assert TdBody.parse(body.to_bytes()) == body


def test_only_the_verifier_makes_a_verified_quote() -> None:
    verified = verify_quote(QUOTE, roots=[ROOT], now=NOW)
    with pytest.raises((TypeError, ValueError)):
        dataclasses.replace(verified, simulated=False)
    with pytest.raises(TypeError, match="only verify_quote"):
        VerifiedQuote(
            quote=verified.quote,
            simulated=False,
            fmspc=b"",
            pceid=b"",
            ppid=b"",
            platform_instance_id=b"",
            root_fingerprint=b"",
            checks=(),
            witness=None,
        )


@pytest.mark.parametrize(
    "now",
    [
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(2017, 12, 31, tzinfo=UTC),
        datetime(2100, 1, 1, tzinfo=UTC),
        datetime(2026, 12, 1),
    ],
)
def test_a_clock_that_was_never_set_is_refused(now: datetime) -> None:
    with pytest.raises(QuoteRejected) as caught:
        verify_quote(QUOTE, roots=[ROOT], now=now)
    assert caught.value.check == "X1"


def test_show_names_every_register_and_attribute() -> None:
    rows = describe(Quote.parse(QUOTE))
    values = {(section, field): value for section, field, value in rows}
    assert values["TD", "rtmr3"] == EXPECTED["body"]["rtmr3"]
    assert values["TD", "td_attributes"] == "0000001000000000 (SEPT_VE_DISABLE)"
    assert values["TD", "report_data"].endswith("(of Cloister)")
    assert values["quoting enclave", "isv_prod_id"] == "2"
    debug = dataclasses.replace(Quote.parse(QUOTE).body, td_attributes=b"\x03" + bytes(7))
    shown = describe(dataclasses.replace(Quote.parse(QUOTE), body=debug))
    assert ("TD", "td_attributes", "0300000000000000 (DEBUG, bit 1)") in shown


@pytest.mark.parametrize(
    ("body", "version", "kind", "start"),
    [(BODY, 5, 2, 54), (BODY_15, 5, 3, 54), (BODY_15_EX, 5, 4, 54), (ENCLAVE, 5, 1, 54), (ENCLAVE, 3, None, 48)],
)
def test_every_kind_of_quote_is_written_as_it_was_read(
    body: TdBody | SgxReport, version: int, kind: int | None, start: int
) -> None:
    data = ForgedPlatform().quote(body=body, version=version)
    quote = parse_quote(data)
    assert quote.to_bytes() == data
    assert quote.body == body
    assert (quote.version, type(quote.body)) == (version, type(body))
    size = len(body.to_bytes())
    assert data[start : start + size] == body.to_bytes()
    if kind is not None:
        assert struct.unpack_from("<HI", data, 48) == (kind, size)
    shown = {(section, name): value for section, name, value in describe(quote)}
    assert shown["header", "version"] == str(version)


def test_longer_bodies_have_their_fields_where_the_specification_puts_them() -> None:
    raw = bytes(number % 251 for number in range(885))
    body = TdBody15Ex.parse(raw)
    assert body.to_bytes() == raw
    offsets = {
        "tee_tcb_svn2": (584, 16),
        "mr_service_td": (600, 48),
        "vm_id": (648, 1),
        "td_id": (649, 32),
        "device_info": (681, 48),
        "initial_service_td_hash": (729, 48),
        "initial_service_td_attributes": (777, 8),
        "initial_cpu_svn": (785, 16),
        "initial_tee_tcb_svn": (801, 16),
        "initial_tee_fmspc": (817, 12),
        "current_service_td_hash": (829, 48),
        "current_service_td_attributes": (877, 8),
    }
    assert {name: raw[at : at + size] for name, (at, size) in offsets.items()} == {
        name: getattr(body, name) for name in offsets
    }


def test_neither_parser_returns_the_other_kind() -> None:
    platform = ForgedPlatform()
    for version in (3, 5):
        with pytest.raises(QuoteRejected) as caught:
            Quote.parse(platform.quote(body=ENCLAVE, version=version))
        assert caught.value.check == "H5"
    verified = verify_quote(platform.quote(body=BODY_15), roots=[platform.trust_root], now=FORGED_AT)
    assert verified.quote.body == BODY_15
