# SPDX-License-Identifier: Apache-2.0
"""Attest's configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from cloister.errors import CloisterError
from cloister.identity import Role, SpiffeId
from cloister.runtime.config import ConfigModel, ServiceSection

Digest384 = Annotated[str, Field(pattern=r"^sha384:[0-9a-f]{96}$")]
Digest256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


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


class GuestPlatform(ConfigModel):
    """[guest]: where attest's own quotes come from. Attest enrols with itself, so it has no attest endpoint."""

    provider: str


class AttestSection(ConfigModel):
    """[attest]: what is issued, for how long, and how fast."""

    bundle_file: Path
    enrolment_listen: str = "127.0.0.1:0"
    # Life of certificates and attestation results. Connections outlive certificates, so both stay short.
    svid_ttl_s: int = Field(default=3600, ge=1, le=3600)
    ear_ttl_s: int = Field(default=300, ge=1, le=300)
    user_ttl_s: int = Field(default=12 * 3600, ge=60, le=12 * 3600)
    nonce_ttl_s: int = Field(default=60, ge=1, le=300)
    # Calls one address may make on the enrolment port before it has an identity: so many at once, then so many a
    # second. One enrolment is two calls; a job of 64 ranks on one host starts within the burst.
    calls_per_s: float = Field(default=50.0, gt=0, le=10_000)
    calls_burst: int = Field(default=400, ge=1, le=100_000)
    # How many verdicts are kept, accepted and refused apart, so that refusals cannot push out what was accepted.
    kept_verdicts: int = Field(default=10_000, ge=1, le=1_000_000)


class TrustRootEntry(ConfigModel):
    """[[trust_roots]]: a root that quotes may come from. Simulated ones are marked in every attestation result."""

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


class AttestConfig(ConfigModel):
    """The whole file."""

    service: ServiceSection
    guest: GuestPlatform
    attest: AttestSection
    trust_roots: tuple[TrustRootEntry, ...] = Field(min_length=1)
    services: tuple[ServiceEntry, ...]
    users: tuple[UserEntry, ...] = ()
