# SPDX-License-Identifier: Apache-2.0
"""What an agent tells its gateway: JSON lines on an inherited pipe. The pipe's end is a report too: the agent died.

    {"event": "reached", "milestone": "enrolled"}
    {"event": "worker", "pid": 4711}
    {"event": "failed", "code": "CLO-1304", "what": "...", "why": "...", "todo": "..."}

The agent is code of ours in the same TD, unlike the worker; no line of a worker's output ever comes this way.
"""

from __future__ import annotations

import enum
import json
import os
from dataclasses import dataclass
from typing import Final, TypeAlias

from cloister.errors import CloisterError, Code, code_from_text

MAX_LINE: Final = 16 << 10


class Milestone(enum.StrEnum):
    """What a deployment passes, in this order; the names stand in `Model.timings_s`."""

    UNPACKED = "unpacked"
    MEASURED = "measured"
    ENROLLED = "enrolled"
    KEY_RELEASED = "key-released"
    KEY_HANDED_OVER = "key-handed-over"
    READY = "ready"  # the gateway's own: the worker answered the load


@dataclass(frozen=True, slots=True)
class Reached:
    milestone: Milestone


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    pid: int


@dataclass(frozen=True, slots=True)
class Failed:
    error: CloisterError


Report: TypeAlias = Reached | WorkerStarted | Failed


def encode(report: Report) -> bytes:
    """Return one line."""
    document: dict[str, str | int]
    match report:
        case Reached(milestone):
            document = {"event": "reached", "milestone": milestone}
        case WorkerStarted(pid):
            document = {"event": "worker", "pid": pid}
        case Failed(error):
            texts = {
                name: text[:2000] for name, text in (("what", error.what), ("why", error.why), ("todo", error.todo))
            }
            document = {"event": "failed", "code": error.code.text, **texts}
    return json.dumps(document).encode() + b"\n"


def decode(line: bytes) -> Report:
    """Parse one line; raise ValueError for anything else."""
    match json.loads(line):
        case {"event": "reached", "milestone": str(name)}:
            return Reached(Milestone(name))
        case {"event": "worker", "pid": int(pid)} if pid > 0:
            return WorkerStarted(pid)
        case {"event": "failed", "code": str(code), "what": str(what), "why": str(why), "todo": str(todo)}:
            return Failed(CloisterError(code_from_text(code) or Code.INTERNAL, what=what, why=why, todo=todo))
    raise ValueError("not a report")


class Reporter:
    """The agent's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def send(self, report: Report) -> None:
        """Write one line; a gateway that is gone is no error here, because its end ends the agent anyway."""
        try:
            os.write(self._descriptor, encode(report))
        except BrokenPipeError:
            return
