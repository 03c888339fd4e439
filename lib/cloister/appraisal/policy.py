# SPDX-License-Identifier: Apache-2.0
"""Appraisal policies: closed, typed YAML -> a frozen `TdPolicy`, what a platform and its TD must be. Pure.

    apiVersion: cloister.dev/v1
    kind: AppraisalPolicy
    metadata: {name: production, version: 4}
    spec:
      tcb: {status: [UpToDate, SWHardeningNeeded], min_date: 2026-02-11, min_evaluation: 20, advisories: {allow: []}}
      collateral: {max_age: 35d, on_stale: deny}                 # or warn
      td: {features: [PKS], migratable: deny, service_tds: []}   # strict as it stands here, and when left out
      platforms: {fmspc: [b0c06f000000], piid: ["..."]}
      measurements: {mr_td: ["..."], rtmr1: {set: firmware, min_version: 3}}
      event_log: {required: [{register: rtmr1, type: EV_EFI_ACTION, digests: ["..."]}]}     # cloister.appraisal.events
      workload: {environment: ["sha384:..."], script: ["..."], config: ["..."], datasets: ["..."]}

All that is assigned must hold. Debug, profiling, a host that can inject exceptions, unknown XFAM bits and a revoked
platform are refused by every policy: there is no key that allows them. Reading is closed as for release policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

from cloister.appraisal.events import EventRules, parse_event_rules
from cloister.appraisal.references import MAX_VERSION, REGISTER_TEXT, REGISTERS
from cloister.identity import is_name
from cloister.policyblocks import (
    API_VERSION,
    TCB_STATUSES,
    BlockReader,
    digest_of,
    parse_advisory,
    parse_digest,
    parse_hex,
    read_document,
)
from cloister.tdx.tcbinfo import TcbStatus

KIND: Final = "AppraisalPolicy"
# Measured into RTMR3 (cloister.tdx.workload): what a workload runs on, its code, its configuration, its data.
WORKLOAD: Final = ("environment", "script", "config", "datasets")
_FEATURES: Final = ("PKS", "KL", "LASS", "ICSSD", "PERFMON")
_DEFAULT_FEATURES: Final = frozenset({"PKS"})
_NAME: Final = "a name of [a-z0-9-], 1 to 63 long"


@dataclass(frozen=True, slots=True)
class NamedSet:
    """The values of a reference set, of this version or a later one."""

    name: str
    min_version: int


@dataclass(frozen=True, slots=True)
class TdPolicy:
    """A policy as it was put in force. What is None is not looked at; an empty set allows nothing."""

    name: str
    version: int
    statuses: frozenset[TcbStatus]
    min_date: date | None
    min_evaluation: int
    advisories: frozenset[str] | None
    collateral_max_age: timedelta | None
    stale_denies: bool  # False: stale collateral is a warning, which the attestation result carries
    features: frozenset[str]  # optional TD features that a TD may have
    migratable: bool
    service_tds: frozenset[bytes]
    fmspcs: tuple[bytes, ...] | None  # 6 bytes each
    piids: tuple[bytes, ...] | None  # 16 bytes each
    measurements: Mapping[str, tuple[bytes, ...] | NamedSet]
    events: EventRules | None
    workload: Mapping[str, tuple[bytes, ...]]  # of WORKLOAD: 48 bytes each
    digest: bytes  # 48 bytes, of the canonical form
    source: bytes  # the file

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"


def parse_td_policy(data: bytes) -> TdPolicy:
    """Parse an appraisal policy (YAML, at most 64 KiB); raise CloisterError(POLICY_INVALID) for anything else."""
    document = read_document(data, what="appraisal policy", manual="docs/appraisal.md")
    top = BlockReader(document, (), document.root)
    top.choice("apiVersion", (API_VERSION,))
    top.choice("kind", (KIND,))
    metadata, spec = top.block("metadata"), top.block("spec")
    top.end()
    name = metadata.parsed("name", lambda text: text if is_name(text) else None, _NAME)
    version = metadata.number("version", 1, MAX_VERSION)
    metadata.end()
    statuses, min_date, min_evaluation, advisories = _tcb(spec.block("tcb"))
    max_age, stale_denies = _collateral(spec.optional("collateral"))
    features, migratable, service_tds = _td(spec.optional("td"))
    fmspcs, piids = _platforms(spec.optional("platforms"))
    measurements = _measurements(spec.optional("measurements"))
    event_log = spec.optional("event_log")
    events = None if event_log is None else parse_event_rules(event_log)
    workload = _workload(spec.optional("workload"))
    spec.end()
    return TdPolicy(
        name=name,
        version=version,
        statuses=statuses,
        min_date=min_date,
        min_evaluation=min_evaluation,
        advisories=advisories,
        collateral_max_age=max_age,
        stale_denies=stale_denies,
        features=features,
        migratable=migratable,
        service_tds=service_tds,
        fmspcs=fmspcs,
        piids=piids,
        measurements=measurements,
        events=events,
        workload=workload,
        digest=digest_of(document.root),
        source=data,
    )


def _tcb(block: BlockReader) -> tuple[frozenset[TcbStatus], date | None, int, frozenset[str] | None]:
    statuses = frozenset(TcbStatus(status) for status in block.choices("status", TCB_STATUSES))
    min_date = block.day("min_date") if block.has("min_date") else None
    min_evaluation = block.number("min_evaluation", 1, MAX_VERSION) if block.has("min_evaluation") else 0
    advisories, allowed = block.optional("advisories"), None
    if advisories:
        names = advisories.each("allow", parse_advisory, "an advisory such as INTEL-SA-00837", may_be_empty=True)
        allowed = frozenset(names)
        advisories.end()
    block.end()
    return statuses, min_date, min_evaluation, allowed


def _collateral(block: BlockReader | None) -> tuple[timedelta | None, bool]:
    if block is None:
        return None, True
    max_age = block.duration("max_age", timedelta(hours=1), timedelta(days=365))
    on_stale = block.choice("on_stale", ("deny", "warn"), default="deny")
    block.end()
    return max_age, on_stale == "deny"


def _td(block: BlockReader | None) -> tuple[frozenset[str], bool, frozenset[bytes]]:
    if block is None:
        return _DEFAULT_FEATURES, False, frozenset()
    features = _DEFAULT_FEATURES
    if block.has("features"):
        wanted = f"one of: {', '.join(_FEATURES)}"
        found = block.each("features", lambda text: text if text in _FEATURES else None, wanted, may_be_empty=True)
        features = frozenset(found)
    migratable = block.choice("migratable", ("deny", "allow"), default="deny") == "allow"
    service_tds: frozenset[bytes] = frozenset()
    if block.has("service_tds"):
        hashes = block.each("service_tds", lambda text: parse_hex(text, 48), REGISTER_TEXT, may_be_empty=True)
        service_tds = frozenset(hashes)
    block.end()
    return features, migratable, service_tds


def _platforms(block: BlockReader | None) -> tuple[tuple[bytes, ...] | None, tuple[bytes, ...] | None]:
    if block is None:
        return None, None
    fmspcs = piids = None
    if block.has("fmspc"):
        fmspcs = block.each("fmspc", lambda text: parse_hex(text, 6), "12 hexadecimal digits in lower case")
    if block.has("piid"):
        piids = block.each("piid", lambda text: parse_hex(text, 16), "32 hexadecimal digits in lower case")
    block.end()
    if fmspcs is None and piids is None:
        block.refuse("piid", "the block is empty", "name fmspc, piid, or both")
    return fmspcs, piids


def _measurements(block: BlockReader | None) -> Mapping[str, tuple[bytes, ...] | NamedSet]:
    if block is None:
        return {}
    rules = {name: _allowed(block, name) for name in REGISTERS if block.has(name)}
    block.end()
    if not rules:
        block.refuse(REGISTERS[0], "the block is empty", f"name at least one of: {', '.join(REGISTERS)}")
    return rules


def _allowed(block: BlockReader, name: str) -> tuple[bytes, ...] | NamedSet:
    if not block.is_block(name):
        return block.each(name, lambda text: parse_hex(text, 48), REGISTER_TEXT)
    named = block.block(name)
    found = named.parsed("set", lambda text: text if is_name(text) else None, f"the name of a reference set: {_NAME}")
    min_version = named.number("min_version", 1, MAX_VERSION) if named.has("min_version") else 1
    named.end()
    return NamedSet(found, min_version)


def _workload(block: BlockReader | None) -> Mapping[str, tuple[bytes, ...]]:
    if block is None:
        return {}
    wanted = "sha384: and 96 hexadecimal digits in lower case"
    # Of data sets none may be allowed at all; something runs, on something, in any case.
    rules = {
        name: block.each(name, parse_digest, wanted, may_be_empty=name == "datasets")
        for name in WORKLOAD
        if block.has(name)
    }
    block.end()
    if not rules:
        block.refuse(WORKLOAD[0], "the block is empty", f"name at least one of: {', '.join(WORKLOAD)}")
    return rules


STRICT: Final = parse_td_policy(
    b"""\
apiVersion: cloister.dev/v1
kind: AppraisalPolicy
metadata: {name: strict, version: 1}
spec:
  tcb: {status: [UpToDate]}
"""
)
