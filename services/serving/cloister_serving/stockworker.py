# SPDX-License-Identifier: Apache-2.0
"""Start the stock TorchServe worker (PyPI `torchserve`, `ts/model_service_worker.py`) with this Python, without Java.

What it executes is what was measured: the handler's bytes go into a sealed memfd as a zip archive, and that memfd is
the worker's module path, so a file changed on disk after the measurement runs nowhere. What it prints is not trusted,
not stored and not parsed: a handler can forge the frontend's control lines and can print requests.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import io
import itertools
import os
import re
import sys
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.runtime import launch
from cloister.runtime.descendants import MARK
from cloister_serving.worker import printable

# The stock worker wants a name that ends in a dot and a number, and a relative one keeps below 107 bytes.
SOCKET_NAME: Final = "worker.0"
KEY_SOCKET_NAME: Final = "key.sock"
KEY_SOCKET_VARIABLE: Final = "CLOISTER_KEY_SOCKET"
_TAIL_BYTES: Final = 16 << 10  # of the worker's output, kept in memory for the last line of a failed load
# MARK is how a supervisor finds what a handler may have started and left behind.
_KEPT_VARIABLES: Final = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "VIRTUAL_ENV", MARK)
_LAUNCH: Final = Path(launch.__file__)
_MESSAGE_LINES: Final = 3  # of an exception: what, why, todo
_EXCEPTION_LINE: Final = re.compile(rb"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning)\b.*")
# What the worker makes of a handler's RuntimeError before it ends, and what it prints behind one.
_WORKERS_OWN: Final = re.compile(rb"RuntimeError: \d{3} - ")
_NEXT: Final = re.compile(rb"Traceback |Backend worker process died")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that no other can be taken for: process ids are used again, start times are not."""

    pid: int
    start_time: int  # clock ticks after boot (proc(5), stat field 22)
    uid: int

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity:
        """Read it from the kernel; raises FileNotFoundError when there is no such process."""
        directory = Path("/proc") / str(pid)
        # The second field is the command in brackets, which may hold blanks and brackets itself.
        fields = (directory / "stat").read_text().rpartition(")")[2].split()
        return cls(pid, int(fields[19]), directory.stat().st_uid)


class OutputTail:
    """The last few KiB a worker printed, in memory only."""

    def __init__(self) -> None:
        self._kept = bytearray()
        self._keeping = True

    async def drain(self, stream: asyncio.StreamReader) -> None:
        """Read until the end, so that the worker never blocks on a full pipe."""
        while chunk := await stream.read(_TAIL_BYTES):
            if self._keeping:
                self._kept += chunk
                del self._kept[:-_TAIL_BYTES]

    def forget(self) -> None:
        """Drop what was kept and keep nothing more: from the first request on, it may hold payloads."""
        self._keeping = False
        self._kept.clear()

    def last_exception(self) -> str:
        """Return the last Python exception in it, with the lines of its message, as one line; or nothing."""
        lines = self._kept.split(b"\n")
        for index in range(len(lines) - 1, -1, -1):
            if _EXCEPTION_LINE.match(lines[index]) and not _WORKERS_OWN.match(lines[index]):
                message = itertools.takewhile(lambda line: not _NEXT.match(line), lines[index : index + _MESSAGE_LINES])
                texts = [line.decode(errors="replace").strip() for line in message]
                return printable("; ".join(text for text in texts if text))
        return ""


def handler_memfd(file_name: str, source: bytes) -> int:
    """Return a sealed memfd with a zip archive of this one module, inheritable by a worker."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo(file_name), source)
    descriptor = os.memfd_create("cloister-handler", os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(packed.getvalue())
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def command() -> list[str]:
    """Return the argument list of a worker that listens on SOCKET_NAME in its working directory."""
    found = importlib.util.find_spec("ts")
    if found is None or not found.submodule_search_locations:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="the package torchserve is not installed",
            why="models are served by its worker",
            todo="pip install 'cloister[serve]'",
        )
    home = Path(found.submodule_search_locations[0])
    script, metrics = str(home / "model_service_worker.py"), str(home / "configs" / "metrics.yaml")
    listen = ["--sock-type", "unix", "--sock-name", SOCKET_NAME]
    return [sys.executable, "-u", script, *listen, "--metrics-config", metrics]


def environment(*, handler_fd: int, threads: int, home: Path) -> dict[str, str]:
    """Return the whole environment of a worker: names from a list, and never a secret."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return kept | {
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": f"/proc/self/fd/{handler_fd}",
        "PYTHONDONTWRITEBYTECODE": "1",
        # More threads than cores spin against each other: many times the CPU of one request.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TS_DECODE_INPUT_REQUEST": "false",
        "HF_HUB_OFFLINE": "1",
        KEY_SOCKET_VARIABLE: KEY_SOCKET_NAME,
    }


async def start(
    directory: Path, *, handler_fd: int, cores: Collection[int], threads: int | None = None
) -> asyncio.subprocess.Process:
    """Start a worker in the directory, pinned before its first instruction; it dies with this thread."""
    spelled = ",".join(map(str, sorted(cores)))
    prepare = [sys.executable, "-I", "-S", str(_LAUNCH), str(os.getpid()), spelled]
    return await asyncio.create_subprocess_exec(
        *prepare,
        *command(),
        cwd=directory,
        env=environment(handler_fd=handler_fd, threads=threads or len(cores), home=directory),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=(handler_fd,),
        start_new_session=True,
    )
