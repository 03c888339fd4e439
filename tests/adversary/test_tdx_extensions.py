# SPDX-License-Identifier: Apache-2.0
"""An attacker who writes into the extensions of certificates what parsers read differently (P7, P8)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cloister.tdx.quote import QuoteRejected
from cloister.tdx.verify import VerifiedQuote, verify_quote
from cloister_sim import der
from fakes.forged_quotes import (
    BASIC_CONSTRAINTS,
    CA,
    KEY_USAGE,
    LEAF,
    NOW,
    SGX,
    UNKNOWN,
    ForgedPlatform,
    name,
    sgx_extension,
    sgx_member,
    sgx_members,
    sgx_tcb,
)


def verify(platform: ForgedPlatform) -> VerifiedQuote:
    return verify_quote(platform.quote(), roots=[platform.trust_root], now=NOW)


def rejection(platform: ForgedPlatform) -> str:
    with pytest.raises(QuoteRejected) as caught:
        verify(platform)
    assert caught.value.reason
    return caught.value.check


# P7: the SGX extension.


def leaf_with(members: dict[str, bytes]) -> ForgedPlatform:
    return ForgedPlatform(leaf=LEAF.changed(SGX, sgx_extension(members)))


def test_no_sgx_extension_is_refused() -> None:
    assert rejection(ForgedPlatform(leaf=LEAF.without(SGX))) == "P7"


@pytest.mark.parametrize("value", [b"", b"\x05\0", der.sequence(), sgx_extension() + b"\0", sgx_extension()[:-1]])
def test_an_sgx_extension_that_is_not_one_is_refused(value: bytes) -> None:
    assert rejection(ForgedPlatform(leaf=LEAF.changed(SGX, value))) == "P7"


@pytest.mark.parametrize("member", ["ppid", "tcb", "pceid", "fmspc", "type"])
def test_every_member_is_there_once(member: str) -> None:
    members = sgx_members()
    assert rejection(leaf_with(members | {"again": members[member]})) == "P7"
    assert rejection(leaf_with({"first": members[member]} | members)) == "P7"
    del members[member]
    assert rejection(leaf_with(members)) == "P7"


@pytest.mark.parametrize(
    "members",
    [
        {"ppid": sgx_member((1,), der.octets(bytes(15)))},
        {"ppid": sgx_member((1,), der.octets(bytes(17)))},
        {"ppid": sgx_member((1,), der.element(0x0C, bytes(16)))},
        {"ppid": der.sequence(der.oid((*SGX, 1)), der.octets(bytes(16)), der.octets(b""))},
        {"ppid": der.sequence(der.oid((*SGX, 1)))},
        {"pceid": sgx_member((3,), der.octets(bytes(3)))},
        {"fmspc": sgx_member((4,), der.octets(bytes(5)))},
        {"fmspc": sgx_member((4,), der.octets(bytes(7)))},
        {"type": sgx_member((5,), der.integer(1))},
        {"type": sgx_member((5,), der.enumerated(3))},
        {"type": sgx_member((5,), der.element(0x0A, b""))},
        {"instance": sgx_member((6,), der.octets(bytes(15)))},
        {"unknown": sgx_member((8,), der.octets(b""))},
        {"foreign": der.sequence(der.oid(UNKNOWN), der.octets(b""))},
        {"configuration": sgx_member((7,), der.sequence(sgx_member((7, 1), der.element(0x01, b"\x01"))))},
        {"configuration": sgx_member((7,), der.sequence(sgx_member((7, 4), der.boolean(value=True))))},
        {"configuration": sgx_member((7,), der.sequence(sgx_member((2, 1), der.boolean(value=True))))},
    ],
)
def test_a_member_of_another_size_or_type_is_refused(members: dict[str, bytes]) -> None:
    assert rejection(leaf_with(sgx_members() | members)) == "P7"


def test_a_configuration_is_read() -> None:
    flags = der.sequence(*(sgx_member((7, n), der.boolean(value=n == 1)) for n in (1, 2, 3)))
    assert verify(leaf_with(sgx_members() | {"configuration": sgx_member((7,), flags)})).simulated


INTEGERS = [der.integer(200), *(der.integer(n) for n in range(1, 16))]


@pytest.mark.parametrize(
    "tcb",
    [
        sgx_tcb(components=[der.integer(256), *INTEGERS[1:]]),
        sgx_tcb(components=[b"\x02\x01\xc8", *INTEGERS[1:]]),  # -56
        sgx_tcb(components=[b"\x02\x01\xff", *INTEGERS[1:]]),  # -1
        sgx_tcb(components=[b"\x02\x03\x00\x00\xc8", *INTEGERS[1:]]),  # not the shortest form
        sgx_tcb(components=[der.octets(b"\xc8"), *INTEGERS[1:]]),
        sgx_tcb(components=INTEGERS[:15]),
        sgx_tcb(pce_svn=der.integer(65_536)),
        sgx_tcb(pce_svn=b"\x02\x01\xff"),
        sgx_tcb(cpu_svn=der.octets(bytes(15))),
        sgx_tcb(cpu_svn=der.octets(bytes(17))),
        sgx_tcb(cpu_svn=der.octets(bytes(16))),  # not the components
        sgx_tcb() + b"\0",
        der.sequence(sgx_tcb()),
        b"",
    ],
)
def test_a_tcb_that_does_not_add_up_is_refused(tcb: bytes) -> None:
    assert rejection(leaf_with(sgx_members() | {"tcb": sgx_member((2,), tcb)})) == "P7"


def test_tcb_members_are_there_once() -> None:
    body = sgx_tcb()
    again = der.sequence(body[4:], sgx_member((2, 1), der.integer(200)))
    assert rejection(leaf_with(sgx_members() | {"tcb": sgx_member((2,), again)})) == "P7"


def test_the_largest_pce_svn_is_one() -> None:
    tcb = sgx_member((2,), sgx_tcb(pce_svn=der.integer(65_535)))
    assert verify(leaf_with(sgx_members() | {"tcb": tcb})).simulated


# P8: other extensions.


@pytest.mark.parametrize("which", ["ca", "leaf"])
def test_an_unknown_critical_extension_is_refused(which: str) -> None:
    spec = CA if which == "ca" else LEAF
    critical = spec.with_extension(UNKNOWN, b"\x05\0", critical=True)
    assert rejection(ForgedPlatform(**{which: critical})) == "P8"
    assert verify(ForgedPlatform(**{which: spec.with_extension(UNKNOWN, b"\x05\0")})).simulated


@pytest.mark.parametrize("which", ["ca", "leaf"])
@pytest.mark.parametrize("oid", [UNKNOWN, SGX, BASIC_CONSTRAINTS])
def test_a_duplicate_extension_is_refused(which: str, oid: tuple[int, ...]) -> None:
    spec = (CA if which == "ca" else LEAF).with_extension(oid, der.sequence()).with_extension(oid, der.sequence())
    assert rejection(ForgedPlatform(**{which: spec})) == "P8"


@pytest.mark.parametrize("oid", [BASIC_CONSTRAINTS, KEY_USAGE, (2, 5, 29, 17), (2, 5, 29, 31), (2, 5, 29, 35)])
def test_an_extension_that_does_not_parse_is_refused(oid: tuple[int, ...]) -> None:
    assert rejection(ForgedPlatform(leaf=LEAF.without(oid).with_extension(oid, b"\x30\x05junk"))) == "P8"


@pytest.mark.parametrize("subject", [name(LEAF.name).replace(b"Intel", b"\xff\xfe\xfd\xfcl"), der.sequence(b"\x05\0")])
def test_a_subject_that_does_not_parse_is_refused_even_when_signed(subject: bytes) -> None:
    assert rejection(ForgedPlatform(leaf=replace(LEAF, subject=subject))) == "P1"
