# SPDX-License-Identifier: Apache-2.0
"""How up to date is a platform? (rows T3, T5, T6, T8 to T11, T14, Q2, Q4 to Q8, M1 to M3)

Source: Intel's quote verification library, `Checks/EvaluateTcb.cpp` and `Checks/TDRelaunchCheck.cpp`. All numbers come
from verified certificates, a verified QE report and signed documents; nothing here is cryptographic.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final, NoReturn

from cloister.tdx.body import SgxReport, TdBody, TdBody15
from cloister.tdx.pckextension import PckExtension
from cloister.tdx.quote import AnyQuote, Quote, QuoteRejected
from cloister.tdx.tcbinfo import ModuleIdentity, QeIdentity, Standing, TcbInfo, TcbStatus

_OUT_OF_DATE: Final = {
    TcbStatus.UP_TO_DATE: TcbStatus.OUT_OF_DATE,
    TcbStatus.SW_HARDENING_NEEDED: TcbStatus.OUT_OF_DATE,
    TcbStatus.CONFIGURATION_NEEDED: TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
    TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED: TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
}
_CONFIGURATION: Final = frozenset(
    {
        TcbStatus.CONFIGURATION_NEEDED,
        TcbStatus.CONFIGURATION_AND_SW_HARDENING_NEEDED,
        TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED,
    }
)
_BEHIND: Final = frozenset({TcbStatus.OUT_OF_DATE, TcbStatus.OUT_OF_DATE_CONFIGURATION_NEEDED})
_AHEAD: Final = frozenset(_OUT_OF_DATE)


@dataclass(frozen=True, slots=True)
class TcbVerdict:
    """The standing of a platform, its TDX module and its quoting enclave together."""

    status: TcbStatus  # the launch status, unless a relaunch would better it
    launch: Standing
    current: Standing  # of the TDX module that runs now; the launch standing for all but TD 1.5

    @property
    def advisories(self) -> tuple[str, ...]:
        return self.launch.advisories

    @property
    def date(self) -> datetime:
        return self.launch.date


def evaluate_tcb(info: TcbInfo, identity: QeIdentity, pck: PckExtension, qe: SgxReport, quote: AnyQuote) -> TcbVerdict:
    """Evaluate what a verified quote and its collateral say; raise QuoteRejected unless there is a verdict."""
    body = quote.body if isinstance(quote, Quote) else None
    # T3, Q2: the documents are about this kind of TEE.
    wanted, wanted_qe = ("SGX", "QE") if body is None else ("TDX", "TD_QE")
    if info.id != wanted:
        _reject("T3", f"TCB info about {info.id} for a quote of {wanted}")
    if identity.id != wanted_qe:
        _reject("Q2", f"the identity of enclave {identity.id} for a quote of {wanted}")
    # T5, T6: and about this platform.
    if info.fmspc != pck.fmspc:
        _reject("T5", f"TCB info of FMSPC {info.fmspc.hex()} for a platform of {pck.fmspc.hex()}")
    if info.pce_id != pck.pce_id:
        _reject("T6", f"TCB info of PCE {info.pce_id.hex()} for a platform of {pck.pce_id.hex()}")
    # T8, T9: the TDX module is Intel's.
    if body is not None:
        _require_module(info, body)
    # Q4 to Q8: so is the quoting enclave.
    enclave = _enclave(identity, qe)

    # T10, T11, M1 to M3: platform and module at launch.
    launch = _standing(info, pck, body.tee_tcb_svn if body is not None else None, enclave)
    if launch.status is TcbStatus.REVOKED:
        _reject("M3", "the platform, its TDX module or its quoting enclave is revoked")
    # T14: and now, when the module can have been updated since.
    if not isinstance(body, TdBody15):
        return TcbVerdict(launch.status, launch, launch)
    current = _standing(info, pck, body.tee_tcb_svn2, enclave)
    return TcbVerdict(relaunch_status(launch.status, current.status), launch, current)


def merge_status(platform: TcbStatus, components: tuple[TcbStatus, ...]) -> TcbStatus:
    """Return a platform's status in view of its TDX module and quoting enclave (M1, M3)."""
    if TcbStatus.REVOKED in components:
        return TcbStatus.REVOKED
    if TcbStatus.OUT_OF_DATE in components:
        return _OUT_OF_DATE.get(platform, platform)
    return platform


def relaunch_status(launch: TcbStatus, current: TcbStatus) -> TcbStatus:
    """Return the status of a TD whose module was updated under it (T14).

    Only an update is seen here. A module that was downgraded, or revoked since, leaves the launch status as it is: that
    is Intel's rule. Policies bound the current status, too.
    """
    if launch not in _BEHIND or current not in _AHEAD:
        return launch
    if launch in _CONFIGURATION or current in _CONFIGURATION:
        return TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED
    return TcbStatus.TD_RELAUNCH_ADVISED


