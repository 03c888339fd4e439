# SPDX-License-Identifier: Apache-2.0
"""Rows H1 to H9, D1 to D4, P1 to P8, E1 to E4, X1 and X2."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister_sim import der
from fakes.forged_collateral import BODY_15, QE, World
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
    sgx_member,
    sgx_members,
    sgx_tcb,
)
from fakes.forged_rows import Case, added, assign, edited, flipped, part, patched, u16, u32

INNER: Final = 1220  # of a version 4 quote without authentication data: type of the PCK chain
ORDER: Final = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SECOND: Final = timedelta(seconds=1)
_v5 = assign("", body=BODY_15)


def _sgx(world: World) -> None:
    world.of_enclave()


def _chain(*which: int, junk: bytes = b"") -> Callable[[World], None]:
    return lambda w: setattr(w, "chain", pem(*(w.platform.chain[n] for n in which)) + junk)


def _evil(world: World) -> None:
    """A whole PKI of Intel's names, in front of the real root."""
    evil = ForgedPlatform()
    world.chain = pem(evil.leaf_der, evil.ca_der, world.platform.root_der)


def _leaf(**members: bytes) -> dict[str, Spec]:
    return {"leaf": LEAF.changed(SGX, sgx_extension(sgx_members() | members))}


def _named(world: World) -> bytes:
    point = world.platform.attestation_key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return hashlib.sha256(point[1:]).digest()


def _report_data(world: World, data: bytes) -> None:
    """Let the QE report carry this."""
    world.edit = lambda _: world.platform.quote(qe_report=QE, qe_report_data=data)


def _attackers_key(world: World) -> None:
    attacker = ec.generate_private_key(ec.SECP256R1())
    genuine = _named(world) + bytes(32)
    world.edit = lambda _: world.platform.quote(qe_report=QE, qe_report_data=genuine, attestation_key=attacker)


def _as_is(world: World) -> None:
    """Leave all but the certificates as they are."""


HEADER: Final = [
    Case("H1", "empty", edited(lambda quote: b"")),
    Case("H1", "one byte short of a body", edited(lambda quote: quote[:635])),
    Case("H1", "version 5 cut in its body", edited(lambda quote: quote[:700], prepare=_v5)),
    Case("H1", "a megabyte of zeros", edited(lambda quote: bytes(1 << 20))),
    Case("H1", "a megabyte of certificates", assign("", chain=b"A" * (1 << 20))),
    *(Case("H2", f"version {v:#x}", edited(u16(0, v))) for v in (0, 1, 2, 6, 0x0400, 0xFFFF)),
    *(Case("H3", f"key type {kind}", edited(u16(2, kind))) for kind in (0, 1, 3, 4)),
    *(Case("H4", f"TEE {tee:#x}", edited(u32(4, tee))) for tee in (1, 0x80, 0x82, 0x81000000)),
    Case("H5", "SGX on a TD body", edited(u32(4, 0))),
    Case("H5", "version 3 of a TD", edited(u16(0, 3))),
    Case("H5", "version 4 of an enclave", edited(u16(0, 4), prepare=_sgx)),
    Case("H5", "version 5 SGX with a TD body", edited(u32(4, 0), prepare=_v5)),
    Case(
        "H5",
        "version 5 TDX with an SGX body",
        edited(u32(4, 0x81), prepare=lambda w: assign("", version=5)(w.of_enclave())),
    ),
    Case("H6", "a flipped bit in the vendor", edited(flipped(12))),
    Case("H6", "no vendor", edited(patched(12, bytes(16)))),
    *(Case("H7", f"body type {kind}", edited(u16(48, kind), prepare=_v5)) for kind in (0, 5, 0xFFFF)),
    *(Case("H7", f"body size {size}", edited(u32(50, size), prepare=_v5)) for size in (647, 649, 584, 2**31)),
    Case("H7", "body type 2 with the size of 3", edited(u16(48, 2), prepare=_v5)),
    *(Case("H8", f"signature size {size}", edited(u32(632, size))) for size in (0xFFFF, 2**31, 2**32 - 1)),
    Case("H8", "a tail", edited(lambda quote: quote + b"A" * 64)),
    Case("H8", "two quotes", edited(lambda quote: quote + quote)),
    Case("H8", "one byte short", edited(lambda quote: quote[:-1])),
    Case(
        "H9", "reserved bytes signed", lambda w: setattr(w, "edit", lambda q: w.platform.resigned(patched(8, b"\1")(q)))
    ),
    *(Case("D1", f"outer type {kind}", edited(u16(764, kind))) for kind in (0, 1, 5, 7, 0xFFFF)),
    *(Case("D2", f"inner type {kind}", edited(u16(INNER, kind))) for kind in (1, 2, 3, 4, 6, 7)),
    Case(
        "D3",
        "signature size 0",
        edited(lambda q: u32(632, 0)(q[:636])),
    ),
    *(Case("D3", f"chain size {n:+}", edited(added(INNER + 2, n))) for n in (-1, 1, 65_536)),
    *(Case("D3", f"outer size {n:+}", edited(added(766, n))) for n in (-1, 1)),
    Case("D4", "65535 bytes of authentication data", edited(u16(1218, 0xFFFF))),
    Case("D4", "1025 bytes of authentication data", edited(u16(1218, 1025))),
]

