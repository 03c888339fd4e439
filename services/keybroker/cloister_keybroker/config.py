# SPDX-License-Identifier: Apache-2.0
"""The broker's configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from cloister.runtime.config import ConfigModel, GuestSection, ServiceSection

STORE_FILE: Final = "keybroker.sqlite"  # in service.state_dir


class KeybrokerSection(ConfigModel):
    """[keybroker]: the embedded store's root key, by path; made once by `python -m cloister_keybroker init`."""

    root_key_file: Path


class Config(ConfigModel):
    """The whole file."""

    service: ServiceSection
    guest: GuestSection
    keybroker: KeybrokerSection
