# SPDX-License-Identifier: Apache-2.0
"""Read ranks' log files as lines, and go on as they grow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.2
_CHUNK: Final = 64 * 1024
MAX_LINE_BYTES: Final = 8 * 1024  # longer ones are given in pieces


class _Tail:
    """One file: lines that have ended so far."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""

    def read(self, *, to_the_end: bool) -> list[str]:
        """Return new lines, at most one chunk of them; with `to_the_end`, an unended last one too."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(_CHUNK)
        except FileNotFoundError:
            return []
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES or (to_the_end and self._rest and not data):
            lines, self._rest = [*lines, self._rest], b""
        return [
            line[at : at + MAX_LINE_BYTES].decode("utf-8", "replace")
            for line in lines
            for at in range(0, max(len(line), 1), MAX_LINE_BYTES)
        ]


async def follow(paths: Mapping[int, Path], *, go_on: Callable[[], bool]) -> AsyncIterator[tuple[int, str]]:
    """Yield (rank, line) of all files; wait for more while `go_on()` says that there may be."""
    tails = {rank: _Tail(path) for rank, path in paths.items()}
    while True:
        # Asked before reading: what was written until then is read before the loop ends.
        more = go_on()
        found = False
        for rank, tail in tails.items():
            for line in await asyncio.to_thread(tail.read, to_the_end=not more):
                found = True
                yield rank, line
        if not found and not more:
            return
        if not found:
            await asyncio.sleep(_POLL_S)
