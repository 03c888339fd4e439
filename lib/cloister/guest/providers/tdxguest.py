# SPDX-License-Identifier: Apache-2.0
"""TD reports from /dev/tdx_guest (Linux 6.2, include/uapi/linux/tdx-guest.h), for kernels without configfs-tsm.

TDX_CMD_GET_REPORT0 = _IOWR('T', 1, struct {u8 reportdata[64]; u8 tdreport[1024];}). A TD report is MACed, not
signed: only the quoting enclave of this very host can turn it into a quote.
"""

from __future__ import annotations

import errno
import hmac
import os
from pathlib import Path
from typing import Final, NoReturn

from cloister.guest.providers.base import failed, reason
from cloister.guest.providers.kernel import Ioctl
from cloister.guest.providers.qgs import TDREPORT_SIZE, QgsClient
from cloister.tdx.quote import TEE_TDX
from cloister.tdx.reportdata import REPORT_DATA_SIZE

_REQUEST_SIZE: Final = REPORT_DATA_SIZE + TDREPORT_SIZE
TDX_CMD_GET_REPORT0: Final = 3 << 30 | _REQUEST_SIZE << 16 | ord("T") << 8 | 1
_REPORT_DATA: Final = slice(128, 192)  # in the TD report: REPORTMACSTRUCT.REPORTDATA


class TdxGuestQuotes:
    """Quotes of this TD by way of its TD report."""

    def __init__(self, device: Path, ioctl: Ioctl, qgs: QgsClient) -> None:
        self._device, self._ioctl, self._qgs = device, ioctl, qgs

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes."""
        return self._qgs.quote(self.report(report_data))

    def report(self, report_data: bytes) -> bytes:
        """Return this TD's report over 64 bytes (1,024 bytes)."""
        if len(report_data) != REPORT_DATA_SIZE:
            raise ValueError(f"report data has {REPORT_DATA_SIZE} bytes, not {len(report_data)}")
        request = bytearray(report_data) + bytearray(TDREPORT_SIZE)
        try:
            descriptor = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            try:
                self._ioctl(descriptor, TDX_CMD_GET_REPORT0, request)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._no_report(error)
        report = bytes(request[REPORT_DATA_SIZE:])
        if len(request) != _REQUEST_SIZE or report[0] != TEE_TDX:
            self._fail("what the device returned is no TD report", "use the tdx_guest module of the Linux kernel")
        if not hmac.compare_digest(report[_REPORT_DATA], report_data):
            self._fail("the TD report is over other report data", "use the tdx_guest module of the Linux kernel")
        return report

    def _no_report(self, error: OSError) -> NoReturn:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            self._fail(
                f"{self._device} is not there: not a TDX TD, or its module is not loaded",
                "run in a TDX TD and `modprobe tdx_guest`; without TDX, use a simulated platform",
            )
        if error.errno in (errno.EACCES, errno.EPERM):
            self._fail(f"{self._device} may not be used by this user", "run as root, or give this user the device")
        if error.errno == errno.ENOTTY:
            self._fail(f"{self._device} is not the device of Linux' tdx_guest", "use the tdx_guest module of Linux 6.2")
        self._fail(reason(error), "look at the kernel's log of this TD (dmesg)")

    @staticmethod
    def _fail(why: str, todo: str) -> NoReturn:
        raise failed("no TD report could be had", why=why, todo=todo) from None
