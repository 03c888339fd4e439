# SPDX-License-Identifier: Apache-2.0
"""SPIFFE ids and the roles they stand for: the only names that authorisation knows.

spiffe://<trust-domain>/service/<attest|keybroker|trainer|gateway>
spiffe://<trust-domain>/ns/<tenant>/job/<job>/rank/<n>
spiffe://<trust-domain>/ns/<tenant>/model/<model>/backend/<id>
spiffe://<trust-domain>/ns/<tenant>/user/<name>
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from cloister.errors import CloisterError, Code

_DOMAIN: Final = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
_SEGMENT: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,4}")
_MAX_LENGTH: Final = 2048  # SPIFFE-ID, 2.3


class Role(enum.StrEnum):
    """What a certificate is for; each role has an intermediate CA of its own."""

    ATTEST = "attest"
    KEYBROKER = "keybroker"
    TRAINER = "trainer"
    GATEWAY = "gateway"
    RANK = "rank"
    BACKEND = "backend"
    USER = "user"

    @property
    def is_service(self) -> bool:
        """True for the four that stand alone and are named in DNS SANs."""
        return self in _SERVICES

    @property
    def is_workload(self) -> bool:
        """True for everything that runs in a TD and enrols with evidence."""
        return self is not Role.USER


_SERVICES: Final = frozenset({Role.ATTEST, Role.KEYBROKER, Role.TRAINER, Role.GATEWAY})


def is_name(text: str) -> bool:
    """Say whether a tenant, job, model, backend or user may be called this: [a-z0-9-], 1 to 63 characters."""
    return _SEGMENT.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """A parsed SPIFFE id of one of the four forms; anything else does not exist."""

    trust_domain: str
    role: Role
    tenant: str = ""
    job: str = ""
    rank: int = -1
    model: str = ""
    backend: str = ""
    user: str = ""

    @classmethod
    def service(cls, trust_domain: str, role: Role) -> SpiffeId:
        return cls.parse(f"spiffe://{trust_domain}/service/{role}")

    @classmethod
    def of_rank(cls, trust_domain: str, *, tenant: str, job: str, rank: int) -> SpiffeId:
        return cls.parse(f"spiffe://{trust_domain}/ns/{tenant}/job/{job}/rank/{rank}")

    @classmethod
    def of_backend(cls, trust_domain: str, *, tenant: str, model: str, backend: str) -> SpiffeId:
        return cls.parse(f"spiffe://{trust_domain}/ns/{tenant}/model/{model}/backend/{backend}")

    @classmethod
    def of_user(cls, trust_domain: str, *, tenant: str, user: str) -> SpiffeId:
        return cls.parse(f"spiffe://{trust_domain}/ns/{tenant}/user/{user}")

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Parse one of the four forms; raise CloisterError(CALLER_UNKNOWN) for anything else."""
        found = cls._parse(text) if len(text) <= _MAX_LENGTH else None
        if found is None:
            raise CloisterError(
                Code.CALLER_UNKNOWN,
                what=f"{text[:200]!r} is not a SPIFFE id of this system",
                why="an id names a service, a rank, a backend or a user of one trust domain",
                todo="use a certificate that attest issued",
            )
        return found

    @classmethod
    @lru_cache(maxsize=4096)  # the same few callers, again and again
    def _parse(cls, text: str) -> SpiffeId | None:
        scheme, _, rest = text.partition("://")
        domain, *path = rest.split("/")
        if scheme != "spiffe" or not _DOMAIN.fullmatch(domain):
            return None
        match path:
            case ["service", ("attest" | "keybroker" | "trainer" | "gateway") as name]:
                return cls(domain, Role(name))
            case ["ns", tenant, "job", job, "rank", rank] if _names(tenant, job) and _NUMBER.fullmatch(rank):
                return cls(domain, Role.RANK, tenant=tenant, job=job, rank=int(rank))
            case ["ns", tenant, "model", model, "backend", backend] if _names(tenant, model, backend):
                return cls(domain, Role.BACKEND, tenant=tenant, model=model, backend=backend)
            case ["ns", tenant, "user", user] if _names(tenant, user):
                return cls(domain, Role.USER, tenant=tenant, user=user)
        return None

    @property
    def dns_name(self) -> str:
        """The synthetic DNS SAN that gRPC clients match, since they cannot match a URI SAN."""
        return dns_name(self.role, self.trust_domain)

    def __str__(self) -> str:
        prefix = f"spiffe://{self.trust_domain}"
        match self.role:
            case Role.RANK:
                return f"{prefix}/ns/{self.tenant}/job/{self.job}/rank/{self.rank}"
            case Role.BACKEND:
                return f"{prefix}/ns/{self.tenant}/model/{self.model}/backend/{self.backend}"
            case Role.USER:
                return f"{prefix}/ns/{self.tenant}/user/{self.user}"
            case _:
                return f"{prefix}/service/{self.role}"


def dns_name(role: Role, trust_domain: str) -> str:
    """Return the DNS SAN of a role, such as keybroker.cloister.dev."""
    return f"{role}.{trust_domain}"


def _names(*segments: str) -> bool:
    return all(is_name(segment) for segment in segments)
