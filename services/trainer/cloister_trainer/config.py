# SPDX-License-Identifier: Apache-2.0
"""Configuration of the trainer (TOML)."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field

from cloister.runtime.config import ConfigModel, GuestSection, ServiceSection


class TrainerSection(ConfigModel):
    """[trainer]: where the other services are, and what ranks get."""

    # Attest's port for services, where jobs are registered; [guest] has its port for enrolment.
    attest_endpoint: str
    keybroker_endpoint: str
    # Cores that ranks are pinned to, one each; empty: every core this process may use.
    cores: tuple[Annotated[int, Field(ge=0, le=65_535)], ...] = ()
    # How long ranks wait for each other: to meet, and in a collective. A server grants no call more than 600 s.
    collective_timeout_s: Annotated[float, Field(gt=0, le=600)] = 300.0
    # A cancelled job's ranks may stop by themselves for this long; then they are told (SIGTERM).
    cancel_wait_s: Annotated[float, Field(ge=0, le=3_600)] = 10.0
    # Ranks that were told to stop are killed after this long, with everything they started.
    term_grace_s: Annotated[float, Field(ge=0, le=600)] = 5.0

    def rank_cores(self) -> tuple[int, ...]:
        """Return the cores for ranks, in the order they are given out."""
        return self.cores or tuple(sorted(os.sched_getaffinity(0)))


class TrainerConfig(ConfigModel):
    """The whole file."""

    service: ServiceSection
    guest: GuestSection
    trainer: TrainerSection
