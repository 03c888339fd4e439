# SPDX-License-Identifier: Apache-2.0
"""The strict default: is a verified TD, or enclave, acceptable? (rows A1 to A11)

status  the platform is up to date, now as at launch
A1      no debug
A2      no profiling, no other bit that opens a TD to its host (TUD)
A3      SEPT_VE_DISABLE: the host cannot inject exceptions by taking pages away
A4      no feature beyond those allowed: PKS is, PERFMON, KL, LASS and ICSSD are not
A5      reserved attribute bits are zero
A6      XFAM: x87 and SSE are on, nothing unknown is
A7      MRSEAM is an allowed one, where there is a list; T8 to T11 judge it in any case
A8      no service TD, now or at the TD's beginning, but allowed ones
A9      report_data is what the caller wants, all 64 bytes, and not zero
A10     measurements are among the wanted ones, where there are any, and the event log replays to the registers
A11     not migratable

`appraise` is all of it. `appraise_platform` is what holds of a TD whoever asks, all but A9 and A10: for looking at
quotes that were made for somebody else. Every check is made, so that a report shows all that is wrong.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from cloister.tdx.body import SgxReport, TdBody, TdBody15, TdBody15Ex
from cloister.tdx.check import Check
from cloister.tdx.quote import Quote
from cloister.tdx.tcbinfo import TcbStatus
from cloister.tdx.verify import Verdict

# Intel TDX Module ABI 348551, table 3.23, "TD attributes".
DEBUG: Final = 1 << 0
ICSSD: Final = 1 << 16
SERVTD_EXT: Final = 1 << 17
LASS: Final = 1 << 27
SEPT_VE_DISABLE: Final = 1 << 28
MIGRATABLE: Final = 1 << 29
PKS: Final = 1 << 30
KL: Final = 1 << 31
PERFMON: Final = 1 << 63
_FEATURES: Final = {"PKS": PKS, "KL": KL, "LASS": LASS, "ICSSD": ICSSD, "PERFMON": PERFMON}
_UNDER_DEBUG: Final = 0xFE  # bits 1 to 7: 4 to 6 are profiling, the others reserved
_KNOWN: Final = 0xFF | SERVTD_EXT | SEPT_VE_DISABLE | MIGRATABLE | sum(_FEATURES.values())
# Bits that a processor can have at all (go-tdx-guest, validate.go), and those that it must have.
_XFAM_ALLOWED: Final = 0x0006DBE7
_XFAM_REQUIRED: Final = 0x3

Replay = Callable[[], Sequence[bytes]]  # the `replay` of an EventLog or a CcelLog


@dataclass(frozen=True, slots=True)
class Wanted:
    """Reference values. What is None is not looked at; an empty set allows nothing."""

    mr_td: frozenset[bytes] | None = None
    mr_config_id: frozenset[bytes] | None = None
    mr_owner: frozenset[bytes] | None = None
    mr_owner_config: frozenset[bytes] | None = None
    rtmrs: tuple[frozenset[bytes] | None, ...] = (None, None, None, None)
    mr_enclave: frozenset[bytes] | None = None
    mr_signer: frozenset[bytes] | None = None


@dataclass(frozen=True, slots=True)
class DefaultPolicy:
    """What is accepted; as it stands, the strictest."""

    statuses: frozenset[TcbStatus] = frozenset({TcbStatus.UP_TO_DATE})
    minimum_evaluation_number: int = 0
    features: frozenset[str] = frozenset({"PKS"})  # of PKS, KL, LASS, ICSSD, PERFMON
    migratable: bool = False
    mr_seams: frozenset[bytes] | None = None
    service_tds: frozenset[bytes] = frozenset()  # MR_SERVICETD and service TD hashes, 48 bytes each
    wanted: Wanted = field(default_factory=Wanted)


@dataclass(frozen=True, slots=True)
class Appraisal:
    """What was wanted and what was there, check by check."""

    checks: tuple[Check, ...]

    @property
    def accepted(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def first_failure(self) -> Check | None:
        return next((check for check in self.checks if not check.ok), None)


def appraise(
    verdict: Verdict, *, report_data: bytes, policy: DefaultPolicy | None = None, event_log: Replay | None = None
) -> Appraisal:
    """Appraise a verified quote that the caller asked for with these 64 bytes of report data."""
    policy = policy or DefaultPolicy()
    checks = appraise_platform(verdict, policy=policy).checks
    return Appraisal((*checks, _binding(verdict, report_data), *_measurements(verdict, policy.wanted, event_log)))


def appraise_platform(verdict: Verdict, *, policy: DefaultPolicy | None = None) -> Appraisal:
    """Appraise what does not depend on who asks: not for admitting anybody."""
    policy = policy or DefaultPolicy()
    quote = verdict.quote
    own = _td(quote.body, policy) if isinstance(quote, Quote) else _enclave(quote.body)
    return Appraisal((*own, *_status(verdict, policy)))


def _status(verdict: Verdict, policy: DefaultPolicy) -> list[Check]:
    allowed = ", ".join(sorted(policy.statuses)) or "none"
    found = [verdict.status, verdict.launch_status, verdict.current_status]
    # A relaunch status is the launch status in other words; the other two are bounded, too.
    relaunch = verdict.status is not verdict.launch_status and verdict.status in policy.statuses
    ok = all(status in policy.statuses for status in ([found[0], found[2]] if relaunch else found))
    number, least = verdict.tcb_evaluation_number, policy.minimum_evaluation_number
    return [
        Check("status", ok, allowed, f"{found[0]}, at launch {found[1]}, now {found[2]}"),
        Check("T13", number >= least, f"TCB evaluation {least} or later", str(number)),
    ]


def _td(body: TdBody, policy: DefaultPolicy) -> list[Check]:
    bits = int.from_bytes(body.td_attributes, "little")
    xfam = int.from_bytes(body.xfam, "little")
    allowed = sum(_FEATURES[name] for name in policy.features)
    extra = [name for name, bit in _FEATURES.items() if bits & bit & ~allowed]
    seams = policy.mr_seams
    service_tds = _service_tds(body)
    shown = f"TD attributes {body.td_attributes.hex()}"
    return [
        Check("A1", not bits & DEBUG, "no debug TD", shown),
        Check("A2", not bits & _UNDER_DEBUG, "no profiling", shown),
        Check("A3", bool(bits & SEPT_VE_DISABLE), "SEPT_VE_DISABLE", shown),
        Check("A4", not extra, f"of features at most {sorted(policy.features)}", f"{extra} more"),
        Check("A5", not bits & ~_KNOWN, "reserved attributes zero", shown),
        Check(
            "A6",
            xfam & _XFAM_REQUIRED == _XFAM_REQUIRED and not xfam & ~_XFAM_ALLOWED,
            f"XFAM with {_XFAM_REQUIRED:#x}, within {_XFAM_ALLOWED:#x}",
            f"{xfam:#x}",
        ),
        Check("A7", seams is None or body.mr_seam in seams, _listed(seams), f"MRSEAM {body.mr_seam.hex()}"),
        Check(
            "A8",
            all(digest in policy.service_tds for digest in service_tds.values()) and not bits & SERVTD_EXT,
            "no service TD but allowed ones",
            ", ".join(f"{name} {digest.hex()}" for name, digest in service_tds.items()) or shown,
        ),
        Check("A11", policy.migratable or not bits & MIGRATABLE, "not migratable", shown),
    ]


def _service_tds(body: TdBody) -> dict[str, bytes]:
    """Return what is not zero of the fields about service TDs."""
    fields: dict[str, bytes] = {}
    if isinstance(body, TdBody15):
        fields["MR_SERVICETD"] = body.mr_service_td
    if isinstance(body, TdBody15Ex):
        fields["initial service TD"] = body.initial_service_td_hash
        fields["initial service TD attributes"] = body.initial_service_td_attributes
        fields["current service TD"] = body.current_service_td_hash
        fields["current service TD attributes"] = body.current_service_td_attributes
    return {name: value for name, value in fields.items() if any(value)}


def _enclave(report: SgxReport) -> list[Check]:
    return [Check("A1", not report.debug, "no debug enclave", f"attributes {report.attributes.hex()}")]


def _binding(verdict: Verdict, wanted: bytes) -> Check:
    found = verdict.quote.body.report_data
    # A caller that wants zeros has bound nothing, and neither has one that wants less than all 64 bytes.
    ok = len(wanted) == len(found) and any(wanted) and hmac.compare_digest(found, wanted)
    return Check("A9", ok, f"report data {wanted.hex() or 'none'}", found.hex())


def _measurements(verdict: Verdict, wanted: Wanted, event_log: Replay | None) -> list[Check]:
    quote = verdict.quote
    if not isinstance(quote, Quote):
        pairs = [
            ("MRENCLAVE", quote.body.mr_enclave, wanted.mr_enclave),
            ("MRSIGNER", quote.body.mr_signer, wanted.mr_signer),
        ]
        registers: tuple[bytes, ...] = ()
    else:
        body = quote.body
        registers = body.rtmrs
        pairs = [
            ("MRTD", body.mr_td, wanted.mr_td),
            ("MRCONFIGID", body.mr_config_id, wanted.mr_config_id),
            ("MROWNER", body.mr_owner, wanted.mr_owner),
            ("MROWNERCONFIG", body.mr_owner_config, wanted.mr_owner_config),
            *((f"RTMR{n}", body.rtmrs[n], values) for n, values in enumerate(wanted.rtmrs)),
        ]
    checks = [
        Check("A10", value in values, f"{name}: {_listed(values)}", value.hex())
        for name, value, values in pairs
        if values is not None
    ]
    if event_log is not None:
        replayed = tuple(event_log())
        wrong = [n for n, (a, b) in enumerate(zip(replayed, registers, strict=False)) if not hmac.compare_digest(a, b)]
        ok = len(replayed) == len(registers) and not wrong
        checks.append(Check("A10", ok, "an event log that replays to RTMR0 to RTMR3", f"RTMRs {wrong} differ"))
    return checks


def _listed(values: frozenset[bytes] | None) -> str:
    return "any" if values is None else " or ".join(sorted(value.hex() for value in values)) or "none allowed"
