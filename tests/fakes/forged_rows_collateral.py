# SPDX-License-Identifier: Apache-2.0
"""Rows R1 to R6, T1 to T12, Q1 to Q8 and M3."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, Final

from fakes.forged_collateral import QE, SERIALS, SIGNER, World, level, module_identity, serial, svns
from fakes.forged_quotes import BASIC_CONSTRAINTS, BODY, CA, NOW, ROOT, UNKNOWN, ca_constraints, pem
from fakes.forged_rows import Case, assign, part, text

SECOND: Final = timedelta(seconds=1)
CRLS: Final = (("R1", "root_ca_crl", "root"), ("R2", "pck_crl", "ca"))
DOCUMENTS: Final = (("T1", "T2", "tcb_info"), ("Q1", "Q1", "qe_identity"))
UNKNOWN_CRITICAL: Final = ((UNKNOWN, True, b"\5\0"),)


def _crl(part_name: str, issuer: str, /, **change: Any) -> Callable[[World], None]:
    return part(part_name, lambda w: w.crl(issuer, **change))


def _revoke(issuer: str, *serials: bytes) -> Callable[[World], None]:
    return lambda w: w.revoked.update({issuer: list(serials)})


def _as_is(world: World) -> None:
    """Leave all but the certificates as they are."""


def _both(*changes: Callable[[World], object]) -> Callable[[World], None]:
    def change(world: World) -> None:
        for each in changes:
            each(world)

    return change


def _signer(document: str, chain: Callable[[World], bytes], key: str) -> Callable[[World], None]:
    """Let another key sign a document, and another chain vouch for it."""
    return _both(part(f"{document}_issuer_chain", chain), lambda w: w.sign_with.update({document: key}))


LISTS: Final = [
    *(
        Case(row, f"{name} {what}", _crl(name, issuer, **change))
        for row, name, issuer in CRLS
        for what, change in (
            ("expired", {"end": NOW - SECOND, "start": NOW - timedelta(days=9)}),
            ("of the future", {"start": NOW + SECOND}),
            ("of an evil key", {"signed_by": "stranger"}),
            ("of another issuer", {"name": "Intel SGX PCK Processor CA"}),
            ("with an unknown critical extension", {"extensions": UNKNOWN_CRITICAL}),
            ("without nextUpdate", {"end": None}),
            ("of another algorithm", {"algorithm": bytes.fromhex("300a06082a8648ce3d040303")}),
        )
    ),
    Case("R1", "the other list", part("root_ca_crl", lambda w: w.crl("ca"))),
    Case("R2", "the other list", part("pck_crl", lambda w: w.crl("root"))),
    Case("R2", "signed by the root", _crl("pck_crl", "ca", signed_by="root")),
    Case("R2", "of another CA with its own chain", lambda w: _other_ca(w)),
    Case("R2", "a chain without a root", part("pck_crl_issuer_chain", lambda w: pem(w.platform.ca_der))),
    Case("R3", "the CA is revoked", _revoke("root", serial(SERIALS["ca"]))),
    Case("R4", "the leaf is revoked", _revoke("ca", serial(SERIALS["leaf"]))),
    Case(
        "R4",
        "the leaf is the last of 10000",
        lambda w: _revoke("ca", *map(serial, range(5000, 15000)), serial(SERIALS["leaf"]))(w),
    ),
    Case("R5", "the TCB signer is revoked", _revoke("root", serial(SERIALS["signer"]))),
    *(
        Case("R6", f"{name} {what}", part(name, make))
        for name in ("root_ca_crl", "pck_crl")
        for what, make in (
            ("absent", lambda w: b""),
            ("of another type", lambda w: 5),
            ("zeros", lambda w: bytes(200)),
            ("hex zeros", lambda w: "00" * 200),
            ("odd hex", lambda w: "308"),
            ("PEM of nothing", lambda w: "-----BEGIN X509 CRL-----\n-----END X509 CRL-----\n"),
        )
    ),
    Case("R6", "cut", part("pck_crl", lambda w: w.crl("ca")[:-1])),
    Case("R6", "with a tail", part("pck_crl", lambda w: w.crl("ca") + b"\0")),
    Case("R6", "of version 1", _crl("root_ca_crl", "root", version=b"\2\1\0")),
    Case("R6", "a serial that is not canonical", _revoke("ca", b"\0" + serial(SERIALS["leaf"]))),
]


def _other_ca(world: World) -> None:
    """A genuine list, of the CA beside."""
    world.keys["other"] = world.keys["stranger"]
    other = replace(CA, name="Intel SGX PCK Processor CA")
    world.names["other"], world.revoked["other"] = other.name, []
    certificate = world.platform.certificate(other, "other", "root", ROOT)
    world.parts["pck_crl_issuer_chain"] = pem(certificate, world.platform.root_der)
    world.parts["pck_crl"] = world.crl("other")


def _signed_by_leaf(world: World) -> bytes:
    return pem(world.platform.leaf_der, world.platform.root_der)


def _longer(world: World) -> bytes:
    return pem(world.signer_der, world.platform.ca_der, world.platform.root_der)


def _evil(world: World) -> bytes:
    evil = World()
    return pem(evil.signer_der, evil.platform.root_der)


SIGNERS: Final = [
    *(
        Case(chain_row, f"{document} {what}", _signer(document, chain, key))
        for chain_row, _, document in DOCUMENTS
        for what, chain, key in (
            ("signed by the PCK leaf", _signed_by_leaf, "leaf"),
            ("signed by the PCK CA", lambda w: pem(w.platform.ca_der, w.platform.root_der), "ca"),
            ("signed by the root", lambda w: pem(w.platform.root_der, w.platform.root_der), "root"),
            ("with a chain of three", _longer, "signer"),
            ("with no root", lambda w: pem(w.signer_der), "signer"),
            ("with an evil PKI", _evil, "signer"),
            ("with no chain", lambda w: b"", "signer"),
        )
    ),
    *(
        Case("T1", what, _as_is, {"signer": spec})
        for what, spec in (
            ("an expired signer", replace(SIGNER, not_after=NOW - SECOND)),
            ("a signer of the future", replace(SIGNER, not_before=NOW + SECOND)),
            ("a signer of another name", replace(SIGNER, name="Intel SGX PCK Certificate")),
            ("a signer that is a CA", SIGNER.changed(BASIC_CONSTRAINTS, ca_constraints(0))),
            ("a signer that names another issuer", replace(SIGNER, issuer="Intel SGX PCK Platform CA")),
        )
    ),
    *(
        Case(text_row, f"{document} {what}", change)
        for _, text_row, document in DOCUMENTS
        for what, change in (
            ("with a changed byte", part(document, lambda w, d=document: _unsigned(w, d, b'"2', b'"3'))),
            ("with other whitespace", part(document, lambda w, d=document: _unsigned(w, d, b", ", b","))),
            ("signed in DER", part(f"{document}_signature", lambda w: "30" * 70)),
            ("with a signature of zeros", part(f"{document}_signature", lambda w: "00" * 64)),
            ("with no signature", part(f"{document}_signature", lambda w: "")),
            ("signed by a stranger", lambda w, d=document: w.sign_with.update({d: "stranger"})),
            ("with a member twice", text(document, lambda t: t[:-1] + b', "version": 3}')),
            ("with NaN", text(document, lambda t: t[:-1] + b', "more": NaN}')),
            ("with a fraction", text(document, lambda t: t[:-1] + b', "more": 1.0}')),
            ("with a byte-order mark", text(document, lambda t: b"\xef\xbb\xbf" + t)),
            ("in UTF-16", text(document, lambda t: t.decode().encode("utf-16"))),
            ("20000 deep", text(document, lambda t: t[:-1] + b', "more": ' + b"[" * 20_000 + b"]" * 20_000 + b"}")),
            ("that is a list", text(document, lambda t: b"[" + t + b"]")),
            ("empty", text(document, lambda t: b" ")),
        )
    ),
]


def _unsigned(world: World, document: str, old: bytes, new: bytes) -> bytes:
    return json.dumps(getattr(world, document)).encode().replace(old, new, 1)


def _levels(*levels: dict[str, Any]) -> Callable[[World], None]:
    return lambda w: w.tcb_info.update(tcbLevels=list(levels))


def _module(**change: Any) -> Callable[[World], None]:
    return lambda w: w.of_module().tcb_info.update(tdxModuleIdentities=[module_identity() | change])


def _components(name: str, value: Any) -> Callable[[World], None]:
    return _levels(level(svns() | {name: value}))


def _svn(value: Any) -> list[dict[str, Any]]:
    return [{"svn": value}] + [{"svn": 0}] * 15


def _times(document: str, start: str, end: str) -> Callable[[World], None]:
    return assign(document, issueDate=start, nextUpdate=end)


OTHER_SIGNER: Final = (b"s" * 48).hex()
TIMES: Final = (
    ("expired", "2026-10-01T00:00:00Z", "2026-11-22T11:59:59Z"),
    ("of the future", "2026-11-22T12:00:01Z", "2026-12-22T00:00:00Z"),
    ("that ends before it begins", "2026-12-01T00:00:00Z", "2026-11-01T00:00:00Z"),
    ("of no time", "yesterday", "tomorrow"),
    ("of no zone", "2026-11-01T00:00:00", "2026-12-01T00:00:00"),
    ("of a thirteenth month", "2026-13-01T00:00:00Z", "2026-12-01T00:00:00Z"),
)
TCB: Final = [
    *(Case("T3", f"id {value!r}", assign("tcb_info", id=value)) for value in ("SGX", "tdx", "QE", "", 3, None)),
    Case("T3", "a document about TDX for an enclave", lambda w: w.of_enclave().tcb_info.update(id="TDX")),
    *(Case("T3", f"version {value!r}", assign("tcb_info", version=value)) for value in (0, 1, 2, 4, 255, "3", True)),
    Case("T3", "bodies swapped", lambda w: assign("", tcb_info=w.qe_identity, qe_identity=w.tcb_info)(w)),
    *(Case("T4", f"TCB type {value!r}", assign("tcb_info", tcbType=value)) for value in (1, -1, "0", None)),
    *(
        Case("T5", f"FMSPC {value!r}", assign("tcb_info", fmspc=value))
        for value in ("00806f050001", "00806f05", "00806f05000g", "", 0)
    ),
    *(Case("T6", f"PCE {value!r}", assign("tcb_info", pceId=value)) for value in ("0001", "00", None)),
    *(Case("T7", what, _times("tcb_info", start, end)) for what, start, end in TIMES),
    Case("T8", "another signer", assign("", body=replace(BODY, mr_signer_seam=b"s" * 48))),
    Case("T8", "attributes", assign("", body=replace(BODY, seam_attributes=b"\1" + bytes(7)))),
    Case(
        "T8",
        "attributes masked out",
        _both(
            assign("", body=replace(BODY, seam_attributes=b"\1" + bytes(7))),
            lambda w: w.tcb_info["tdxModule"].update(attributesMask="00" * 8),
        ),
    ),
    Case("T8", "no module", lambda w: w.tcb_info.pop("tdxModule")),
    Case("T8", "a short signer", lambda w: w.tcb_info["tdxModule"].update(mrsigner="00" * 47)),
    Case("T9", "another signer of the module", _module(mrsigner=OTHER_SIGNER)),
    Case(
        "T9",
        "its signer is not tdxModule's",
        lambda w: _both(_module(mrsigner=OTHER_SIGNER), lambda w: w.tcb_info["tdxModule"].update(mrsigner="00" * 48))(
            w
        ),
    ),
    Case("T9", "an unknown module", _module(id="TDX_03")),
    Case("T9", "no modules", lambda w: w.of_module().tcb_info.pop("tdxModuleIdentities")),
    Case("T9", "an id that is none", _module(id="TDX-01")),
    Case(
        "T9",
        "a module twice",
        lambda w: w.of_module().tcb_info.update(
            tdxModuleIdentities=[module_identity("TDX_0a"), module_identity("TDX_0A")]
        ),
    ),
    *(
        Case(
            "T10",
            f"below component {n}",
            _levels(
                level(
                    svns(
                        sgx=bytes([200, *range(1, 16)])[:n]
                        + bytes([n + 1 if n else 201])
                        + bytes([200, *range(1, 16)])[n + 1 :]
                    )
                )
            ),
        )
        for n in range(16)
    ),
    *(
        Case("T10", f"below TDX component {n}", _levels(level(svns(tdx=bytes(n) + b"\1" + bytes(15 - n)))))
        for n in range(16)
    ),
    Case("T10", "below PCESVN", _levels(level(svns(pce=14)))),
    Case("T10", "no levels", _levels()),
    *(
        Case("T10", f"svn {value!r}", _components("sgxtcbcomponents", _svn(value)))
        for value in (256, -1, "4", None, True)
    ),
    Case("T10", "15 components", _components("sgxtcbcomponents", _svn(0)[:15])),
    Case("T10", "17 components", _components("sgxtcbcomponents", [*_svn(0), {"svn": 0}])),
    Case("T10", "no TDX components", lambda w: w.tcb_info["tcbLevels"][0]["tcb"].pop("tdxtcbcomponents")),
    Case("T10", "PCESVN 65536", _levels(level(svns(pce=65_536)))),
    Case("T10", "a level that says two things", _levels(level(svns()), level(svns(), "OutOfDate"))),
    Case("T10", "300 levels", _levels(*[level(svns())] * 300)),
    Case("T11", "one SVN below the module's levels", lambda w: w.of_module(b"\4\1")),
    Case("T11", "a level that is no number", _module(tcbLevels=[level({"isvsvn": "5"})])),
    *(
        Case("T12", f"status {value!r}", _levels(level(svns(), value)))
        for value in ("", "uptodate", "Good", "TDRelaunchAdvised", 1)
    ),
    *(
        Case("T12", f"module status {value!r}", _module(tcbLevels=[level({"isvsvn": 5}, value)]))
        for value in ("SWHardeningNeeded", "ConfigurationNeeded", "")
    ),
    Case("T13", "an evaluation number that is none", assign("tcb_info", tcbEvaluationDataNumber="20")),
    Case("T9", "a current module that is not known", lambda w: w.of_module(current=b"\5\2")),
    Case("T11", "a current module below its levels", lambda w: w.of_module(current=b"\1\1")),
    Case("M3", "a revoked platform", _levels(level(svns(), "Revoked"))),
    Case(
        "M3",
        "a revoked module",
        lambda w: w.of_module().tcb_info.update(tdxModuleIdentities=[module_identity(status="Revoked")]),
    ),
    Case(
        "M3", "a revoked quoting enclave", lambda w: w.qe_identity.update(tcbLevels=[level({"isvsvn": 4}, "Revoked")])
    ),
]


def _qe(**change: bytes) -> Callable[[World], None]:
    return assign("", qe=replace(QE, **change))


QE_ROWS: Final = [
    *(Case("Q2", f"id {value!r}", assign("qe_identity", id=value)) for value in ("QE", "QVE", "td_qe", None)),
    *(Case("Q2", f"version {value!r}", assign("qe_identity", version=value)) for value in (0, 1, 3, 4, 99, "2")),
    *(Case("Q3", what, _times("qe_identity", start, end)) for what, start, end in TIMES),
    Case("Q4", "another signer", _qe(mr_signer=b"x" * 32)),
    Case("Q4", "a short signer", assign("qe_identity", mrsigner="00" * 31)),
    Case("Q4", "a signer in odd hex", assign("qe_identity", mrsigner="0" * 63)),
    Case("Q5", "another product", _qe(isv_prod_id=b"\1\0")),
    Case("Q5", "product 65538", assign("qe_identity", isvprodid=65_538)),
    Case("Q6", "MISCSELECT", _qe(misc_select=b"\0\0\0\1")),
    Case("Q6", "a mask that is none", assign("qe_identity", miscselectMask="FFFFFFF")),
    Case("Q7", "other attributes", _qe(attributes=b"\x35" + bytes(15))),
    Case("Q7", "debug", _qe(attributes=b"\x17" + bytes(15))),
    Case(
        "Q7",
        "debug that the mask hides",
        _both(_qe(attributes=b"\x17" + bytes(15)), assign("qe_identity", attributesMask="F9" + "FF" * 7 + "00" * 8)),
    ),
    Case("Q8", "below every level", _qe(isv_svn=b"\1\0")),
    Case("Q8", "no levels", assign("qe_identity", tcbLevels=[])),
    *(
        Case("Q8", f"status {value!r}", assign("qe_identity", tcbLevels=[level({"isvsvn": 4}, value)]))
        for value in ("SWHardeningNeeded", "", "UPTODATE")
    ),
    Case(
        "Q8",
        "levels that say two things",
        assign("qe_identity", tcbLevels=[level({"isvsvn": 4}), level({"isvsvn": 4}, "OutOfDate")]),
    ),
]
CASES: Final = [*LISTS, *SIGNERS, *TCB, *QE_ROWS]
