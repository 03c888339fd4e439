# SPDX-License-Identifier: Apache-2.0
"""The first and last thing a service does: arguments, logging, hardening, signals, exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

import uvloop

from cloister.errors import EXIT_CODE, CloisterError, Kind
from cloister.runtime import logging as cloister_logging
from cloister.runtime.process import allow_open_files, harden, lifeline

_KILLED_BY_USER: Final = 130
_OPEN_FILES: Final = 16_384  # each connection is one, and at a door three


def run_service(
    main: Callable[[Path, asyncio.Event], Awaitable[None]], name: str, argv: Sequence[str] | None = None
) -> NoReturn:
    """Run `main(config_path, stop)` as a service until it returns, then exit.

    SIGTERM and SIGINT set `stop`; a second one ends the process at once. A CloisterError is printed in three lines,
    and its kind gives the exit code.
    """
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", type=Path, required=True, help="TOML file with the service's configuration")
    parser.add_argument("--lifeline-fd", type=int, help="pipe whose closing ends this process")
    arguments = parser.parse_args(argv)
    cloister_logging.configure(name)
    if arguments.lifeline_fd is not None:
        lifeline(arguments.lifeline_fd)
    harden()
    allow_open_files(_OPEN_FILES)
    sys.exit(_run(main, arguments.config))


def _run(main: Callable[[Path, asyncio.Event], Awaitable[None]], config_path: Path) -> int:
    log = cloister_logging.get_logger()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_stopped(main, config_path))
    except CloisterError as error:
        log.error("stopped by an error", error=error.code.text, what=error.what, why=error.why)
        print(error, file=sys.stderr)  # noqa: T201 - for the person at the terminal, or the tail of the log
        return EXIT_CODE[error.kind]
    except KeyboardInterrupt:
        return _KILLED_BY_USER
    except Exception as error:  # the last place that can log it
        log.critical("stopped by an unexpected error", exc_info=error)
        return EXIT_CODE[Kind.INTERNAL]
    return 0


async def _until_stopped(main: Callable[[Path, asyncio.Event], Awaitable[None]], config_path: Path) -> None:
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            os._exit(_KILLED_BY_USER)
        cloister_logging.get_logger().info("stopping")
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await main(config_path, stop)
