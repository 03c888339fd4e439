# SPDX-License-Identifier: Apache-2.0
"""TCB info and quoting-enclave identity: what Intel says about platforms and enclaves (rows T3 to T13, Q2 to Q8).

Source: Intel PCS API, version 4 (TCB info 3, enclave identity 2). Only the signed text comes in here. Unknown members
are skipped: Intel adds some; what we read is exact. Levels are kept sorted, highest first: the order in the file is not
relied on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, NoReturn

from cloister.tdx.certificate import Window
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.strictjson import StrictObject, parse_object

TCB_INFO_VERSION: Final = 3
IDENTITY_VERSION: Final = 2
MAX_LEVELS: Final = 256  # real ones have up to 20
MAX_ADVISORIES: Final = 256
COMPONENTS: Final = 16

_MODULE_ID: Final = re.compile(r"TDX_[0-9A-F]{2}")
_ADVISORY: Final = re.compile(r"[!-~]{1,64}")


class TcbStatus(StrEnum):
    """What a platform, a TDX module or a quoting enclave is, in Intel's words."""

    UP_TO_DATE = "UpToDate"
    SW_HARDENING_NEEDED = "SWHardeningNeeded"
    CONFIGURATION_NEEDED = "ConfigurationNeeded"
    CONFIGURATION_AND_SW_HARDENING_NEEDED = "ConfigurationAndSWHardeningNeeded"
    OUT_OF_DATE = "OutOfDate"
    OUT_OF_DATE_CONFIGURATION_NEEDED = "OutOfDateConfigurationNeeded"
    REVOKED = "Revoked"
    # Never in a document, only results: a TD that runs on a newer module than it was launched on.
    TD_RELAUNCH_ADVISED = "TDRelaunchAdvised"
    TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED = "TDRelaunchAdvisedConfigurationNeeded"


COMPONENT_STATUSES: Final = frozenset({TcbStatus.UP_TO_DATE, TcbStatus.OUT_OF_DATE, TcbStatus.REVOKED})
PLATFORM_STATUSES: Final = frozenset(TcbStatus) - {
    TcbStatus.TD_RELAUNCH_ADVISED,
    TcbStatus.TD_RELAUNCH_ADVISED_CONFIGURATION_NEEDED,
}


@dataclass(frozen=True, slots=True)
class Standing:
    """What a level says about whatever matches it."""

    status: TcbStatus
    date: datetime  # of the TCB: all fixes published until then are in it
    advisories: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TcbLevel:
    """Component SVNs that a platform must have, each at least."""

    sgx: bytes  # 16
    pce_svn: int
    tdx: bytes  # 16; empty in TCB info about SGX
    standing: Standing


@dataclass(frozen=True, slots=True)
class SvnLevel:
    """One SVN that a TDX module or a quoting enclave must have at least."""

    svn: int
    standing: Standing


@dataclass(frozen=True, slots=True)
class ModuleSigner:
    """Who signed a TDX module, and its attributes."""

    mr_signer: bytes  # 48
    attributes: bytes  # 8
    attributes_mask: bytes  # 8


@dataclass(frozen=True, slots=True)
class ModuleIdentity:
    """One major version of the TDX module."""

    signer: ModuleSigner
    levels: tuple[SvnLevel, ...]  # highest first


@dataclass(frozen=True, slots=True)
class TcbInfo:
    """What Intel says about platforms of one FMSPC."""

    id: str  # "TDX" or "SGX"
    window: Window
    fmspc: bytes  # 6
    pce_id: bytes  # 2
    evaluation_number: int
    module: ModuleSigner | None
    module_identities: dict[str, ModuleIdentity]  # by id in upper case, "TDX_01"
    levels: tuple[TcbLevel, ...]  # highest first

    @classmethod
    def parse(cls, data: bytes) -> TcbInfo:
        """Parse signed text; raise QuoteRejected T2 to T12."""
        info = parse_object(data, "TCB info", "T2")
        # T3: what it is about, and in which form.
        kind = info.text("id", "T3")
        if kind not in ("SGX", "TDX"):
            _reject("T3", f"TCB info of id {kind!r}, neither SGX nor TDX")
        version = info.integer("version", "T3", highest=2**31)
        if version != TCB_INFO_VERSION:
            _reject("T3", f"TCB info of version {version}, not {TCB_INFO_VERSION}")
        # T4: how its levels compare.
        if (tcb_type := info.integer("tcbType", "T4", highest=2**31)) != 0:
            _reject("T4", f"TCB info of TCB type {tcb_type}, not 0")
        window = _window(info, "T7", "TCB info")
        fmspc, pce_id = info.octets("fmspc", "T5", size=6), info.octets("pceId", "T6", size=2)
        number = info.integer("tcbEvaluationDataNumber", "T13", highest=2**31)
        tdx = kind == "TDX"
        if tdx and "tdxModule" not in info:
            _reject("T8", "TCB info about TDX without a TDX module")
        module = _signer(info.child("tdxModule", "T8"), "T8") if tdx else None
        identities = _module_identities(info) if tdx and "tdxModuleIdentities" in info else {}
        levels: dict[tuple[bytes, int, bytes], Standing] = {}
        for item in info.items("tcbLevels", "T10", most=MAX_LEVELS):
            level = StrictObject(item, "TCB level", "T10")
            tcb = level.child("tcb", "T10")
            key = (
                _components(tcb, "sgxtcbcomponents"),
                tcb.integer("pcesvn", "T10", highest=65_535),
                # Absent components are no wildcard.
                _components(tcb, "tdxtcbcomponents") if tdx else b"",
            )
            standing = _standing(level, PLATFORM_STATUSES, "T10", "T12")
            if levels.setdefault(key, standing) != standing:
                _reject("T10", "two TCB levels with the same components say different things")
        ordered = sorted(levels.items(), key=lambda level: level[0], reverse=True)
        return cls(
            id=kind,
            window=window,
            fmspc=fmspc,
            pce_id=pce_id,
            evaluation_number=number,
            module=module,
            module_identities=identities,
            levels=tuple(TcbLevel(sgx, pce_svn, tdx_svns, s) for (sgx, pce_svn, tdx_svns), s in ordered),
        )


