# SPDX-License-Identifier: Apache-2.0
"""The values of an attestation result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from cloister.identity import Role

PROFILE: Final = "tag:ietf.org,2026:rats/ear#04"
TYPE: Final = "eat+jwt"
ALGORITHM: Final = "ES256"
MAX_LIFETIME: Final = timedelta(minutes=5)

AFFIRMING: Final = "affirming"
WARNING: Final = "warning"
STATUSES: Final = frozenset({"none", AFFIRMING, WARNING, "contraindicated"})
# What a verdict was made from: its digests, so that it can be made again.
INPUTS: Final = ("quote", "event_log", "collateral", "policy", "references")
# RFC 9334's trustworthiness vector, names of draft-ietf-rats-ar4si.
TRUST_CLAIMS: Final = frozenset(
    {
        "instance-identity",
        "configuration",
        "executables",
        "file-system",
        "hardware",
        "runtime-opaque",
        "storage-opaque",
        "sourced-data",
    }
)


@dataclass(frozen=True, slots=True)
class TeeClaims:
    """What the quote said, after it verified. Measurements are 48 bytes each."""

    mr_td: bytes
    mr_seam: bytes
    rtmrs: tuple[bytes, bytes, bytes, bytes]
    debug: bool
    simulated: bool
    fmspc: bytes  # 6 bytes
    piid: bytes  # platform instance id, 16 bytes; empty when the platform has none
    tcb_status: str | None = None  # None: TCB was not evaluated
    tcb_date: str | None = None  # of the TCB level, ISO 8601 in UTC
    advisories: tuple[str, ...] = ()
    tcb_evaluation: int | None = None  # number of Intel's evaluation that said so
    collateral_issued: str | None = None  # when the oldest of what is renewed monthly was signed, ISO 8601 in UTC
    collateral_expires: str | None = None  # ISO 8601 in UTC


@dataclass(frozen=True, slots=True)
class WorkloadClaims:
    """What the event log said, after it replayed. Digests are 48 bytes each."""

    role: Role
    environment: bytes
    trust_bundle: bytes
    script: bytes
    config: bytes
    datasets: tuple[bytes, ...] = ()  # manifest digests
    tenant: str = ""  # ranks and backends
    job: str = ""  # ranks
    rank: int | None = None
    world_size: int | None = None
    model: str = ""  # backends
    backend: str = ""


@dataclass(frozen=True, slots=True)
class Ear:
    """One attestation result."""

    issuer: str  # SPIFFE id of attest
    audience: str  # the trust domain, "spiffe://<trust-domain>": every relying party of it
    issued_at: datetime
    expires_at: datetime
    token_id: str
    nonces: tuple[str, ...]  # hex: the challenge nonce, then the relying party's when there was one
    certificate_sha256: bytes  # 32 bytes, of the certificate (DER) whose channel may use this token
    hpke_key_digest: bytes  # SHA-384 of the HPKE public key
    spiffe_id: str
    status: str
    trustworthiness: Mapping[str, int]
    tee: TeeClaims
    workload: WorkloadClaims
    policy_digest: bytes  # SHA-384 of the appraisal policy that was applied
    verifier_id: str
    inputs: Mapping[str, bytes] = field(default_factory=dict)  # SHA-384 of what was judged, see INPUTS
