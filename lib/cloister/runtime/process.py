# SPDX-License-Identifier: Apache-2.0
"""What a process of ours does to itself: dies with its supervisor, leaves no core, stays on its cores."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36


def lifeline(descriptor: int) -> None:
    """End this process, and its process group if it leads one, when the other end of a pipe is closed.

    The supervisor holds that end and writes nothing; it closes however the supervisor dies, SIGKILL included.
    """
    os.set_inheritable(descriptor, False)
    # The kernel's signal covered the time up to here. It would kill this process alone, before it could take its
    # group with it.
    _prctl(_PR_SET_PDEATHSIG, 0)
    threading.Thread(target=_hold, args=(descriptor,), name="lifeline", daemon=True).start()


def _hold(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1):
            pass
    except OSError:
        pass  # not a pipe any more: nobody holds the other end
    # At once and with the group: there is nobody left who would wait for a graceful end, or reap what remains.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends, instead of init (PR_SET_CHILD_SUBREAPER)."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def harden() -> None:
    """Leave no core dump, and no memory to another process of the same user (ptrace, /proc/PID/mem)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def allow_open_files(wanted: int) -> None:
    """Let this process have so many descriptors, or as many as the system allows: the usual 1,024 are for programs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def pin_to_cores(cores: Collection[int]) -> None:
    """Keep every thread of this process on `cores`, and read back that it is so.

    Threads started later inherit it from the thread that starts them. Raises CloisterError(PIN_FAILED).
    """
    wanted = set(cores)
    allowed = os.sched_getaffinity(0)
    online = set(range(os.cpu_count() or 1))
    if not wanted or not wanted <= online:
        raise _not_pinned(wanted, f"this machine has cores {_spell(online)}")
    # A new thread may appear between listing and setting; it has its creator's mask by the second round.
    for _ in range(2):
        for thread in _threads():
            try:
                os.sched_setaffinity(thread, wanted)
            except ProcessLookupError:
                continue  # it ended meanwhile
            except OSError as error:
                raise _not_pinned(wanted, f"{error.strerror}; allowed here: {_spell(allowed)}") from None
    for thread in _threads():
        found = _affinity(thread)
        if found is not None and found != wanted:
            raise _not_pinned(wanted, f"thread {thread} runs on cores {_spell(found)}")


def _threads() -> list[int]:
    return [int(entry.name) for entry in Path("/proc/self/task").iterdir()]


def _affinity(thread: int) -> set[int] | None:
    try:
        return os.sched_getaffinity(thread)
    except ProcessLookupError:
        return None


def _not_pinned(cores: Iterable[int], why: str) -> CloisterError:
    return CloisterError(
        Code.PIN_FAILED,
        what=f"cannot stay on cores {_spell(cores) or 'none'}",
        why=why,
        todo="ask for cores that are there and that this process may use",
    )


def _spell(cores: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(cores)))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
