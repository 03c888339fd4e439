# SPDX-License-Identifier: Apache-2.0
"""Quotes through configfs-tsm (Linux: drivers/virt/coco/guest/report.c, Documentation/ABI/testing/configfs-tsm-report).

One request, in a directory of its own below `<root>`:

1. mkdir; `provider` must read "tdx_guest"
2. read `generation`: g
3. write 64 bytes to `inblob`; the kernel takes them at close and tells nobody whether it did
4. read `outblob`: the quote; EBUSY while another quote of this TD is under way
5. read `generation`: only g + 1 means that the quote is over these bytes and no others
6. rmdir
"""

from __future__ import annotations

import errno
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError
from cloister.guest.providers.base import failed, reason
from cloister.guest.providers.kernel import KernelFiles
from cloister.runtime.logging import get_logger
from cloister.tdx.quote import MAX_QUOTE_SIZE
from cloister.tdx.reportdata import REPORT_DATA_SIZE

PROVIDER: Final = "tdx_guest"
_MAX_ATTRIBUTE: Final = 64  # bytes of `provider` and `generation`
_WRAP: Final = 2**64  # `generation` is an unsigned long

# The kernel itself waits up to 30 s for the host; after that the buffer stays the host's until it answers. Waiting
# longer is no use: attest's nonce, which the quote is over, is good for 60 s.
DEADLINE_S: Final = 45.0
_MAX_READS: Final = 200  # of `outblob` within the deadline
_MAX_RACES: Final = 3
_FIRST_PAUSE_S: Final = 0.02
_LAST_PAUSE_S: Final = 1.0
_AGAIN: Final = frozenset({errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.EAGAIN})
_HOST_TODO: Final = "on the host, start the quote generation service (qgsd) and give QEMU its socket; then try again"


class _Raced(Exception):
    """Another write came between: the quote may be over other bytes."""


class ConfigfsQuotes:
    """Quotes of this TD, one directory each; safe from several threads and beside other programs."""

    def __init__(
        self,
        root: Path,
        files: KernelFiles,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root, self._files = root, files
        self._clock, self._pause = clock, pause

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes; waits at most DEADLINE_S, and the kernel's 30 s for one that is under way."""
        if len(report_data) != REPORT_DATA_SIZE:
            raise ValueError(f"report data has {REPORT_DATA_SIZE} bytes, not {len(report_data)}")
        deadline = self._clock() + DEADLINE_S
        for _ in range(_MAX_RACES):
            try:
                return self._in_a_directory(report_data, deadline)
            except _Raced:
                continue
        raise _error(
            f"{_MAX_RACES} times the request did not advance by exactly one generation: "
            "something else writes into it, or the kernel refused it",
            "stop what else uses configfs-tsm in this TD",
        )

    def _in_a_directory(self, report_data: bytes, deadline: float) -> bytes:
        directory = self._root / f"cloister-{secrets.token_hex(8)}"
        self._make(directory)
        try:
            return self._request(directory, report_data, deadline)
        except OSError as error:
            raise _error(reason(error), "look at the kernel's log of this TD (dmesg)") from None
        finally:
            try:
                self._files.remove_directory(directory)
            except OSError as error:
                # The quote is good all the same; the kernel keeps a little memory for nothing.
                get_logger().warning("configfs directory not removed", error=reason(error))

    def _make(self, directory: Path) -> None:
        try:
            self._files.make_directory(directory)
        except OSError as error:
            match error.errno:
                case errno.ENOENT | errno.ENOTDIR:
                    why = f"{self._root} is not there: configfs is not mounted or Linux has no configfs-tsm (6.7)"
                    todo = "`modprobe tsm` and mount configfs; without TDX, use a simulated platform"
                case errno.ENXIO:
                    why = "no attestation driver has registered: not a TDX TD, or its module is not loaded"
                    todo = "run in a TDX TD and `modprobe tdx_guest`; without TDX, use a simulated platform"
                case errno.EACCES | errno.EPERM:
                    why = f"{self._root} may not be written by this user"
                    todo = "run as root, or give this user the directory"
                case _:
                    why, todo = reason(error), "look at the kernel's log of this TD (dmesg)"
            raise _error(why, todo) from None

    def _request(self, directory: Path, report_data: bytes, deadline: float) -> bytes:
        provider = self._files.read(directory / "provider", _MAX_ATTRIBUTE).decode("ascii", "replace").strip()
        if provider != PROVIDER:
            raise _error(f"the attestation driver is {provider}, not {PROVIDER}", "run in a TDX TD")
        before = self._generation(directory)
        self._files.write(directory / "inblob", report_data)
        quote = self._outblob(directory / "outblob", deadline)
        if self._generation(directory) != (before + 1) % _WRAP:
            raise _Raced
        if not quote:
            raise _error("the host answered with an empty quote", _HOST_TODO)
        return quote

    def _outblob(self, path: Path, deadline: float) -> bytes:
        pause_s, last = _FIRST_PAUSE_S, ""
        for _ in range(_MAX_READS):
            try:
                return self._files.read(path, MAX_QUOTE_SIZE)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise _Raced from None  # there is no inblob: the write of ours was refused unseen
                if error.errno == errno.EFBIG:
                    raise _error(f"a quote of more than {MAX_QUOTE_SIZE} bytes", _HOST_TODO) from None
                if error.errno not in _AGAIN:
                    raise
                last = reason(error)
            if self._clock() + pause_s > deadline:
                break
            self._pause(pause_s)
            pause_s = min(pause_s * 2, _LAST_PAUSE_S)
        raise _error(f"the host did not answer in time: {last}", _HOST_TODO)

    def _generation(self, directory: Path) -> int:
        text = self._files.read(directory / "generation", _MAX_ATTRIBUTE).strip()
        if not text.isdigit() or len(text) > 20:
            raise _error("the generation is not a number", "use a kernel with configfs-tsm as it was published")
        return int(text)


def _error(why: str, todo: str) -> CloisterError:
    return failed("configfs-tsm gave no quote", why=why, todo=todo)
