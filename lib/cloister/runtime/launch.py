# SPDX-License-Identifier: Apache-2.0
"""Become another program that dies with its supervisor: `python -I -S launch.py PARENT CORES ARGV...`.

Run as a file, with the standard library alone. Doing this between fork and exec instead would run Python in a child of
a process with threads (gRPC's among them), which can hang.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys


def main() -> None:
    """Set the parent-death signal, the cores ("0,1" or "-") and no core dumps, then exec."""
    parent, cores, argv = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    libc = ctypes.CDLL(None)
    libc.prctl(1, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit("the supervisor has ended")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if cores != "-":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    # Python ignores these two; the program should start with the defaults.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - there is no shell here, on purpose
    except OSError as error:
        sys.exit(f"cannot start {argv[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
