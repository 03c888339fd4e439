# SPDX-License-Identifier: Apache-2.0
"""Cloister: attested PyTorch training and serving inside Intel TDX trust domains."""

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: whoever only wants the version, or serves, has no use for the owner's side.
    if name == "session":
        return importlib.import_module("cloister.cli.ownersession").session
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
