# SPDX-License-Identifier: Apache-2.0
"""Claims about the DER reader: one encoding of each value, and nothing left over."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.tdx.der import INTEGER, OCTET_STRING, DerError, DerReader
from cloister_sim import der


@pytest.mark.parametrize(
    ("data", "value"),
    [("020100", 0), ("02017f", 127), ("02020080", 128), ("020200c8", 200), ("0201ff", -1), ("0203010000", 65536)],
)
def test_integers_are_read(data: str, value: int) -> None:
    assert DerReader(bytes.fromhex(data)).integer() == value


@pytest.mark.parametrize("data", ["0200", "02020000", "0202007f", "0202ffff", "0202ff80", "0a0100", "0201", "02"])
def test_other_encodings_of_integers_are_refused(data: str) -> None:
    with pytest.raises(DerError):
        DerReader(bytes.fromhex(data)).integer()


@pytest.mark.parametrize(
    "data",
    [
        "",
        "04",
        "0480",  # indefinite
        "048100",  # not the shortest form
        "04817f" + "00" * 127,
        "0482007f" + "00" * 127,
        "048200ff" + "00" * 255,
        "0484000000ff" + "00" * 255,
        "04820100" + "00" * 255,  # one byte short
        "0485",
        "0402aa",
        "0500",
    ],
)
def test_other_lengths_are_refused(data: str) -> None:
    with pytest.raises(DerError):
        DerReader(bytes.fromhex(data)).take(OCTET_STRING)


def test_an_element_does_not_reach_beyond_what_holds_it() -> None:
    outer = DerReader(bytes.fromhex("3003040200" + "0000"))
    with pytest.raises(DerError, match="longer"):
        outer.enter().take(OCTET_STRING)


def test_left_over_bytes_are_noticed() -> None:
    reader = DerReader(b"\x04\x00\x00")
    assert reader.take(OCTET_STRING) == b""
    assert not reader.at_end
    with pytest.raises(DerError, match="1 bytes left"):
        reader.finish()


@given(st.binary(max_size=70_000 // 4), st.integers(0, 2**64))
@settings(deadline=None)  # other processes share these cores
def test_what_the_simulator_writes_is_read(content: bytes, number: int) -> None:
    data = der.sequence(der.octets(content), der.integer(number))
    outer = DerReader(data)
    inner = outer.enter()
    outer.finish()
    assert inner.take_whole(OCTET_STRING) == der.octets(content)
    assert inner.integer(INTEGER) == number
    inner.finish()


@given(st.binary(max_size=64))
@settings(deadline=None)  # other processes share these cores
def test_random_bytes_give_der_errors_and_nothing_else(data: bytes) -> None:
    reader = DerReader(data)
    try:
        while not reader.at_end:
            reader.enter().integer()
    except DerError:
        pass


@pytest.mark.parametrize(
    ("arcs", "encoded"),
    [
        ((2, 5, 29, 15), "0603551d0f"),
        ((1, 2, 840, 113741, 1, 13, 1), "06092a864886f84d010d01"),
        ((1, 3, 128), "06032b8100"),
    ],
)
def test_object_identifiers_are_written_as_the_standard_says(arcs: tuple[int, ...], encoded: str) -> None:
    assert der.oid(arcs).hex() == encoded
