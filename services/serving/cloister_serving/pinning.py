# SPDX-License-Identifier: Apache-2.0
"""Read back which cores every thread of another process may use: a pin that did not hold is an error."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code

_FIELD: Final = "Cpus_allowed_list:"


def cores_of_threads(pid: int) -> dict[int, frozenset[int]]:
    """Return the allowed cores of each thread, as the kernel has them; raise FileNotFoundError for no such process."""
    found: dict[int, frozenset[int]] = {}
    for directory in (Path("/proc") / str(pid) / "task").iterdir():
        try:
            status = (directory / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that ended meanwhile runs nowhere
        line = next(line for line in status.splitlines() if line.startswith(_FIELD))
        found[int(directory.name)] = parse_core_list(line.removeprefix(_FIELD).strip())
    return found


def parse_core_list(text: str) -> frozenset[int]:
    """Parse the kernel's list format: "0-3,8"."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        cores.update(range(int(first), int(last or first) + 1))
    return frozenset(cores)


def check_pinned(pid: int, cores: Collection[int], *, what: str) -> int:
    """Return the number of threads, all on exactly these cores; raise CloisterError(PIN_FAILED) otherwise."""
    wanted = frozenset(cores)
    try:
        found = cores_of_threads(pid)
    except FileNotFoundError:
        found = {}
    strays = {thread: allowed for thread, allowed in found.items() if allowed != wanted}
    if strays or not found:
        thread, allowed = next(iter(strays.items()), (pid, frozenset[int]()))
        raise CloisterError(
            Code.PIN_FAILED,
            what=f"{what} is not pinned to {_shown(wanted)}",
            why=f"thread {thread} may run on {_shown(allowed)}" if found else "the process is gone",
            todo="check the cgroup's cpuset, and that nothing in the handler changes its affinity",
        )
    return len(found)


def _shown(cores: Collection[int]) -> str:
    return ("core " if len(cores) == 1 else "cores ") + ", ".join(map(str, sorted(cores)))
