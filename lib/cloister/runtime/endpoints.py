# SPDX-License-Identifier: Apache-2.0
"""Where a service listens, told to the rest of a local stack: a small JSON file that appears when it is ready."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code

_MAX_BYTES: Final = 16 * 1024


def write_endpoints(path: Path, endpoints: Mapping[str, str]) -> None:
    """Write `{"grpc": "127.0.0.1:40123", ...}`; the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(dict(endpoints), indent=2, sort_keys=True).encode() + b"\n", mode=0o644)


def read_endpoints(path: Path) -> dict[str, str]:
    """Read what `write_endpoints` wrote; raise CloisterError(FILE_NOT_FOUND) while the service is not ready."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        found = json.loads(data) if len(data) <= _MAX_BYTES else None
    except FileNotFoundError:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"{path} is not there",
            why="the service writes it when it is ready",
            todo="wait for the service, or look at its log",
        ) from None
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CloisterError(Code.CONFIG_INVALID, what=f"{path} is not an endpoints file", todo="restart the service")
    return found
