# SPDX-License-Identifier: Apache-2.0
"""What every provider offers, and the one error in which their failures end."""

from __future__ import annotations

from typing import Final, Protocol

from cloister.errors import CloisterError, Code

DIGEST_SIZE: Final = 48  # SHA-384
EXTENDABLE: Final = (2, 3)  # the registers that software in a TD can extend
_MAX_TEXT: Final = 500


class QuoteProvider(Protocol):
    """One TD's view of its platform. Raises CloisterError(QUOTE_PROVIDER_FAILED) when the platform does not answer."""

    @property
    def boot_log(self) -> bytes:
        """Event log (JSON) of what was measured before this code ran: RTMR0..2."""

    def extend(self, index: int, digest: bytes) -> bytes:
        """Extend RTMR2 or RTMR3 with 48 bytes; return the register's new value."""

    def quote(self, report_data: bytes) -> bytes:
        """Return a TD quote over 64 bytes."""

    def close(self) -> None:
        """End the use of the platform; a simulated TD ends with it."""


class QuoteSource(Protocol):
    """Where a real TD has its report turned into a quote."""

    def quote(self, report_data: bytes) -> bytes:
        """Return what the platform calls a quote over 64 bytes: of bounded size, not looked into."""


def failed(what: str, *, why: str, todo: str) -> CloisterError:
    """Return the error of a platform that gave nothing usable; `why` may hold words of the platform's."""
    # Not only ASCII but printable: no escape sequences on a terminal.
    text = "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in why[:_MAX_TEXT])
    return CloisterError(Code.QUOTE_PROVIDER_FAILED, what=what, why=text[:_MAX_TEXT], todo=todo)


def reason(error: OSError) -> str:
    """Return the system's words for an error."""
    return error.strerror or str(error) or type(error).__name__