CHAIN: Final = [
    Case("P1", "no chain", assign("", chain=b"")),
    Case("P1", "leaf twice", _chain(0, 0, 1, 2)),
    Case("P1", "no root", _chain(0, 1)),
    Case("P1", "50 intermediates", _chain(0, *[1] * 50, 2)),
    Case("H1", "200 intermediates", _chain(0, *[1] * 200, 2)),
    Case("P1", "junk behind", _chain(0, 1, 2, junk=b"junk")),
    Case("P1", "another label", lambda w: setattr(w, "chain", pem(*w.platform.chain, label="X509 CRL"))),
    Case("P1", "trailing DER", lambda w: setattr(w, "chain", pem(w.platform.leaf_der + b"\0", *w.platform.chain[1:]))),
    Case("P2", "a PKI of Intel's names", lambda w: setattr(w, "chain", pem(*ForgedPlatform().chain))),
    Case(
        "P2",
        "another edition of the root",
        lambda w: setattr(
            w, "chain", pem(*w.platform.chain[:2], w.platform.certificate(replace(ROOT, serial=9), "root"))
        ),
    ),
    Case("P3", "an evil chain and the real root", _evil),
    Case("P3", "leaf of P-384", _as_is, {"leaf": replace(LEAF, curve=ec.SECP384R1())}),
    Case("P3", "leaf of secp256k1", _as_is, {"leaf": replace(LEAF, curve=ec.SECP256K1())}),
    Case(
        "P3",
        "SHA-384",
        _as_is,
        {"leaf": replace(LEAF, inner_algorithm=ECDSA_SHA384, outer_algorithm=ECDSA_SHA384, digest=SHA384())},
    ),
    Case("P3", "algorithms differ", _as_is, {"leaf": replace(LEAF, inner_algorithm=ECDSA_SHA384)}),
    Case("P3", "signed by a stranger", _as_is, {"leaf": replace(LEAF, signed_by="stranger")}),
    Case("P4", "CA that is none", _as_is, {"ca": CA.changed(BASIC_CONSTRAINTS, der.sequence())}),
    Case("P4", "CA that may not sign certificates", _as_is, {"ca": CA.changed(KEY_USAGE, MAY_SIGN)}),
    Case("P4", "CA that may not sign lists", _as_is, {"ca": CA.changed(KEY_USAGE, bytes.fromhex("03020204"))}),
    Case("P4", "leaf that is a CA", _as_is, {"leaf": LEAF.changed(BASIC_CONSTRAINTS, ca_constraints(None))}),
    Case("P4", "leaf that signs certificates", _as_is, {"leaf": LEAF.changed(KEY_USAGE, MAY_ISSUE)}),
    Case("P5", "leaf of another name", _as_is, {"leaf": replace(LEAF, name="Intel SGX TCB Signing")}),
    Case("P5", "CA of another name", _as_is, {"ca": replace(CA, name="Intel SGX PCK Server CA")}),
    Case("P5", "leaf that names the root as issuer", _as_is, {"leaf": replace(LEAF, issuer=ROOT.name)}),
    Case("P6", "leaf expired", _as_is, {"leaf": replace(LEAF, not_after=NOW - SECOND)}),
    Case(
        "P6",
        "CA not yet valid",
        _as_is,
        {"ca": replace(CA, not_before=NOW + SECOND)},
    ),
    Case("P6", "root expired", _as_is, {"root": replace(ROOT, not_after=NOW - SECOND)}),
    Case("P7", "no SGX extension", _as_is, {"leaf": LEAF.without(SGX)}),
    Case("P7", "FMSPC twice", _as_is, _leaf(again=sgx_members()["fmspc"])),
    Case("P7", "TCB twice", _as_is, _leaf(again=sgx_members()["tcb"])),
    Case("P7", "15 bytes of PPID", _as_is, _leaf(ppid=sgx_member((1,), der.octets(bytes(15))))),
    Case("P7", "component 256", _as_is, _leaf(tcb=sgx_member((2,), sgx_tcb(components=[der.integer(256)] * 16)))),
    Case("P7", "component -1", _as_is, _leaf(tcb=sgx_member((2,), sgx_tcb(components=[b"\2\1\xff"] * 16)))),
    Case("P7", "15 components", _as_is, _leaf(tcb=sgx_member((2,), sgx_tcb(components=[der.integer(1)] * 15)))),
    Case("P7", "PCESVN 65536", _as_is, _leaf(tcb=sgx_member((2,), sgx_tcb(pce_svn=der.integer(65_536))))),
    Case(
        "P7",
        "components that are not CPUSVN",
        _as_is,
        _leaf(tcb=sgx_member((2,), sgx_tcb(cpu_svn=der.octets(bytes(16))))),
    ),
    Case("P7", "trailing bytes", _as_is, {"leaf": LEAF.changed(SGX, sgx_extension() + b"\0")}),
    Case(
        "P8",
        "unknown critical extension",
        _as_is,
        {"leaf": LEAF.with_extension(UNKNOWN, b"\5\0", critical=True)},
    ),
    Case(
        "P8",
        "duplicate extension",
        _as_is,
        {"ca": CA.with_extension(UNKNOWN, b"\5\0").with_extension(UNKNOWN, b"\5\0")},
    ),
]

