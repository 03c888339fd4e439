# SPDX-License-Identifier: Apache-2.0
"""Configuration of the gateway (TOML)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from cloister.runtime.config import ConfigModel, GuestSection, ServiceSection

Core = Annotated[int, Field(ge=0, le=65_535)]


class ServingSection(ConfigModel):
    """[serving]: where the other services are, what listens, and on which cores."""

    # Attest's port for services, where backends are registered; [guest] has its port for enrolment.
    attest_endpoint: str
    keybroker_endpoint: str
    https_listen: str = "127.0.0.1:0"
    # The gateway stays on these, and backends never run there.
    gateway_cores: tuple[Core, ...] = (0,)
    # Each backend is pinned to one of these, or to those that its deployment names.
    backend_cores: tuple[Core, ...] = (1,)
    # Uploaded archives: ciphertext and handlers.
    archive_dir: Path
    # How long a deployment may take, from its request to a model that answers.
    load_timeout_s: Annotated[float, Field(gt=0, le=3_600)] = 120.0


class GatewayConfig(ConfigModel):
    """The whole file."""

    service: ServiceSection
    guest: GuestSection
    serving: ServingSection
