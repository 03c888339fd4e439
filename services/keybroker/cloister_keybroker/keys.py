# SPDX-License-Identifier: Apache-2.0
"""What the broker knows of a key: values only. Key material is not among them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from cloister.identity import Role, SpiffeId
from cloister.keyuri import KeyUri
from cloister.tlv import sha384, tlv


class Purpose(enum.StrEnum):
    """What a data key of this key may be used for."""

    TRAIN = "train"
    SERVE = "serve"
    EVALUATE = "evaluate"
    EXPORT = "export"  # out of any TD, on the owner's own machine; never released to a workload


# What a workload may ask for at all, whatever a policy says.
ROLE_PURPOSES: dict[Role, frozenset[Purpose]] = {
    Role.RANK: frozenset({Purpose.TRAIN, Purpose.EVALUATE}),
    Role.BACKEND: frozenset({Purpose.SERVE, Purpose.EVALUATE}),
}


class KeyState(enum.StrEnum):
    """Whether data keys are released and made."""

    ENABLED = "enabled"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it stands in the store."""

    uri: KeyUri
    owner: str  # SPIFFE id of the identity that created it
    state: KeyState
    purposes: frozenset[Purpose]
    newest: int  # version, from 1
    created_ms: int  # Unix milliseconds
    policy_version: int = 0  # 0: no policy, nothing is released
    policy_digest: bytes = b""  # 48 bytes, empty without a policy

    def digest(self) -> bytes:
        """Return SHA-384 over every field (48 bytes): what the store authenticates and the log records."""
        return sha384(
            tlv(
                "cloister-key-record-v1",
                str(self.uri),
                self.owner,
                self.state.value,
                tlv("purposes", *sorted(purpose.value for purpose in self.purposes)),
                self.newest,
                self.created_ms,
                self.policy_version,
                self.policy_digest,
            )
        )


def job_of(caller: SpiffeId) -> str:
    """Return what `max_per_job` counts for: a rank's job or a backend's model, as one text."""
    name = f"job/{caller.job}" if caller.role is Role.RANK else f"model/{caller.model}"
    return f"{caller.tenant}/{name}"
