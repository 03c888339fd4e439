# SPDX-License-Identifier: Apache-2.0
"""Attest's configuration file."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, Field, model_validator

from cloister.collateral.family import Edition
from cloister.didkey import is_did_key
from cloister.errors import CloisterError
from cloister.identity import Role, SpiffeId
from cloister.recovery import MAX_SHARES, MIN_THRESHOLD
from cloister.runtime.config import ConfigModel, ServiceSection

Digest384 = Annotated[str, Field(pattern=r"^sha384:[0-9a-f]{96}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Digest256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _did_key(text: str) -> str:
    if is_did_key(text):
        return text
    raise ValueError("wanted did:key:z6Mk..., the name of an Ed25519 key")


DidKey = Annotated[str, AfterValidator(_did_key)]


def _service_role(role: Role) -> Role:
    if not role.is_service:
        raise ValueError(f"{role} is no service; ranks and backends are registered by the services that start them")
    return role


def _user_id(text: str) -> str:
    try:
        if SpiffeId.parse(text).role is Role.USER:
            return text
    except CloisterError:
        pass
    raise ValueError("wanted spiffe://<trust-domain>/ns/<tenant>/user/<name>")


def _collateral_source(text: str) -> str:
    kind, _, place = text.partition(":")
    if kind in ("offline", "pcs", "pccs") and place:
        return text
    raise ValueError("wanted offline:<directory>, pcs:<https URL> or pccs:<https URL>")


class GuestPlatform(ConfigModel):
    """[guest]: where attest's own quotes come from. Attest enrols with itself, so it has no attest endpoint."""

    provider: str


class AttestSection(ConfigModel):
    """[attest]: what is issued, for how long, and how fast."""

    bundle_file: Path
    enrolment_listen: str = "127.0.0.1:0"
    # HTTPS without client certificates: the token keys as a JWK set, for whoever reads attestation results.
    jwks_listen: str = "127.0.0.1:0"
    # Life of certificates and attestation results. Connections outlive certificates, so both stay short.
    svid_ttl_s: int = Field(default=3600, ge=1, le=3600)
    ear_ttl_s: int = Field(default=300, ge=1, le=300)
    user_ttl_s: int = Field(default=12 * 3600, ge=60, le=12 * 3600)
    nonce_ttl_s: int = Field(default=60, ge=1, le=300)
    # Calls one address may make on the enrolment port before it has an identity: so many at once, then so many a
    # second; those of the second ahead wait for it, the rest is refused, and TDs come again. One enrolment is two
    # calls: a job of 64 ranks on one host starts within the burst, 1,000 TDs behind one address take half a minute.
    calls_per_s: float = Field(default=50.0, gt=0, le=10_000)
    calls_burst: int = Field(default=400, ge=1, le=100_000)
    # Connections of one address that are inside at once; those that come meanwhile wait in line, unread.
    connections: int = Field(default=32, ge=1, le=10_000)
    # How many verdicts are kept, accepted and refused apart, so that refusals cannot push out what was accepted.
    kept_verdicts: int = Field(default=10_000, ge=1, le=1_000_000)
    # Of how many of them, again apart, the evidence is kept, too; about 15 KB each.
    kept_bundles: int = Field(default=1_000, ge=0, le=100_000)


class Kept(enum.StrEnum):
    """What becomes of the CA when attest is restarted."""

    MEMORY = "memory"  # a new one begins, and everything enrols anew
    FILE = "file"  # sealed under a key in a file of this machine: for development
    SHARES = "shares"  # sealed under a key that enough holders of shares give back


