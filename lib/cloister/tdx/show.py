# SPDX-License-Identifier: Apache-2.0
"""A quote's fields in words, for `cloister quote show`. Nothing shown here is verified."""

from __future__ import annotations

from typing import Final

from cloister.tdx.body import SgxReport, TdBody, TdBody15, TdBody15Ex
from cloister.tdx.quote import AnyQuote, QeReport, Quote
from cloister.tdx.reportdata import TAIL

# Intel TDX Module ABI, "TD attributes".
_TD_ATTRIBUTES: Final = {
    0: "DEBUG",
    4: "HGS_PLUS_PROF",
    5: "PERF_PROF",
    6: "PMT_PROF",
    16: "ICSSD",
    17: "SERVTD_EXT",
    27: "LASS",
    28: "SEPT_VE_DISABLE",
    29: "MIGRATABLE",
    30: "PKS",
    31: "KL",
    63: "PERFMON",
}

_OWN_FIELDS: Final = {
    TdBody15: ("tee_tcb_svn2", "mr_service_td"),
    TdBody15Ex: (
        "vm_id",
        "td_id",
        "device_info",
        "initial_service_td_hash",
        "initial_service_td_attributes",
        "initial_cpu_svn",
        "initial_tee_tcb_svn",
        "initial_tee_fmspc",
        "current_service_td_hash",
        "current_service_td_attributes",
    ),
}


def describe(quote: AnyQuote) -> list[tuple[str, str, str]]:
    """Return (section, field, value) in the order of the quote."""
    signature = quote.signature
    header = [
        ("version", str(quote.version)),
        ("attestation key type", f"{quote.att_key_type} (ECDSA P-256)"),
        ("TEE type", f"{quote.tee_type:#x} ({'TDX' if isinstance(quote, Quote) else 'SGX'})"),
        ("QE vendor", f"{quote.qe_vendor_id.hex()} (Intel)"),
        ("user data", quote.user_data.hex()),
    ]
    if not isinstance(quote, Quote):
        header.insert(3, ("QE SVN, PCE SVN", quote.svns.hex()))
    body = ("TD", _td(quote.body)) if isinstance(quote, Quote) else ("enclave", _report(quote.body))
    signatures = [
        ("signature", signature.signature.hex()),
        ("attestation key", signature.attestation_key.hex()),
        ("QE authentication data", signature.qe_auth_data.hex() or "none"),
        ("PCK chain", f"{len(signature.pck_chain_pem):,} bytes of PEM"),
        ("trailing zeros", str(quote.trailing_zeros)),
    ]
    enclave = ("quoting enclave", _report(QeReport.parse(signature.qe_report)))
    sections = (("header", header), body, enclave, ("signature", signatures))
    return [(section, name, value) for section, rows in sections for name, value in rows]


def _td(body: TdBody) -> list[tuple[str, str]]:
    rows = [
        ("tee_tcb_svn", body.tee_tcb_svn.hex()),
        ("mr_seam", body.mr_seam.hex()),
        ("mr_signer_seam", body.mr_signer_seam.hex()),
        ("seam_attributes", body.seam_attributes.hex()),
        ("td_attributes", f"{body.td_attributes.hex()} ({_attributes(body.td_attributes)})"),
        ("xfam", body.xfam.hex()),
        ("mr_td", body.mr_td.hex()),
        ("mr_config_id", body.mr_config_id.hex()),
        ("mr_owner", body.mr_owner.hex()),
        ("mr_owner_config", body.mr_owner_config.hex()),
        *((f"rtmr{number}", rtmr.hex()) for number, rtmr in enumerate(body.rtmrs)),
        ("report_data", body.report_data.hex() + (" (of Cloister)" if body.report_data.endswith(TAIL) else "")),
    ]
    # What longer bodies add, under the names of their fields.
    longer = [name for kind in (TdBody15, TdBody15Ex) if isinstance(body, kind) for name in _OWN_FIELDS[kind]]
    return rows + [(name, getattr(body, name).hex()) for name in longer]


def _report(report: SgxReport) -> list[tuple[str, str]]:
    return [
        ("cpu_svn", report.cpu_svn.hex()),
        ("attributes", report.attributes.hex() + (" (DEBUG)" if report.debug else "")),
        ("mr_enclave", report.mr_enclave.hex()),
        ("mr_signer", report.mr_signer.hex()),
        ("isv_prod_id", str(int.from_bytes(report.isv_prod_id, "little"))),
        ("isv_svn", str(int.from_bytes(report.isv_svn, "little"))),
        ("report_data", report.report_data.hex()),
    ]


def _attributes(td_attributes: bytes) -> str:
    bits = int.from_bytes(td_attributes, "little")
    names = [_TD_ATTRIBUTES.get(bit, f"bit {bit}") for bit in range(64) if bits >> bit & 1]
    return ", ".join(names) or "none"
