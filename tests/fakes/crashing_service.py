# SPDX-License-Identifier: Apache-2.0
"""A service for `run_service`: `python crashing_service.py --config FILE`; the file says how it ends."""

from __future__ import annotations

import asyncio
import ctypes
import resource
from pathlib import Path

from cloister.errors import CloisterError, Code
from cloister.runtime.logging import get_logger
from cloister.runtime.main import run_service


async def main(config_path: Path, stop: asyncio.Event) -> None:
    secret_local = "correct-" + "horse"
    match config_path.read_text().strip():
        case "denied":
            raise CloisterError(Code.KEY_DISABLED, what="what it is", why="why it is", todo="what to do")
        case "crash":
            raise RuntimeError(f"it failed with {len(secret_local)}")
        case "core":
            get_dumpable = 3  # linux/prctl.h
            print("core", resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(get_dumpable, 0, 0, 0, 0))
        case _:
            get_logger().info("up")
            await stop.wait()
            get_logger().info("drained")


if __name__ == "__main__":
    run_service(main, "fake")
