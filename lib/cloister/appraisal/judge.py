# SPDX-License-Identifier: Apache-2.0
"""Is a verified TD acceptable to a policy? Pure: verdict, policy, reference sets and time in; checks and vector out.

tcb.status, tcb.evaluation, td.A1 to td.A11   what every TD must be (cloister.tdx.defaultpolicy), with this policy's
                                              statuses, features and service TDs
tcb.date, tcb.advisories                      what is still open on the platform
collateral.age                                how long ago the newest word about it was signed
platform.fmspc, platform.piid                 which machines
measurements.<register>                       what was launched; rtmr3 as it was when the workload was sealed
event-log.required, .forbidden, .order, .closed   how: events of the log, which has replayed (cloister.appraisal.events)
workload.environment, .script, .config, .datasets   what runs, on what, over what

All of them are made, so that a report shows all that is wrong; all that the policy assigns must hold.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from cloister.appraisal.events import check_events
from cloister.appraisal.policy import NamedSet, TdPolicy
from cloister.appraisal.references import ReferenceSet
from cloister.ear import AFFIRMING, WARNING
from cloister.tdx.body import TdBody
from cloister.tdx.check import Check
from cloister.tdx.collateral import VerifiedCollateral
from cloister.tdx.defaultpolicy import DefaultPolicy, appraise_platform
from cloister.tdx.eventlog import EventLog
from cloister.tdx.quote import Quote
from cloister.tdx.tcbinfo import TcbStatus
from cloister.tdx.verify import Verdict
from cloister.tdx.workload import Workload, sealed_register

# Tiers of a trustworthiness vector (draft-ietf-rats-ar4si): 2 affirming, 32 warning.
_AFFIRMED: Final = 2
_WARNED: Final = 32
_NAMES: Final = {"status": "tcb.status", "T13": "tcb.evaluation"}
_NO_TD: Final = "an SGX enclave"


@dataclass(frozen=True, slots=True)
class TdAppraisal:
    """What was wanted and what was there, and what a relying party may think of it."""

    checks: tuple[Check, ...]
    trustworthiness: Mapping[str, int]
    status: str  # of an attestation result: no better than the worst of the vector

    @property
    def accepted(self) -> bool:
        return all(check.ok for check in self.checks)


def appraise_td(
    verdict: Verdict,
    log: EventLog,
    workload: Workload,
    *,
    policy: TdPolicy,
    references: Mapping[str, ReferenceSet],
    now: datetime,
) -> TdAppraisal:
    """Judge a TD whose quote verified and whose event log replayed. `references` are sets by name."""
    strict = DefaultPolicy(
        statuses=policy.statuses,
        minimum_evaluation_number=policy.min_evaluation,
        features=policy.features,
        migratable=policy.migratable,
        service_tds=policy.service_tds,
    )
    platform = appraise_platform(verdict, policy=strict).checks
    stale = _stale(verdict, policy, now)
    checks = [
        *(Check(_NAMES.get(check.name, f"td.{check.name}"), check.ok, check.wanted, check.got) for check in platform),
        *_tcb(verdict, policy),
        *_age(verdict, policy, now, stale=stale),
        *_platform(verdict, policy),
        *_measurements(verdict, log, policy, references),
        *(check_events(log, policy.events) if policy.events is not None else ()),
        *_workload(workload, policy),
    ]
    vector = _vector(verdict, stale=stale)
    return TdAppraisal(tuple(checks), vector, AFFIRMING if max(vector.values()) < _WARNED else WARNING)


def issued_at(collateral: VerifiedCollateral) -> datetime:
    """Return when the oldest part was signed of what Intel renews at least monthly: TCB info, QE identity, PCK CRL.

    The root's list and the issuers' certificates live for a year and longer; their own expiry bounds them.
    """
    windows = (collateral.tcb_info.window, collateral.qe_identity.window, collateral.pck_crl.window)
    return min(window.start for window in windows)


def _tcb(verdict: Verdict, policy: TdPolicy) -> Iterator[Check]:
    if policy.min_date is not None:
        found = verdict.tcb_date.date()
        yield Check("tcb.date", found >= policy.min_date, f"{policy.min_date} or later", f"{found}")
    if policy.advisories is not None:
        wanted = "no others than " + (", ".join(sorted(policy.advisories)) or "none")
        ok = policy.advisories.issuperset(verdict.advisories)
        yield Check("tcb.advisories", ok, wanted, ", ".join(verdict.advisories) or "none")


def _stale(verdict: Verdict, policy: TdPolicy, now: datetime) -> bool:
    return policy.collateral_max_age is not None and now - issued_at(verdict.collateral) > policy.collateral_max_age


def _age(verdict: Verdict, policy: TdPolicy, now: datetime, *, stale: bool) -> Iterator[Check]:
    if policy.collateral_max_age is not None:
        age = now - issued_at(verdict.collateral)
        wanted = f"signed at most {policy.collateral_max_age} ago" + ("" if policy.stale_denies else ", or a warning")
        yield Check("collateral.age", not (stale and policy.stale_denies), wanted, f"{age} ago")


def _platform(verdict: Verdict, policy: TdPolicy) -> Iterator[Check]:
    if policy.fmspcs is not None:
        yield _one_of("platform.fmspc", verdict.pck.fmspc, policy.fmspcs)
    if policy.piids is not None:
        yield _one_of("platform.piid", verdict.pck.platform_instance_id, policy.piids)


def _measurements(
    verdict: Verdict, log: EventLog, policy: TdPolicy, references: Mapping[str, ReferenceSet]
) -> Iterator[Check]:
    quote = verdict.quote
    for register, allowed in policy.measurements.items():
        name = f"measurements.{register}"
        if not isinstance(quote, Quote):
            yield Check(name, False, "a TD", _NO_TD)
            continue
        value = _registers(quote.body, log)[register]
        if not isinstance(allowed, NamedSet):
            yield _one_of(name, value, allowed)
            continue
        wanted = f"a value of the set {allowed.name}, version {allowed.min_version} or later"
        found = references.get(allowed.name)
        # A set that is not there, too old or has nothing to say allows nothing.
        if found is None:
            yield Check(name, False, wanted, "no such set here")
        elif found.version < allowed.min_version:
            yield Check(name, False, wanted, f"the set has version {found.version}")
        elif not (values := found.values.get(register, ())):
            yield Check(name, False, wanted, f"version {found.version} of the set has no values of {register}")
        else:
            yield Check(name, _is_one_of(value, values), f"{wanted} ({len(values)} in {found})", value.hex())


def _workload(workload: Workload, policy: TdPolicy) -> Iterator[Check]:
    for name, allowed in policy.workload.items():
        if name != "datasets":
            yield _one_of(f"workload.{name}", getattr(workload, name), allowed)
            continue
        others = [digest for digest in workload.datasets if not _is_one_of(digest, allowed)]
        wanted = "no others than " + (", ".join(one.hex() for one in allowed) or "none")
        got = ", ".join(one.hex() for one in workload.datasets) or "none"
        yield Check("workload.datasets", not others, wanted, got)


def _vector(verdict: Verdict, *, stale: bool) -> Mapping[str, int]:
    vector = {"instance-identity": _AFFIRMED, "configuration": _AFFIRMED, "executables": _AFFIRMED}
    current = verdict.status is verdict.current_status is TcbStatus.UP_TO_DATE
    if stale or not current:
        vector["hardware"] = _WARNED
    elif not verdict.simulated:
        vector["hardware"] = _AFFIRMED
    # Of a simulated TD nothing good is claimed about hardware: there is none.
    if not verdict.simulated:
        vector["runtime-opaque"] = _AFFIRMED
    return vector


def _registers(body: TdBody, log: EventLog) -> Mapping[str, bytes]:
    r0, r1, r2, _ = body.rtmrs
    return {
        "mr_td": body.mr_td,
        "mr_seam": body.mr_seam,
        "mr_config_id": body.mr_config_id,
        "mr_owner": body.mr_owner,
        "mr_owner_config": body.mr_owner_config,
        "rtmr0": r0,
        "rtmr1": r1,
        "rtmr2": r2,
        "rtmr3": sealed_register(log),
    }


def _one_of(name: str, value: bytes, allowed: Collection[bytes]) -> Check:
    wanted = " or ".join(one.hex() for one in allowed) or "none allowed"
    return Check(name, _is_one_of(value, allowed), wanted, value.hex() or "none")


def _is_one_of(value: bytes, allowed: Collection[bytes]) -> bool:
    return any(hmac.compare_digest(value, one) for one in allowed)
