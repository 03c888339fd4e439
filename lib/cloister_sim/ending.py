# SPDX-License-Identifier: Apache-2.0
"""When a simulator's process ends: on SIGTERM, SIGINT, or when whoever started it is gone."""

from __future__ import annotations

import asyncio
import os
import signal

from cloister.errors import CloisterError, Code


def end_event(lifeline_fd: int | None) -> asyncio.Event:
    """Return an event that is set when this process shall end; raise CloisterError when the pipe cannot be watched."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline_fd is not None:
        _watch(lifeline_fd, stop)
    return stop


def _watch(descriptor: int, stop: asyncio.Event) -> None:
    """Set `stop` when the pipe that the parent holds ends."""

    def readable() -> None:
        if not os.read(descriptor, 1024):
            asyncio.get_running_loop().remove_reader(descriptor)
            stop.set()

    try:
        asyncio.get_running_loop().add_reader(descriptor, readable)
    except OSError as error:
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what=f"--lifeline-fd {descriptor} cannot be watched",
            why=error.strerror or str(error),
            todo="pass the read end of an open pipe",
        ) from error
