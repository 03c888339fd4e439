# SPDX-License-Identifier: Apache-2.0
"""What services announce: the workloads that may become ranks and backends."""

from __future__ import annotations

from dataclasses import dataclass


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