@dataclass(frozen=True, slots=True)
class QeIdentity:
    """What Intel says about its quoting enclave."""

    id: str  # "TD_QE" or "QE"
    window: Window
    evaluation_number: int
    misc_select: bytes  # 4
    misc_select_mask: bytes  # 4
    attributes: bytes  # 16
    attributes_mask: bytes  # 16
    mr_signer: bytes  # 32
    isv_prod_id: int
    levels: tuple[SvnLevel, ...]  # highest first

    @classmethod
    def parse(cls, data: bytes) -> QeIdentity:
        """Parse signed text; raise QuoteRejected Q1 to Q8."""
        identity = parse_object(data, "QE identity", "Q1")
        kind = identity.text("id", "Q2")
        if kind not in ("QE", "TD_QE"):
            _reject("Q2", f"an enclave identity of id {kind!r}, neither QE nor TD_QE")
        version = identity.integer("version", "Q2", highest=2**31)
        if version != IDENTITY_VERSION:
            _reject("Q2", f"an enclave identity of version {version}, not {IDENTITY_VERSION}")
        return cls(
            id=kind,
            window=_window(identity, "Q3", "QE identity"),
            evaluation_number=identity.integer("tcbEvaluationDataNumber", "T13", highest=2**31),
            mr_signer=identity.octets("mrsigner", "Q4", size=32),
            isv_prod_id=identity.integer("isvprodid", "Q5", highest=65_535),
            misc_select=identity.octets("miscselect", "Q6", size=4),
            misc_select_mask=identity.octets("miscselectMask", "Q6", size=4),
            attributes=identity.octets("attributes", "Q7", size=16),
            attributes_mask=identity.octets("attributesMask", "Q7", size=16),
            levels=_svn_levels(identity, "Q8", "Q8", highest=65_535),
        )


def _window(document: StrictObject, check: str, what: str) -> Window:
    """Return issueDate to nextUpdate; what ends before it begins is never valid."""
    start, end = document.time("issueDate", check), document.time("nextUpdate", check)
    if end < start:
        _reject(check, f"the {what} ends before it begins")
    return Window(check, what, start, end)


def _signer(module: StrictObject, check: str) -> ModuleSigner:
    return ModuleSigner(
        mr_signer=module.octets("mrsigner", check, size=48),
        attributes=module.octets("attributes", check, size=8),
        attributes_mask=module.octets("attributesMask", check, size=8),
    )


def _module_identities(info: StrictObject) -> dict[str, ModuleIdentity]:
    identities: dict[str, ModuleIdentity] = {}
    for item in info.items("tdxModuleIdentities", "T9", most=MAX_LEVELS):
        identity = StrictObject(item, "TDX module identity", "T9")
        name = identity.text("id", "T9").upper()
        if not _MODULE_ID.fullmatch(name) or name in identities:
            _reject("T9", f"a TDX module identity of id {name!r}, which is not one or is there twice")
        levels = _svn_levels(identity, "T11", "T12", highest=255)
        identities[name] = ModuleIdentity(_signer(identity, "T9"), levels)
    return identities


def _svn_levels(document: StrictObject, check: str, status_check: str, *, highest: int) -> tuple[SvnLevel, ...]:
    levels: dict[int, Standing] = {}
    for item in document.items("tcbLevels", check, most=MAX_LEVELS):
        level = StrictObject(item, "TCB level", check)
        svn = level.child("tcb", check).integer("isvsvn", check, highest=highest)
        standing = _standing(level, COMPONENT_STATUSES, check, status_check)
        if levels.setdefault(svn, standing) != standing:
            _reject(check, f"two levels with SVN {svn} say different things")
    return tuple(SvnLevel(svn, levels[svn]) for svn in sorted(levels, reverse=True))


def _standing(level: StrictObject, allowed: frozenset[TcbStatus], check: str, status_check: str) -> Standing:
    text = level.text("tcbStatus", status_check)
    if text not in allowed:
        _reject(status_check, f"{text!r} is no status of this structure")
    advisories: list[Any] = []
    if "advisoryIDs" in level:
        advisories = level.items("advisoryIDs", check, most=MAX_ADVISORIES)
        if not all(isinstance(advisory, str) and _ADVISORY.fullmatch(advisory) for advisory in advisories):
            _reject(check, "an advisory is not 1 to 64 printable ASCII characters")
    return Standing(TcbStatus(text), level.time("tcbDate", check), tuple(sorted(set(advisories))))


def _components(tcb: StrictObject, name: str) -> bytes:
    """Return 16 numbers from 0 to 255."""
    items = tcb.items(name, "T10", most=COMPONENTS)
    if len(items) != COMPONENTS:
        _reject("T10", f"{name} has {len(items)} components, not {COMPONENTS}")
    svns: list[Any] = [item.get("svn") if isinstance(item, dict) else None for item in items]
    # bool is an int in Python.
    if not all(type(svn) is int and 0 <= svn <= 255 for svn in svns):
        _reject("T10", f"a component of {name} is not an integer from 0 to 255")
    return bytes(svns)


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