class CaSection(ConfigModel):
    """[ca]: how long an epoch of the workload CA lasts, and what becomes of it at a restart."""

    kept: Kept = Kept.MEMORY
    # The recovery key, 0600 (kept = "file"): whoever reads it and the state has the CA.
    root_key_file: Path | None = None
    # Public keys of those who hold shares (kept = "shares"), made by `cloister broker holder-key`, and how many of them
    # bring the CA back. Their files are measured, too.
    holders: tuple[Path, ...] = Field(default=(), max_length=MAX_SHARES)
    threshold: int = Field(default=0, ge=0, le=MAX_SHARES)
    # Where the holders' sealed shares are written when a CA begins; without it, ca-shares in the state directory.
    shares_dir: Path | None = None
    # The sealed state; without it, ca.sealed in the state directory.
    state_file: Path | None = None
    # Where holders of shares reach attest while it waits for them (kept = "shares").
    recovery_listen: str = "127.0.0.1:0"
    # A new epoch is announced this long before it issues: TDs ask once a minute.
    lead_s: int = Field(default=180, ge=1, le=24 * 3600)
    # An epoch stays trusted this long after it issued its last: longer than anything it issued lives.
    overlap_s: int = Field(default=13 * 3600, ge=1, le=7 * 24 * 3600)
    # A new epoch begins by itself at this age; its CAs live for 90 days.
    renew_after_s: int = Field(default=60 * 24 * 3600, ge=60, le=75 * 24 * 3600)

    @model_validator(mode="after")
    def _one_key(self) -> CaSection:
        if (self.kept is Kept.FILE) != (self.root_key_file is not None):
            raise ValueError('root_key_file goes with kept = "file", and only with that')
        if (self.kept is Kept.SHARES) != bool(self.holders):
            raise ValueError('holders go with kept = "shares", and only with that')
        if self.holders and not MIN_THRESHOLD <= self.threshold <= len(self.holders):
            raise ValueError(f"threshold is {MIN_THRESHOLD} to the number of holders, {len(self.holders)}")
        if self.threshold and not self.holders:
            raise ValueError("threshold goes with holders")
        return self


class CollateralSection(ConfigModel):
    """[collateral]: where TCB info, QE identity and revocation lists come from."""

    # "offline:<directory>" of bundles, relative to this file; "pcs:<URL>" of Intel's service; "pccs:<URL>" of a PCCS.
    source: Annotated[str, AfterValidator(_collateral_source)]
    update: Edition = Edition.STANDARD
    # Of a PCCS: the only CAs that may certify it. Without it, those of the system.
    ca_file: Path | None = None


class AppraisalSection(ConfigModel):
    """[appraisal]: what platforms and TDs must be."""

    policy: Path | None = None  # without one: up to date, no optional feature but PKS


class ReferenceEntry(ConfigModel):
    """[[references]]: a reference set that the policy may name: a signed file, and who may sign it (did:key)."""

    name: Name
    path: Path
    signers: tuple[DidKey, ...] = Field(min_length=1, max_length=32)
    threshold: int = Field(default=1, ge=1, le=32)  # so many of them

    @model_validator(mode="after")
    def _can_be_met(self) -> Self:
        if self.threshold > len(set(self.signers)):
            raise ValueError(f"{self.threshold} signers are wanted and {len(set(self.signers))} are named")
        return self


def _names_once(entries: tuple[ReferenceEntry, ...]) -> tuple[ReferenceEntry, ...]:
    if len({entry.name for entry in entries}) != len(entries):
        raise ValueError("two sets have one name, and a policy names a set by its name alone")
    return entries


class TrustRootEntry(ConfigModel):
    """[[trust_roots]]: the root that quotes come from. A simulated one is marked in every attestation result."""

    path: Path
    simulated: bool


class ServiceEntry(ConfigModel):
    """[[services]]: the code that may become this service."""

    role: Annotated[Role, AfterValidator(_service_role)]
    script: tuple[Digest384, ...]


class UserEntry(ConfigModel):
    """[[users]]: a person or program, known by the SHA-256 of its public key (SubjectPublicKeyInfo, DER)."""

    spiffe_id: Annotated[str, AfterValidator(_user_id)]
    spki_sha256: Digest256
    operator: bool = False  # denials, epochs and workloads of all tenants; identities of its own tenant
    administrator: bool = False  # identities of its own tenant


class AttestConfig(ConfigModel):
    """The whole file."""

    service: ServiceSection
    guest: GuestPlatform
    attest: AttestSection
    # One: collateral belongs to a root, and a development root never stands beside Intel's.
    # Without an entry, Intel's production root.
    trust_roots: tuple[TrustRootEntry, ...] = Field(default=(), max_length=1)
    collateral: CollateralSection
    ca: CaSection = CaSection()
    appraisal: AppraisalSection = AppraisalSection()
    references: Annotated[tuple[ReferenceEntry, ...], AfterValidator(_names_once)] = ()
    services: tuple[ServiceEntry, ...]
    users: tuple[UserEntry, ...] = ()

    @model_validator(mode="after")
    def _overlap_is_long_enough(self) -> AttestConfig:
        if self.ca.overlap_s < self.attest.svid_ttl_s:
            raise ValueError("ca.overlap_s is shorter than attest.svid_ttl_s: certificates would end before their time")
        return self
