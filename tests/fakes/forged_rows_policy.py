# SPDX-License-Identifier: Apache-2.0
"""Rows A1 to A11: authentic quotes of TDs and enclaves that the strict default refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

from cloister.tdx.body import SgxReport, TdBody, TdBody15, TdBody15Ex
from cloister.tdx.defaultpolicy import Appraisal, DefaultPolicy, Wanted, appraise
from cloister.tdx.eventlog import Event, EventLog
from fakes.forged_collateral import BODY_15, BODY_15_EX, ENCLAVE, World, level, svns
from fakes.forged_quotes import BODY

SEPT_VE_DISABLE: Final = 1 << 28
REPORT_DATA: Final = b"r" * 64
LOG: Final = EventLog((Event(0, 1, "", b"", b"0" * 48), Event.runtime("cloister.workload.script", b"s" * 48)))


@dataclass(frozen=True)
class PolicyCase:
    """One fact about a quote, and the row that refuses it."""

    row: str
    what: str
    body: TdBody | SgxReport = BODY
    policy: DefaultPolicy = field(default_factory=DefaultPolicy)
    report_data: bytes = REPORT_DATA
    event_log: Any = None
    statuses: tuple[str, str] = ("UpToDate", "UpToDate")  # at launch, now

    @property
    def id(self) -> str:
        return f"{self.row}-{self.what.replace(' ', '-')}"

    def appraise(self) -> Appraisal:
        world = World()
        if isinstance(self.body, SgxReport):
            world.of_enclave()
        launch, current = self.statuses
        world.body = self.body
        world.tcb_info["tcbLevels"] = [
            level(svns(tdx=b"\0\0\2" + bytes(13)), current),
            level(svns(), launch),
        ]
        return appraise(world.verify(), report_data=self.report_data, policy=self.policy, event_log=self.event_log)


def attributes(bits: int, body: TdBody = BODY) -> TdBody:
    return replace(body, td_attributes=bits.to_bytes(8, "little"))


def with_bit(bit: int) -> TdBody:
    return attributes(SEPT_VE_DISABLE | 1 << bit)


def xfam(bits: int) -> TdBody:
    return replace(BODY, xfam=bits.to_bytes(8, "little"))


def service_td(**change: bytes) -> TdBody15Ex:
    return replace(BODY_15_EX, **change)


def wanting(**values: Any) -> DefaultPolicy:
    return DefaultPolicy(wanted=Wanted(**values))


NONE: Final[frozenset[bytes]] = frozenset()
OTHER: Final = frozenset({b"x" * 48})
UPDATED: Final = TdBody15.parse(BODY.to_bytes() + b"\0\0\2" + bytes(13) + bytes(48))
REPLAYED: Final = replace(BODY, rtmrs=LOG.replay())
CASES: Final = [
    PolicyCase("A1", "debug TD", with_bit(0)),
    PolicyCase("A1", "debug enclave", replace(ENCLAVE, attributes=b"\x17" + bytes(15))),
    *(PolicyCase("A2", f"bit {bit}", with_bit(bit)) for bit in range(1, 8)),
    PolicyCase("A3", "no SEPT_VE_DISABLE", attributes(0)),
    *(PolicyCase("A4", f"feature bit {bit}", with_bit(bit)) for bit in (16, 27, 31, 63)),
    PolicyCase("A4", "PKS where nothing is allowed", with_bit(30), DefaultPolicy(features=frozenset())),
    *(PolicyCase("A5", f"reserved bit {bit}", with_bit(bit)) for bit in (8, 15, 18, 23, 26, 32, 47, 61, 62)),
    PolicyCase("A6", "nothing on", xfam(0)),
    PolicyCase("A6", "SSE off", xfam(0x600E5)),
    PolicyCase("A6", "bit 63", xfam(0x600E7 | 1 << 63)),
    PolicyCase("A6", "bit 3", xfam(0x600E7 | 1 << 3)),
    PolicyCase("A7", "another module", policy=DefaultPolicy(mr_seams=OTHER)),
    PolicyCase("A7", "an empty list of modules", policy=DefaultPolicy(mr_seams=NONE)),
    PolicyCase("A8", "a service TD", replace(BODY_15, mr_service_td=b"s" * 48)),
    PolicyCase("A8", "an extended service TD", with_bit(17)),
    PolicyCase("A8", "an initial service TD", service_td(initial_service_td_hash=b"s" * 48)),
    PolicyCase("A8", "attributes of an initial service TD", service_td(initial_service_td_attributes=b"s" * 8)),
    PolicyCase("A8", "a current service TD", service_td(current_service_td_hash=b"s" * 48)),
    PolicyCase("A8", "attributes of a current service TD", service_td(current_service_td_attributes=b"s" * 8)),
    PolicyCase("A9", "other report data", report_data=b"x" * 64),
    PolicyCase("A9", "zero report data", replace(BODY, report_data=bytes(64)), report_data=bytes(64)),
    PolicyCase("A9", "the right hash in the wrong half", report_data=bytes(32) + b"r" * 32),
    PolicyCase("A9", "half of it", report_data=b"r" * 32),
    PolicyCase("A9", "none wanted", report_data=b""),
    PolicyCase("A9", "an enclave's", ENCLAVE, report_data=b"x" * 64),
    *(
        PolicyCase("A10", f"{what} {name}", policy=wanting(**{name: values}))
        for what, values in (("another", OTHER), ("no", NONE))
        for name in ("mr_td", "mr_config_id", "mr_owner", "mr_owner_config")
    ),
    *(
        PolicyCase("A10", f"another RTMR{n}", policy=wanting(rtmrs=(*[None] * n, OTHER, *[None] * (3 - n))))
        for n in range(4)
    ),
    PolicyCase("A10", "another enclave", ENCLAVE, wanting(mr_enclave=OTHER)),
    PolicyCase("A10", "another signer", ENCLAVE, wanting(mr_signer=OTHER)),
    PolicyCase("A10", "a log of other events", event_log=LOG.replay),
    PolicyCase("A10", "a log with an event more", REPLAYED, event_log=LOG.appended(Event.runtime("more", b"")).replay),
    PolicyCase("A10", "a log with an event twice", REPLAYED, event_log=EventLog((*LOG.events, LOG.events[-1])).replay),
    PolicyCase("A10", "a log with an event less", REPLAYED, event_log=EventLog(LOG.events[:1]).replay),
    PolicyCase("A10", "an enclave with a log", ENCLAVE, event_log=LOG.replay),
    PolicyCase("A11", "migratable", with_bit(29)),
    *(
        PolicyCase("status", status, statuses=(status, "UpToDate"))
        for status in ("OutOfDate", "SWHardeningNeeded", "ConfigurationNeeded")
    ),
    PolicyCase("status", "a relaunch advised", UPDATED, statuses=("OutOfDate", "UpToDate")),
    PolicyCase("status", "a module that is revoked now", UPDATED, statuses=("UpToDate", "Revoked")),
    PolicyCase("T13", "an old evaluation", policy=DefaultPolicy(minimum_evaluation_number=21)),
]