def _standing(info: TcbInfo, pck: PckExtension, tee_tcb_svn: bytes | None, enclave: Standing) -> Standing:
    parts = [_platform(info, pck, tee_tcb_svn)]
    if tee_tcb_svn is not None and tee_tcb_svn[1] > 0:
        parts.append(_module_level(_identity(info, tee_tcb_svn), tee_tcb_svn))
    parts.append(enclave)
    # M1: statuses merge, M2: advisories unite, and the oldest date counts.
    status = merge_status(parts[0].status, tuple(part.status for part in parts[1:]))
    advisories = {advisory for part in parts for advisory in part.advisories}
    return Standing(status, min(part.date for part in parts), tuple(sorted(advisories)))


def _platform(info: TcbInfo, pck: PckExtension, tee_tcb_svn: bytes | None) -> Standing:
    """Return what the first level says whose every component the platform reaches (T10)."""
    # From version 1 on, a TDX module has its own identity, and its first two SVNs are compared there.
    first = 2 if tee_tcb_svn is not None and tee_tcb_svn[1] > 0 else 0
    for level in info.levels:
        if pck.pce_svn < level.pce_svn or not _reaches(pck.tcb_components, level.sgx):
            continue
        if tee_tcb_svn is None or _reaches(tee_tcb_svn[first:], level.tdx[first:]):
            return level.standing
    svns = f"components {pck.tcb_components.hex()}, PCE {pck.pce_svn}"
    svns += "" if tee_tcb_svn is None else f", TDX {tee_tcb_svn.hex()}"
    raise QuoteRejected("T10", f"the platform is below every TCB level ({svns}): it is not supported")


def _reaches(found: bytes, wanted: bytes) -> bool:
    return all(map(int.__ge__, found, wanted))


def _identity(info: TcbInfo, tee_tcb_svn: bytes) -> ModuleIdentity:
    name = f"TDX_{tee_tcb_svn[1]:02X}"
    identity = info.module_identities.get(name)
    if identity is None:
        _reject("T9", f"TCB info knows no TDX module {name}")
    return identity


def _module_level(identity: ModuleIdentity, tee_tcb_svn: bytes) -> Standing:
    """Return what the highest level says that the TDX module reaches (T11)."""
    svn = tee_tcb_svn[0]
    for level in identity.levels:
        if svn >= level.svn:
            return level.standing
    raise QuoteRejected("T11", f"TDX module {tee_tcb_svn[1]}.{svn} is below every level: it is not supported")


def _require_module(info: TcbInfo, body: TdBody) -> None:
    """Require the signer and attributes of the module's own identity (T9), or of the one there was before (T8)."""
    check, signer = "T8", info.module
    if body.tee_tcb_svn[1] > 0:
        check, signer = "T9", _identity(info, body.tee_tcb_svn).signer
    if signer is None or body.mr_signer_seam != signer.mr_signer:
        _reject(check, f"the TDX module is signed by {body.mr_signer_seam.hex()}, not by Intel")
    # No mask can hide them: all bits are reserved.
    if any(body.seam_attributes):
        _reject("T8", f"the TDX module has attributes {body.seam_attributes.hex()}, which must be zero")
    if _masked(body.seam_attributes, signer.attributes_mask) != signer.attributes:
        _reject(check, f"the TDX module has attributes {body.seam_attributes.hex()}, not {signer.attributes.hex()}")


def _enclave(identity: QeIdentity, qe: SgxReport) -> Standing:
    """Return the standing of the quoting enclave (Q4 to Q8)."""
    if qe.mr_signer != identity.mr_signer:
        _reject("Q4", f"the quoting enclave is signed by {qe.mr_signer.hex()}, not by {identity.mr_signer.hex()}")
    prod_id = int.from_bytes(qe.isv_prod_id, "little")
    if prod_id != identity.isv_prod_id:
        _reject("Q5", f"the quoting enclave is product {prod_id}, not {identity.isv_prod_id}")
    if _masked(qe.misc_select, identity.misc_select_mask) != identity.misc_select:
        _reject("Q6", f"the quoting enclave has MISCSELECT {qe.misc_select.hex()}")
    # Whatever the mask leaves out: the debug bit was refused before.
    if _masked(qe.attributes, identity.attributes_mask) != identity.attributes:
        _reject("Q7", f"the quoting enclave has attributes {qe.attributes.hex()}")
    svn = int.from_bytes(qe.isv_svn, "little")
    for level in identity.levels:
        if svn >= level.svn:
            return level.standing
    raise QuoteRejected("Q8", f"the quoting enclave's SVN {svn} is below every level: it is not supported")


def _masked(value: bytes, mask: bytes) -> bytes:
    return (int.from_bytes(value, "big") & int.from_bytes(mask, "big")).to_bytes(len(mask), "big")


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
