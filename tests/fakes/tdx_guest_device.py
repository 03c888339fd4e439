# SPDX-License-Identifier: Apache-2.0
"""A stand-in for /dev/tdx_guest: an ioctl that answers TDX_CMD_GET_REPORT0 with the TD report of a simulated TD.

The device node itself is an ordinary file; ioctl on those is refused by Linux, so the call is what is injected. TD
reports have the layout of the TDX module (Intel TDX Module ABI, TDREPORT_STRUCT) and a MAC under a key that only this
"machine" has, as the real ones do.
"""

from __future__ import annotations

import errno
import hmac
import os
import stat
from collections.abc import Callable

from cloister.tdx.quote import TdBody
from cloister_sim import SimulatedTd

GET_REPORT0 = 0xC4405401  # _IOWR('T', 1, 1088 bytes)
_MACHINE_KEY = b"only the CPU of this machine knows this"


def td_report(body: TdBody) -> bytes:
    """Return the TD report (1,024 bytes) that says what a quote's body says."""
    report = bytearray(1024)
    report[0] = 0x81  # TEE type TDX
    report[128:192] = body.report_data
    report[256:264] = b"\xff\x01" + bytes(6)  # valid bits of TEE_TCB_INFO
    report[264:384] = body.tee_tcb_svn + body.mr_seam + body.mr_signer_seam + body.seam_attributes
    info = body.td_attributes + body.xfam + body.mr_td + body.mr_config_id + body.mr_owner + body.mr_owner_config
    report[512:912] = info + b"".join(body.rtmrs)
    report[224:256] = _mac(report)
    return bytes(report)


def read_td_report(report: bytes) -> TdBody | None:
    """Return what a TD report of this machine says, or None for anything else: the quoting enclave's view."""
    if len(report) != 1024 or report[0] != 0x81 or not hmac.compare_digest(report[224:256], _mac(report)):
        return None
    cuts = iter(report[264:384] + report[512:912] + report[128:192])

    def take(size: int) -> bytes:
        return bytes(next(cuts) for _ in range(size))

    head = [take(size) for size in (16, 48, 48, 8, 8, 8, 48, 48, 48, 48)]
    rtmrs = (take(48), take(48), take(48), take(48))
    return TdBody(*head, rtmrs, take(64))


def _mac(report: bytes | bytearray) -> bytes:
    return hmac.digest(_MACHINE_KEY, bytes(report[:224]) + bytes(report[256:]), "sha256")


class FakeTdxGuest:
    """`Kernel.ioctl` for one simulated TD; `forge` changes the report, `error` is a number to fail with."""

    def __init__(self, td: SimulatedTd) -> None:
        self._td = td
        self.forge: Callable[[bytes], bytes] = lambda report: report
        self.error = 0
        self.calls = 0

    def __call__(self, descriptor: int, request: int, buffer: bytearray) -> int:
        self.calls += 1
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if request != GET_REPORT0:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        buffer[64:1088] = self.forge(td_report(self._td.report(bytes(buffer[:64]))))
        return 0
