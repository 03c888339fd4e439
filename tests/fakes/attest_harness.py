# SPDX-License-Identifier: Apache-2.0
"""Attest with everything real around it: in this process with a clock to turn, or as the processes users run."""

from __future__ import annotations

from cloister.tdx.workload import BackendClaim, RankClaim
from fakes.attest_local import (
    ATTEST_ID,
    BACKEND,
    CONFIG,
    ENVIRONMENT,
    IMAGE,
    JOB,
    MANIFEST,
    SCHEDULE,
    SCRIPT,
    TRUST_DOMAIN,
    Clock,
    LocalAttest,
    PlatformCollateral,
    TdProvider,
    csr,
    local_attest,
    measure,
    spki,
    user_material,
)
from fakes.attest_process import AttestProcess, attest_process, free_port

__all__ = [
    "ATTEST_ID",
    "BACKEND",
    "CONFIG",
    "ENVIRONMENT",
    "IMAGE",
    "JOB",
    "MANIFEST",
    "SCHEDULE",
    "SCRIPT",
    "TRUST_DOMAIN",
    "AttestProcess",
    "BackendClaim",
    "Clock",
    "LocalAttest",
    "PlatformCollateral",
    "RankClaim",
    "TdProvider",
    "attest_process",
    "csr",
    "free_port",
    "local_attest",
    "measure",
    "spki",
    "user_material",
]
