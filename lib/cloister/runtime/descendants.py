# SPDX-License-Identifier: Apache-2.0
"""Find processes in /proc: children, their children, and those that ran away from them."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

MARK: Final = "CLOISTER_SUPERVISOR"
"""An environment variable that descendants inherit: the marks of all supervisors above, split by ";". No secret."""


@dataclass(frozen=True, slots=True)
class ProcessInfo:
    """One line of /proc."""

    pid: int
    parent: int
    session: int
    zombie: bool


def all_processes() -> dict[int, ProcessInfo]:
    """Return every process that is there now, by pid."""
    found = {}
    for entry in os.scandir("/proc"):
        if entry.name.isdigit() and (info := _read(int(entry.name))) is not None:
            found[info.pid] = info
    return found


def family(roots: Collection[int], mark: str) -> list[ProcessInfo]:
    """Return the living processes that belong to `roots` (pids of session leaders).

    They are the roots, what descends from them or shares their sessions, and whatever carries the mark in its
    environment: a grandchild whose parent ended and which made a session of its own is found by that.
    """
    processes = all_processes()
    members = {info.pid for info in processes.values() if info.pid in roots or info.session in roots}
    members |= {pid for pid in processes if pid not in members and _is_marked(pid, mark)}
    grown = True
    while grown:
        more = {info.pid for info in processes.values() if info.parent in members} - members
        grown = bool(more)
        members |= more
    members.discard(os.getpid())
    return [processes[pid] for pid in sorted(members) if not processes[pid].zombie]


def _read(pid: int) -> ProcessInfo | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # it has ended meanwhile
        return None
    # The name in parentheses may hold anything, parentheses and spaces too.
    state, parent, _group, session = text[text.rindex(")") + 2 :].split(" ")[:4]
    return ProcessInfo(pid, int(parent), int(session), state in "ZX")


def _is_marked(pid: int, mark: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # ended, or not ours to read
        return False
    prefix = f"{MARK}=".encode()
    for variable in variables:
        if variable.startswith(prefix):
            marks = variable.removeprefix(prefix).decode("ascii", "replace").split(";")
            return any(found == mark or found.startswith(f"{mark}.") for found in marks)
    return False
