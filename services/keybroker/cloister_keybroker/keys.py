# SPDX-License-Identifier: Apache-2.0
"""What the broker knows of a key: values only. Key material is not among them."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.tlv import sha384, tlv


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
