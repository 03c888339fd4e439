# SPDX-License-Identifier: Apache-2.0
"""What a key may be used for, and what a decision has to know of it. Key material is not among it."""

from __future__ import annotations

import enum
from typing import Final, Protocol

from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri


class Purpose(enum.StrEnum):
    """What a data key of this key may be used for."""

    TRAIN = "train"
    SERVE = "serve"
    EVALUATE = "evaluate"
    EXPORT = "export"  # out of any TD, on the owner's own machine; never released to a workload


# What a workload may ask for at all, whatever a policy says.
ROLE_PURPOSES: Final[dict[Role, frozenset[Purpose]]] = {
    Role.RANK: frozenset({Purpose.TRAIN, Purpose.EVALUATE}),
    Role.BACKEND: frozenset({Purpose.SERVE, Purpose.EVALUATE}),
}


# Groups of a TLS channel that a policy can ask for, as the TLS library names them; the first one is post-quantum.
KEY_EXCHANGES: Final = ("X25519MLKEM768", "X25519", "P-256", "P-384")


class KeyState(enum.StrEnum):
    """Whether data keys are released and made: only while a key is enabled."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    DESTRUCTION_SCHEDULED = "destruction-scheduled"  # destroyed when its waiting period ends, unless called off
    DESTROYED = "destroyed"  # the material is gone; the name stays taken


class KeyFacts(Protocol):
    """A key as a decision sees it: the broker's record of it is one."""

    @property
    def uri(self) -> KeyUri: ...
    @property
    def owner(self) -> str: ...  # SPIFFE id
    @property
    def state(self) -> KeyState: ...
    @property
    def purposes(self) -> frozenset[Purpose]: ...
    @property
    def newest(self) -> int: ...  # version, from 1
    @property
    def min_version(self) -> int: ...  # oldest that still opens what it wrapped
    @property
    def policy_version(self) -> int: ...  # 0: no policy, nothing is released
    @property
    def policy_digest(self) -> bytes: ...  # 48 bytes, empty without a policy
    @property
    def policy_withdrawn(self) -> bool: ...  # nothing is released until its successor is in force


def job_of(caller: SpiffeId) -> str:
    """Return what `max_per_job` counts for: a rank's job or a backend's model, as one text."""
    name = f"job/{caller.job}" if caller.role is Role.RANK else f"model/{caller.model}"
    return f"{caller.tenant}/{name}"
