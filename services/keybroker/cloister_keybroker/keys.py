# SPDX-License-Identifier: Apache-2.0
"""What the broker knows of a key: values only. Key material is not among them."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.keyuri import KeyUri
from cloister.release.keys import KeyState, Purpose
from cloister.tlv import sha384, tlv


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyRecord:
    """A key as it stands in the store."""

    uri: KeyUri
    owner: str  # SPIFFE id of the identity that created it
    signer: str  # did:key of the owner's signing key: fixed, so that a certificate alone changes no policy
    state: KeyState
    purposes: frozenset[Purpose]
    created_ms: int  # Unix milliseconds
    newest: int = 1  # version, from 1
    min_version: int = 1  # oldest version that still opens what it wrapped; it never goes down
    destroy_at_ms: int = 0  # Unix milliseconds; 0 unless destruction is scheduled or done
    policy_version: int = 0  # 0: no policy, nothing is released
    policy_digest: bytes = b""  # 48 bytes, empty without a policy
    policy_withdrawn: bool = False  # nothing is released until its successor is in force
    imported: bool = False  # the owner brought the material of version 1
    publications: int = 0  # of data sets sealed with this key
    published: bytes = b""  # 48 bytes over all publications (datasets.py), empty without any

    def digest(self) -> bytes:
        """Return SHA-384 over every field (48 bytes): what the store authenticates and the log records."""
        return sha384(
            tlv(
                "cloister-key-record-v2",
                str(self.uri),
                self.owner,
                self.signer,
                self.state.value,
                tlv("purposes", *sorted(purpose.value for purpose in self.purposes)),
                self.created_ms,
                self.newest,
                self.min_version,
                self.destroy_at_ms,
                self.policy_version,
                self.policy_digest,
                int(self.policy_withdrawn),
                int(self.imported),
                self.publications,
                self.published,
            )
        )


@dataclass(frozen=True, slots=True)
class KeyVersion:
    """One version of a key: where its material is."""

    number: int  # from 1
    handle: bytes  # what the back end needs to find the material again
    backend: str  # name of the back end that made the handle
    created_ms: int  # Unix milliseconds
