# SPDX-License-Identifier: Apache-2.0
"""Run a simulated platform: python -m cloister_sim --directory DIR --socket PATH [--lifeline-fd N]."""

from __future__ import annotations

import argparse
import asyncio
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cloister.errors import EXIT_CODE, CloisterError
from cloister_sim.ending import end_event
from cloister_sim.platform import SimulatedPlatform
from cloister_sim.server import SimulatorServer

COLLATERAL: Final = "collateral"  # below DIR: bundles that are valid for thirty days, and renewed every day
_REFRESH_S: Final = 86_400.0


async def run(directory: Path, path: Path, lifeline_fd: int | None) -> None:
    """Serve until SIGTERM, SIGINT, or the other end of the lifeline closes."""
    stop = end_event(lifeline_fd)
    platform = SimulatedPlatform.create(directory)
    # Before the socket is there: whoever gets a quote can have it verified.
    platform.publish(directory / COLLATERAL, datetime.now(UTC))
    server = SimulatorServer(platform, path)
    await server.start()
    sys.stdout.write(f"simulated platform ready on {path}\n")
    sys.stdout.flush()
    try:
        while not await _set_within(stop, _REFRESH_S):
            platform.publish(directory / COLLATERAL, datetime.now(UTC))
    finally:
        await server.stop()


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cloister_sim", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="keys and certificates; made at the first start")
    parser.add_argument("--socket", type=Path, required=True, help="Unix socket to serve")
    parser.add_argument("--lifeline-fd", type=int, help="end when this pipe does")
    arguments = parser.parse_args()
    try:
        asyncio.run(run(arguments.directory, arguments.socket, arguments.lifeline_fd))
    except CloisterError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_CODE[error.kind]
    return 0


if __name__ == "__main__":
    sys.exit(main())
