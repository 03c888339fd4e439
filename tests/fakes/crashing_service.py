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
            dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)  # PR_GET_DUMPABLE
            print("core", resource.getrlimit(resource.RLIMIT_CORE)[0], dumpable)
        case _:
            get_logger().info("up")
            await stop.wait()
            get_logger().info("drained")


if __name__ == "__main__":
    run_service(main, "fake")