SIGNATURES: Final = [
    *(
        Case("E1", f"QE report byte {n} flipped", edited(flipped(770 + n)))
        for n in (0, 16, 20, 48, 64, 96, 128, 256, 258, 260, 320, 383)
    ),
    Case("E1", "QE report of another platform", edited(lambda q: patched(770, World().quote()[770:1218])(q))),
    Case("E2", "another key under a genuine QE report", _attackers_key),
    Case("E2", "the hash in the second half", lambda w: _report_data(w, bytes(32) + _named(w))),
    Case("E2", "something behind the hash", lambda w: _report_data(w, _named(w) + bytes(31) + b"\1")),
    *(
        Case("E3", f"byte {n} flipped", edited(flipped(n)))
        for n in (28, 48, 64, 112, 168, 176, 184, 232, 280, 328, 472, 520)
    ),
    *(Case("E3", f"version 5, byte {n} flipped", edited(flipped(n), prepare=_v5)) for n in (54, 174, 638, 654)),
    Case("E3", "version 3, QE SVN flipped", edited(flipped(8), prepare=_sgx)),
    Case("E3", "version 5 as version 4", edited(lambda q: b"\4\0" + q[2:48] + q[54:], prepare=assign("", version=5))),
    Case("E3", "the signature of another quote", edited(lambda q: patched(636, World().quote()[636:700])(q))),
    *(
        Case("E4", f"{what} of the {where}", edited(patched(offset, value.to_bytes(32, "big"))))
        for where, offset in (("quote", 636), ("QE report", 1154))
        for what, value in (("r 0", 0), ("r n", ORDER), ("r all ones", 2**256 - 1))
    ),
    Case("E4", "s 0", edited(patched(668, bytes(32)))),
    Case("E4", "key 0", edited(patched(700, bytes(64)))),
    Case("E4", "key off the curve", edited(flipped(763))),
    Case("E4", "coordinate p", edited(patched(700, b"\xff" * 32))),
]


LIMITS: Final = [
    *(
        Case("X1", f"{now:%Y}", assign("", now=now))
        for now in (
            datetime(1970, 1, 1, tzinfo=UTC),
            datetime(2017, 12, 31, tzinfo=UTC),
            datetime(2100, 1, 1, tzinfo=UTC),
        )
    ),
    Case("X1", "no time zone", assign("", now=datetime(2026, 11, 22))),
    Case("X2", "8 MB of PCK CRL", part("pck_crl", lambda w: "00" * (4 << 20))),
    Case("X2", "2 MB of TCB info", part("tcb_info", lambda w: b" " * (2 << 20))),
    Case("X2", "200 signers", part("tcb_info_issuer_chain", lambda w: pem(*[w.signer_der] * 200))),
]
CASES: Final = [*HEADER, *CHAIN, *SIGNATURES, *LIMITS]
