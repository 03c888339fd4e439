# SPDX-License-Identifier: Apache-2.0
"""Everything that a verdict rests on in an attacker's hands: certificates, revocation lists, signed documents, quote.

A `World` as it stands is accepted as UpToDate under its own root; each test changes one thing and signs it again.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec

from cloister.tdx.body import SgxReport, TdBody, TdBody15, TdBody15Ex
from cloister.tdx.collateral import Collateral
from cloister.tdx.verify import Verdict, verify_with_collateral
from cloister_sim import der
from fakes.forged_quotes import (
    BASIC_CONSTRAINTS,
    BODY,
    CA,
    ECDSA_SHA256,
    KEY_USAGE,
    LEAF,
    MAY_SIGN,
    NOW,
    QE_REPORT,
    ROOT,
    ForgedPlatform,
    Spec,
    name,
    pem,
    raw_signature,
)

CRL_NUMBER: Final = (2, 5, 29, 20)
SIGNER: Final = Spec(
    "Intel SGX TCB Signing", ((KEY_USAGE, True, MAY_SIGN), (BASIC_CONSTRAINTS, True, der.sequence())), serial=0x7777
)
SERIALS: Final = {"ca": 0xCA, "leaf": 0x1EAF, "signer": 0x7777}
QE: Final = replace(
    QE_REPORT, mr_signer=b"q" * 32, isv_prod_id=(2).to_bytes(2, "little"), isv_svn=(4).to_bytes(2, "little")
)
SGX_QE: Final = replace(QE, isv_prod_id=(1).to_bytes(2, "little"))
ENCLAVE: Final = replace(QE, report_data=b"r" * 64)
BODY_15: Final = TdBody15.parse(BODY.to_bytes() + bytes(64))
BODY_15_EX: Final = TdBody15Ex.parse(BODY_15.to_bytes() + bytes(237))
PLATFORM_SVNS: Final = bytes([200, *range(1, 16)])
ADVISORY: Final = "INTEL-SA-00001"


def svns(sgx: bytes = PLATFORM_SVNS, pce: int = 13, tdx: bytes = bytes(16)) -> dict[str, Any]:
    return {
        "sgxtcbcomponents": [{"svn": svn} for svn in sgx],
        "pcesvn": pce,
        "tdxtcbcomponents": [{"svn": svn} for svn in tdx],
    }


def level(tcb: dict[str, Any], status: str = "UpToDate", *advisories: str, date: str = "2026-05-13") -> dict[str, Any]:
    found = {"tcb": tcb, "tcbDate": f"{date}T00:00:00Z", "tcbStatus": status}
    return found | {"advisoryIDs": list(advisories)} if advisories else found


def module_identity(identity: str = "TDX_01", status: str = "UpToDate", svn: int = 5) -> dict[str, Any]:
    levels = [level({"isvsvn": svn}, status, "INTEL-SA-MODULE", date="2026-03-01")]
    return {"id": identity, **signer_of_module(), "tcbLevels": levels}


def signer_of_module() -> dict[str, Any]:
    return {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}


def tcb_info() -> dict[str, Any]:
    return {
        "id": "TDX",
        "version": 3,
        "issueDate": "2026-11-01T00:00:00Z",
        "nextUpdate": "2026-12-01T00:00:00Z",
        "fmspc": "00806F050000",
        "pceId": "0000",
        "tcbType": 0,
        "tcbEvaluationDataNumber": 20,
        "tdxModule": signer_of_module(),
        "tdxModuleIdentities": [module_identity()],
        "tcbLevels": [level(svns())],
    }


def qe_identity() -> dict[str, Any]:
    return {
        "id": "TD_QE",
        "version": 2,
        "issueDate": "2026-11-01T00:00:00Z",
        "nextUpdate": "2026-12-01T00:00:00Z",
        "tcbEvaluationDataNumber": 20,
        "miscselect": "00000000",
        "miscselectMask": "FFFFFFFF",
        "attributes": "11" + "00" * 15,
        "attributesMask": "FBFFFFFFFFFFFFFF" + "00" * 8,
        "mrsigner": (b"q" * 32).hex().upper(),
        "isvprodid": 2,
        "tcbLevels": [level({"isvsvn": 4}, date="2026-04-01"), level({"isvsvn": 2}, "OutOfDate", "INTEL-SA-QE")],
    }


class World:
    """A platform, its quote, and the collateral about it."""

    def __init__(self, *, root: Spec = ROOT, ca: Spec = CA, leaf: Spec = LEAF, signer: Spec = SIGNER) -> None:
        specs = {"root": root, "ca": replace(ca, serial=SERIALS["ca"]), "leaf": replace(leaf, serial=SERIALS["leaf"])}
        self.platform = ForgedPlatform(**specs)
        self.keys = self.platform.keys
        self.keys["signer"] = ec.generate_private_key(ec.SECP256R1())
        self.names = {role: spec.name for role, spec in specs.items()}
        self.signer_der = self.platform.certificate(signer, "signer", "root", root)
        self.now = NOW
        self.body: TdBody | SgxReport = BODY
        self.version: int | None = None
        self.qe = QE
        self.chain: bytes | None = None
        self.edit: Callable[[bytes], bytes] = lambda quote: quote
        self.tcb_info, self.qe_identity = copy.deepcopy(tcb_info()), copy.deepcopy(qe_identity())
        self.parts: dict[str, object] = {}  # of the collateral, instead of what would be there
        self.sign_with = {"tcb_info": "signer", "qe_identity": "signer"}
        self.text: dict[str, Callable[[bytes], bytes]] = {}  # changes of the text before it is signed
        self.revoked: dict[str, list[bytes]] = {"root": [], "ca": []}

    def crl(self, issuer: str, **change: Any) -> bytes:
        """Return the revocation list of "root" or "ca"; change any of the keyword arguments below."""
        return forged_crl(
            self.keys[change.pop("signed_by", issuer)],
            change.pop("name", self.names[issuer]),
            revoked=self.revoked[issuer],
            **change,
        )

    def collateral(self) -> Collateral:
        signer_chain = pem(self.signer_der, self.platform.root_der)
        parts: dict[str, object] = {
            "pck_crl_issuer_chain": pem(self.platform.ca_der, self.platform.root_der),
            "root_ca_crl": self.crl("root"),
            "pck_crl": self.crl("ca"),
            "tcb_info_issuer_chain": signer_chain,
            "qe_identity_issuer_chain": signer_chain,
        }
        for document, value in (("tcb_info", self.tcb_info), ("qe_identity", self.qe_identity)):
            text = self.text.get(document, lambda text: text)(json.dumps(value).encode())
            parts[document] = text
            parts[f"{document}_signature"] = raw_signature(self.keys[self.sign_with[document]], text).hex()
        return Collateral.of(parts | self.parts)

    def quote(self) -> bytes:
        return self.edit(self.platform.quote(chain=self.chain, body=self.body, version=self.version, qe_report=self.qe))

    def verify(self) -> Verdict:
        return verify_with_collateral(self.quote(), self.collateral(), roots=[self.platform.trust_root], now=self.now)

    def of_enclave(self) -> World:
        """Make it the world of an SGX enclave."""
        self.body, self.qe = ENCLAVE, SGX_QE
        self.tcb_info["id"], self.qe_identity["id"], self.qe_identity["isvprodid"] = "SGX", "QE", 1
        return self

    def of_module(self, launch: bytes = b"\5\1", current: bytes | None = None) -> World:
        """Let the TD run on a module of version 1 and up, with SVNs (minor, major)."""
        body = replace(BODY, tee_tcb_svn=launch.ljust(16, b"\0"))
        if current is None:
            self.body = body
        else:
            self.body = TdBody15.parse(body.to_bytes() + current.ljust(16, b"\0") + bytes(48))
        return self


def forged_crl(
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    *,
    revoked: list[bytes],
    start: datetime = NOW - timedelta(days=1),
    end: datetime | None = NOW + timedelta(days=30),
    number: int = 1,
    extensions: tuple[tuple[tuple[int, ...], bool, bytes], ...] = (),
    algorithm: bytes = ECDSA_SHA256,
    version: bytes = b"\2\1\1",
) -> bytes:
    """Return a revocation list (DER); `revoked` are the contents of serial numbers, canonical or not."""
    entries = [der.sequence(der.element(0x02, serial), _time(start)) for serial in revoked]
    items = [
        der.sequence(der.oid(oid), *([der.boolean(value=True)] if critical else []), der.octets(value))
        for oid, critical, value in ((CRL_NUMBER, False, der.integer(number)), *extensions)
    ]
    tbs = long_sequence(
        version,
        algorithm,
        name(issuer),
        _time(start),
        *([] if end is None else [_time(end)]),
        *([long_sequence(*entries)] if entries else []),
        der.element(0xA0, der.sequence(*items)),
    )
    r_s = key.sign(tbs, ec.ECDSA(ROOT.digest))
    return long_sequence(tbs, algorithm, der.element(0x03, b"\0" + r_s))


def long_sequence(*elements: bytes) -> bytes:
    """Return a SEQUENCE of any size; the simulator's writer ends at 65,535 bytes."""
    content = b"".join(elements)
    if len(content) < 0x10000:
        return der.sequence(content)
    return b"\x30\x83" + len(content).to_bytes(3, "big") + content


def serial(number: int) -> bytes:
    """Return the contents of an INTEGER."""
    return number.to_bytes(number.bit_length() // 8 + 1, "big")


def _time(moment: datetime) -> bytes:
    return der.element(0x17, moment.strftime("%y%m%d%H%M%SZ").encode())
