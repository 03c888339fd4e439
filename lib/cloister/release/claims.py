# SPDX-License-Identifier: Apache-2.0
"""The example cases of a policy: what a request would have to look like, and what should become of it. Pure.

    cases:
      - {name: the registered job, expect: allow}
      - name: the same job, changed
        set: {workload.script: "sha384:99..."}
        expect: deny
        block: workload.script

A case begins with what the policy itself would accept (cases.py); `set` changes single claims of it. The names are
closed like everything in a policy: those of the blocks where there is a block of that name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from cloister.ear import STATUSES
from cloister.errors import CloisterError
from cloister.identity import Role, SpiffeId
from cloister.policyblocks import TCB_STATUSES, BlockReader, parse_advisory, parse_digest, parse_hex
from cloister.release.keys import KEY_EXCHANGES, KeyState, Purpose

MAX_CASES: Final = 64
MISSING: Final = "missing"  # a claim that the token does not have
_MAX_AGE: Final = timedelta(days=3650)
_MAX_NUMBER: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Situation:
    """Everything about a request that a policy can be particular about; measurements and digests are 48 bytes."""

    purpose: Purpose
    key_version: int
    caller: SpiffeId
    mr_td: bytes
    mr_seam: bytes
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes
    script: bytes
    environment: bytes
    config: bytes
    datasets: tuple[bytes, ...]
    piid: bytes  # 16 bytes, empty: the platform has none
    key_exchange: str  # group of the TLS channel
    approvals: int  # of as many approvers, in the order of the policy
    tcb_status: str | None = "UpToDate"
    tcb_date: str | None = None
    advisories: tuple[str, ...] = ()
    collateral_age: timedelta | None = timedelta()
    status: str = ""  # empty: what attest would say of the TCB status
    debug: bool = False
    simulated: bool = False
    evidence_age: timedelta = timedelta()
    broker_nonce: bool = True  # the quote is over the nonce of this very release
    released: int = 0  # data keys of this key that the job already got
    key_state: KeyState = KeyState.ENABLED


@dataclass(frozen=True, slots=True)
class Case:
    """One example: changes to the situation that the policy accepts, and the expected outcome."""

    name: str
    changes: Mapping[str, Any]  # field of Situation -> value
    block: str  # first block that refuses; empty: everything holds


def read_cases(spec: BlockReader) -> tuple[Case, ...]:
    """Read `spec.cases`; none when the block is absent."""
    if not spec.has("cases"):
        return ()
    cases: list[Case] = []
    for block in spec.blocks("cases", MAX_CASES):
        case = _case(block)
        if any(case.name == other.name for other in cases):
            block.refuse("name", f"{case.name[:80]!r} stands twice", "give each case a name of its own")
        cases.append(case)
    return tuple(cases)


def _case(block: BlockReader) -> Case:
    wanted = "a text of 1 to 80 characters"
    name = block.parsed("name", lambda text: text if 0 < len(text) <= 80 and text.isprintable() else None, wanted)
    changes: dict[str, Any] = {}
    if (settings := block.optional("set")) is not None:
        for claim, (field, read) in _CLAIMS.items():
            if settings.has(claim):
                changes[field] = read(settings, claim)
        settings.end()
    expected = block.choice("expect", ("allow", "deny"))
    refused_by = block.text("block") if expected == "deny" else ""
    if expected == "deny" and not 0 < len(refused_by) <= 64:
        block.refuse("block", "is no name of a block", "name the first block that refuses, such as workload.script")
    block.end()
    return Case(name, changes, refused_by)


_Reader = Callable[[BlockReader, str], Any]


def _flag(block: BlockReader, name: str) -> bool:
    return block.choice(name, ("true", "false")) == "true"


def _number(low: int) -> _Reader:
    return lambda block, name: block.number(name, low, _MAX_NUMBER)


def _age(block: BlockReader, name: str) -> timedelta:
    return block.duration(name, timedelta(seconds=1), _MAX_AGE)


def _age_or_missing(block: BlockReader, name: str) -> timedelta | None:
    return None if block.takes(name, MISSING) else _age(block, name)


def _day_or_missing(block: BlockReader, name: str) -> str | None:
    return None if block.takes(name, MISSING) else block.day(name).isoformat()


def _status(block: BlockReader, name: str) -> str | None:
    found = block.choice(name, (*TCB_STATUSES, "Revoked", MISSING))
    return None if found == MISSING else found


def _digest(block: BlockReader, name: str) -> bytes:
    return block.parsed(name, parse_digest, "sha384: and 96 hexadecimal digits in lower case")


def _digests(block: BlockReader, name: str) -> tuple[bytes, ...]:
    wanted = "sha384: and 96 hexadecimal digits in lower case"
    return block.each(name, parse_digest, wanted, may_be_empty=True)


def _advisories(block: BlockReader, name: str) -> tuple[str, ...]:
    return block.each(name, parse_advisory, "an advisory such as INTEL-SA-00837", may_be_empty=True)


def _register(block: BlockReader, name: str) -> bytes:
    return block.parsed(name, lambda text: parse_hex(text, 48), "96 hexadecimal digits in lower case")


def _piid(block: BlockReader, name: str) -> bytes:
    if block.takes(name, MISSING):
        return b""
    return block.parsed(name, lambda text: parse_hex(text, 16), f"32 hexadecimal digits in lower case, or {MISSING}")


def _workload(text: str) -> SpiffeId | None:
    try:
        found = SpiffeId.parse(text)
    except CloisterError:
        return None
    return found if found.role in (Role.RANK, Role.BACKEND) else None


_CLAIMS: Final[Mapping[str, tuple[str, _Reader]]] = {
    "purpose": ("purpose", lambda block, name: Purpose(block.choice(name, ("train", "serve", "evaluate")))),
    "key.version": ("key_version", _number(1)),
    "key.state": ("key_state", lambda block, name: KeyState(block.choice(name, [state.value for state in KeyState]))),
    "token.status": ("status", lambda block, name: block.choice(name, sorted(STATUSES))),
    "tee.debug": ("debug", _flag),
    "tee.simulated": ("simulated", _flag),
    "tee.tcb.status": ("tcb_status", _status),
    "tee.tcb.date": ("tcb_date", _day_or_missing),
    "tee.tcb.advisories": ("advisories", _advisories),
    "tee.collateral.age": ("collateral_age", _age_or_missing),
    "tee.platforms.piid": ("piid", _piid),
    "measurements.mr_td": ("mr_td", _register),
    "measurements.mr_seam": ("mr_seam", _register),
    "measurements.rtmr0": ("rtmr0", _register),
    "measurements.rtmr1": ("rtmr1", _register),
    "measurements.rtmr2": ("rtmr2", _register),
    "workload.script": ("script", _digest),
    "workload.environment": ("environment", _digest),
    "workload.config": ("config", _digest),
    "workload.datasets": ("datasets", _digests),
    "identity.spiffe": (
        "caller",
        lambda block, name: block.parsed(name, _workload, "the SPIFFE id of a rank or a backend"),
    ),
    "channel.key_exchange": ("key_exchange", lambda block, name: block.choice(name, KEY_EXCHANGES)),
    "evidence.age": ("evidence_age", _age),
    "evidence.nonce": ("broker_nonce", lambda block, name: block.choice(name, ("broker", "verifier")) == "broker"),
    "release.count": ("released", _number(0)),
    "release.approvals": ("approvals", _number(0)),
}
