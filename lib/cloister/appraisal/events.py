# SPDX-License-Identifier: Apache-2.0
"""What a policy wants of an event log that replays to the quoted registers. Pure.

    event_log:
      required:                                   # at least one such event, and none with another digest
        - {register: rtmr0, type: EV_EFI_VARIABLE_DRIVER_CONFIG, name: SecureBoot, digests: ["..."]}
        - {register: rtmr3, name: cloister.workload.dataset}
      forbidden:
        - {register: rtmr2, type: EV_IPL, name: "grub_cmd: insmod tcpdump"}
      order: as-listed                            # required events of one register, all of one before any of the next
      closed: [rtmr0]                             # registers that hold required events and no others

A rule means the events of a register that have its type and its name, where it gives them. Types and names of boot
events are what the log says of them (cloister.tdx.bootevents): whoever boots another kernel can say what it likes, but
cannot leave out a digest. So every rule about a closed register gives digests. RTMR3 is always closed: it holds the
events of one workload in their order (cloister.tdx.workload), and the keys that it received.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from cloister.policyblocks import BlockReader, parse_hex
from cloister.tdx.bootevents import EVENT_TYPES, MAX_NAME, event_name, type_name
from cloister.tdx.check import Check
from cloister.tdx.eventlog import RUNTIME_IMR, EventLog

MAX_RULES: Final = 64  # of each kind: every rule is a check of every verdict
_REGISTERS: Final = ("rtmr0", "rtmr1", "rtmr2", "rtmr3")
_DIGEST: Final = "96 hexadecimal digits in lower case"


@dataclass(frozen=True, slots=True)
class EventRule:
    """Events of one register. What is None is not looked at."""

    register: int  # 0 to 3
    event_type: int | None
    name: str | None
    digests: tuple[bytes, ...] | None  # 48 bytes each

    def __str__(self) -> str:
        kind = "any event" if self.event_type is None else type_name(self.event_type)
        return f"{kind} in {_REGISTERS[self.register]}" + (f" named {self.name!r}" if self.name is not None else "")

    def means(self, event: _Event) -> bool:
        """Say whether this rule is about an event, whatever its digest."""
        return (
            event.register == self.register
            and self.event_type in (None, event.event_type)
            and self.name in (None, event.name)
        )

    def allows(self, event: _Event) -> bool:
        """Say whether the digest of an event is one of those that the rule gives, if it gives any."""
        return self.digests is None or any(hmac.compare_digest(event.digest, one) for one in self.digests)


@dataclass(frozen=True, slots=True)
class EventRules:
    """All that a policy wants of a log."""

    required: tuple[EventRule, ...]
    forbidden: tuple[EventRule, ...]
    ordered: bool
    closed: tuple[int, ...]  # registers, 0 to 2


@dataclass(frozen=True, slots=True)
class _Event:
    register: int
    event_type: int
    name: str
    digest: bytes

    def __str__(self) -> str:
        return f"{type_name(self.event_type)} {self.name!r} {self.digest.hex()}"


def parse_event_rules(block: BlockReader) -> EventRules:
    """Read the block `event_log`; raise CloisterError(POLICY_INVALID)."""
    required = tuple(map(_rule, block.blocks("required", MAX_RULES))) if block.has("required") else ()
    forbidden = tuple(map(_rule, block.blocks("forbidden", MAX_RULES))) if block.has("forbidden") else ()
    ordered = block.choice("order", ("any", "as-listed"), default="any") == "as-listed"
    closed: tuple[int, ...] = ()
    if block.has("closed"):
        closed = tuple(_REGISTERS.index(register) for register in block.choices("closed", _REGISTERS[:RUNTIME_IMR]))
    block.end()
    if not required and not forbidden:
        block.refuse("required", "the block asks for nothing", "write required, forbidden, or both")
    for register in closed:
        rules = [rule for rule in required if rule.register == register]
        if not rules:
            block.refuse("closed", f"{_REGISTERS[register]} has no required event: none could be in it", "require some")
        if any(rule.digests is None for rule in rules):
            why = f"a required event of {_REGISTERS[register]} has no digests: anything could be in it"
            block.refuse("closed", why, "give digests: types and names of boot events are only what the log says")
    return EventRules(required, forbidden, ordered, closed)


def _rule(block: BlockReader) -> EventRule:
    register = _REGISTERS.index(block.choice("register", _REGISTERS))
    event_type = name = digests = None
    if block.has("type"):
        event_type = block.parsed("type", _type, "a type such as EV_EFI_ACTION, runtime, or 0x0000002a")
    if block.has("name"):
        name = block.parsed("name", _name, f"1 to {MAX_NAME} printable ASCII characters")
    if block.has("digests"):
        digests = block.each("digests", lambda text: parse_hex(text, 48), _DIGEST)
    block.end()
    return EventRule(register, event_type, name, digests)


def _type(text: str) -> int | None:
    if re.fullmatch(r"0x[0-9a-f]{8}", text, re.ASCII):
        return int(text, 16)
    return EVENT_TYPES.get(text)


def _name(text: str) -> str | None:
    return text if re.fullmatch(rf"[ -~]{{1,{MAX_NAME}}}", text, re.ASCII) else None


def check_events(log: EventLog, rules: EventRules) -> Iterator[Check]:
    """Compare a log that replays with what a policy wants of it."""
    events = [_Event(event.imr, event.event_type, event_name(event), event.digest) for event in log.events]
    for number, rule in enumerate(rules.required):
        yield _required(f"event-log.required[{number}]", rule, [event for event in events if rule.means(event)])
    for number, rule in enumerate(rules.forbidden):
        found = [event for event in events if rule.means(event) and rule.allows(event)]
        which = "" if rule.digests is None else f" with one of {len(rule.digests)} digests"
        got = f"{len(found)}, the first {found[0]}" if found else "none"
        yield Check(f"event-log.forbidden[{number}]", not found, f"not {rule}{which}", got)
    if rules.ordered:
        yield _ordered(rules.required, events)
    for register in rules.closed:
        mine = [rule for rule in rules.required if rule.register == register]
        others = [event for event in events if event.register == register and not _in_one_of(mine, event)]
        name = _REGISTERS[register]
        got = f"{len(others)} others, the first {others[0]}" if others else "no others"
        yield Check(f"event-log.closed.{name}", not others, f"no events of {name} but the required ones", got)


def _required(name: str, rule: EventRule, found: Sequence[_Event]) -> Check:
    wanted = str(rule)
    if rule.digests is not None:
        wanted += " with the digest " + " or ".join(digest.hex() for digest in rule.digests)
    wrong = [event for event in found if not rule.allows(event)]
    if wrong:
        return Check(name, False, wanted, f"{len(wrong)} with another digest, the first {wrong[0].digest.hex()}")
    return Check(name, bool(found), wanted, f"{len(found)} such events" if found else "none")


def _ordered(rules: Sequence[EventRule], events: Sequence[_Event]) -> Check:
    """All events of a rule come before any of the register's next rule. Absent ones were told before."""
    name, wanted = "event-log.order", "the required events of each register in the order of the policy"
    last: dict[int, tuple[int, EventRule]] = {}
    for rule in rules:
        places = [place for place, event in enumerate(events) if rule.means(event)]
        if not places:
            continue
        before = last.get(rule.register)
        if before is not None and places[0] < before[0]:
            return Check(name, False, wanted, f"{rule} before {before[1]}")
        last[rule.register] = (places[-1], rule)
    return Check(name, True, wanted, "as wanted")


def _in_one_of(rules: Sequence[EventRule], event: _Event) -> bool:
    return any(rule.means(event) and rule.allows(event) for rule in rules)
