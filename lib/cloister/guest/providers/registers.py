# SPDX-License-Identifier: Apache-2.0
"""RTMRs through tsm-mr sysfs (Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest; Linux 6.16).

`<root>/rtmr<n>:sha384` reads as 48 bytes; writing 48 bytes at offset 0 extends: new = SHA-384(old || written).
"""

from __future__ import annotations

import hmac
from pathlib import Path

from cloister.errors import CloisterError
from cloister.guest.providers.base import DIGEST_SIZE, failed, reason
from cloister.guest.providers.kernel import KernelFiles
from cloister.tlv import sha384


class Registers:
    """The four RTMRs of this TD. Not for several threads at once."""

    def __init__(self, root: Path, files: KernelFiles) -> None:
        self._root, self._files = root, files

    def read(self, index: int) -> bytes:
        """Return the value of RTMR `index` (48 bytes)."""
        try:
            value = self._files.read(self._path(index), DIGEST_SIZE)
        except (FileNotFoundError, NotADirectoryError):
            raise failed(
                "this machine shows no RTMRs",
                why=f"{self._path(index)} is not there: not a TDX TD, its module is not loaded, or Linux before 6.16",
                todo="run in a TDX TD with Linux 6.16 or later and `modprobe tdx_guest`; without TDX, "
                "use a simulated platform",
            ) from None
        except OSError as error:
            raise _error(index, f"reading: {reason(error)}") from None
        if len(value) != DIGEST_SIZE:
            raise _error(index, f"it reads as {len(value)} bytes, not {DIGEST_SIZE}")
        return value

    def extend(self, index: int, digest: bytes) -> bytes:
        """Extend RTMR `index` with 48 bytes, make sure that it happened, and return the new value."""
        before = self.read(index)
        try:
            self._files.write(self._path(index), digest)
        except OSError as error:
            raise _error(index, f"extending: {reason(error)}") from None
        after = self.read(index)
        if hmac.compare_digest(after, sha384(before, digest)):
            return after
        if after == before:
            raise _error(index, "it did not change when it was extended")
        raise _error(index, "it holds another value than this extension gives: something else extends it, too")

    def _path(self, index: int) -> Path:
        return self._root / f"rtmr{index}:sha384"


def _error(index: int, why: str) -> CloisterError:
    return failed(
        f"RTMR{index} cannot be used",
        why=why,
        todo="run as root in a TD of its own, with nothing else in it that extends this register",
    )
