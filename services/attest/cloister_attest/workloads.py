# SPDX-License-Identifier: Apache-2.0
"""What services announce: the workloads that may become ranks and backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Registration:
    """By whom and when; for people."""

    service: str  # SPIFFE id
    unix_ms: int


UNKNOWN: Final = Registration("", 0)


@dataclass(frozen=True, slots=True)
class Job:
    """A training job whose ranks may enrol."""

    job_id: str
    tenant: str
    world_size: int
    script: bytes  # 48 bytes
    config: bytes  # 48 bytes
    open: bool = True


@dataclass(frozen=True, slots=True)
class Backend:
    """A model backend that may enrol."""

    tenant: str
    model: str
    backend: str
    script: bytes  # 48 bytes
    config: bytes  # 48 bytes
    open: bool = True
