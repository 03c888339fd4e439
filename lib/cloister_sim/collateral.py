# SPDX-License-Identifier: Apache-2.0
"""What Intel would publish about the simulated platform: TCB info, enclave identity and revocation lists.

In the real formats (PCS API, version 4), signed by a TCB signer under the development root.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

from cloister.tdx.body import SgxReport, TdBody
from cloister.tdx.collateral import Collateral
from cloister.tdx.pckextension import SGX_EXTENSION_OID, PckExtension
from cloister_sim import pki
from cloister_sim.store import PlatformKeys

EVALUATION_NUMBER: Final = 20
LIFE: Final = timedelta(days=30)  # as Intel's
_TCB_DATE: Final = "2026-05-13T00:00:00Z"
_ALL: Final = "FF"
_ATTRIBUTES_MASK: Final = bytes.fromhex("fbffffffffffffff0000000000000000")  # as Intel's: all flags but MODE64BIT
_EPOCH: Final = datetime.fromisoformat("2020-01-01T00:00:00Z")


def make_collateral(
    keys: PlatformKeys, signing_key: ec.EllipticCurvePrivateKey, qe: SgxReport, td: TdBody | None, now: datetime
) -> Collateral:
    """Return collateral issued at `now`, by which this platform, module and quoting enclave are up to date.

    It is about TDX with this TD's module, or without one about SGX.
    """
    now = now.replace(microsecond=0)
    extension = keys.pck.extensions.get_extension_for_oid(SGX_EXTENSION_OID).value
    pck = PckExtension.parse(extension.public_bytes())
    signer = pki.make_tcb_signer(signing_key, keys.root, keys.root_key, now)
    chain = pki.to_pem(signer, keys.root)
    # Increases with time, as a CRL number must.
    number = int((now - _EPOCH).total_seconds())
    identity = qe_identity_of(qe, now) | ({"id": "QE"} if td is None else {})
    tcb_info, qe_identity = _text(tcb_info_of(pck, td, now)), _text(identity)
    return Collateral(
        pck_crl_issuer_chain=pki.to_pem(keys.ca, keys.root),
        root_ca_crl=pki.make_crl(keys.root, keys.root_key, now, life=LIFE, number=number),
        pck_crl=pki.make_crl(keys.ca, keys.ca_key, now, life=LIFE, number=number),
        tcb_info_issuer_chain=chain,
        tcb_info=tcb_info,
        tcb_info_signature=_signature(signing_key, tcb_info),
        qe_identity_issuer_chain=chain,
        qe_identity=qe_identity,
        qe_identity_signature=_signature(signing_key, qe_identity),
    )


def tcb_info_of(pck: PckExtension, td: TdBody | None, now: datetime) -> dict[str, Any]:
    """Return TCB info 3 about TDX, or SGX, with two levels: what the platform has, and anything below."""
    return {
        "id": "SGX" if td is None else "TDX",
        "version": 3,
        "issueDate": _rfc3339(now),
        "nextUpdate": _rfc3339(now + LIFE),
        "fmspc": pck.fmspc.hex().upper(),
        "pceId": pck.pce_id.hex().upper(),
        "tcbType": 0,
        "tcbEvaluationDataNumber": EVALUATION_NUMBER,
        **({} if td is None else _module_of(td)),
        "tcbLevels": [
            _level(pck.tcb_components, pck.pce_svn, None if td is None else td.tee_tcb_svn, "UpToDate"),
            _level(bytes(16), 0, None if td is None else bytes(16), "OutOfDate"),
        ],
    }


def _module_of(td: TdBody) -> dict[str, Any]:
    module = {"mrsigner": td.mr_signer_seam.hex().upper(), "attributes": "00" * 8, "attributesMask": _ALL * 8}
    minor, major = td.tee_tcb_svn[:2]
    identity = {"id": f"TDX_{major:02X}", **module, "tcbLevels": [_svn_level(minor), _out_of_date(0)]}
    return {"tdxModule": module, "tdxModuleIdentities": [identity]}


def qe_identity_of(qe: SgxReport, now: datetime) -> dict[str, Any]:
    """Return enclave identity 2 of the quoting enclave that made this report."""
    svn = int.from_bytes(qe.isv_svn, "little")
    return {
        "id": "TD_QE",
        "version": 2,
        "issueDate": _rfc3339(now),
        "nextUpdate": _rfc3339(now + LIFE),
        "tcbEvaluationDataNumber": EVALUATION_NUMBER,
        "miscselect": qe.misc_select.hex().upper(),
        "miscselectMask": _ALL * 4,
        "attributes": bytes(a & b for a, b in zip(qe.attributes, _ATTRIBUTES_MASK, strict=True)).hex().upper(),
        "attributesMask": _ATTRIBUTES_MASK.hex().upper(),
        "mrsigner": qe.mr_signer.hex().upper(),
        "isvprodid": int.from_bytes(qe.isv_prod_id, "little"),
        "tcbLevels": [_svn_level(svn), _out_of_date(0)],
    }


def _level(sgx: bytes, pce_svn: int, tdx: bytes | None, status: str) -> dict[str, Any]:
    tcb: dict[str, Any] = {"sgxtcbcomponents": [{"svn": svn} for svn in sgx], "pcesvn": pce_svn}
    if tdx is not None:
        tcb["tdxtcbcomponents"] = [{"svn": svn} for svn in tdx]
    return {"tcb": tcb, "tcbDate": _TCB_DATE, "tcbStatus": status}


def _svn_level(svn: int) -> dict[str, Any]:
    return {"tcb": {"isvsvn": svn}, "tcbDate": _TCB_DATE, "tcbStatus": "UpToDate"}


def _out_of_date(svn: int) -> dict[str, Any]:
    return {"tcb": {"isvsvn": svn}, "tcbDate": "2024-01-01T00:00:00Z", "tcbStatus": "OutOfDate"}


def _text(document: dict[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _signature(key: ec.EllipticCurvePrivateKey, text: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(text, ec.ECDSA(SHA256())))
    return f"{r:064x}{s:064x}".encode()


def _rfc3339(moment: datetime) -> str:
    return f"{moment:%Y-%m-%dT%H:%M:%SZ}"
