# SPDX-License-Identifier: Apache-2.0
"""The supervisor process of a local stack: `python -m cloister.cli.stackd`, started by `cloister dev up`.

It runs in a session of its own, reports as JSON lines to a pipe, and ends with everything it started when it is told
to (SIGTERM, SIGINT), when a service dies, or when its lifeline closes because whoever started it is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cloister.cli.launch import RELEASE
from cloister.cli.output import error_document
from cloister.cli.stack import run_stack
from cloister.cli.stackconfig import Kms, StackOptions
from cloister.cli.state import StateDirectory
from cloister.errors import EXIT_CODE, CloisterError
from cloister.runtime.logging import configure


def main(arguments: list[str]) -> int:
    """Run one stack; return the exit code."""
    parser = argparse.ArgumentParser(prog="cloister.cli.stackd", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--options", required=True, help="StackOptions as JSON")
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--lifeline-fd", type=int, required=True)
    given = parser.parse_args(arguments)
    os.umask(0o077)
    configure("stack")
    values = json.loads(given.options)
    options = StackOptions(**(values | {"rank_cores": tuple(values["rank_cores"]), "kms": Kms(values["kms"])}))
    try:
        asyncio.run(_run(StateDirectory(given.state), options, given.report_fd, given.lifeline_fd))
    except CloisterError as error:
        _report(given.report_fd, {"event": "failed", "error": error_document(error)})
        return EXIT_CODE[error.kind]
    return 0


async def _run(state: StateDirectory, options: StackOptions, report_fd: int, lifeline_fd: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    loop.add_reader(lifeline_fd, _on_lifeline, lifeline_fd, stop)

    def report(event: Mapping[str, Any]) -> None:
        _report(report_fd, event)

    await run_stack(state, options, report=report, stop=stop)


def _on_lifeline(descriptor: int, stop: asyncio.Event) -> None:
    """Stop when whoever started this stack is gone, unless it said before that the stack shall go on."""
    if os.read(descriptor, 64) != RELEASE:
        stop.set()
    asyncio.get_running_loop().remove_reader(descriptor)


def _report(descriptor: int, event: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):  # whoever started this stack has detached from it
        os.write(descriptor, json.dumps(event).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
