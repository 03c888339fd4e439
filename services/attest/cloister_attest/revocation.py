# SPDX-License-Identifier: Apache-2.0
"""From a denial to certificates that end: what is out already is told to everybody who checks certificates."""

from __future__ import annotations

from cloister.identity import SpiffeId
from cloister.runtime.logging import get_logger
from cloister_attest.ca import WorkloadCa
from cloister_attest.issued import IssuedRegister


class Revocation:
    """Ends certificates before their time."""

    def __init__(self, ca: WorkloadCa, issued: IssuedRegister) -> None:
        self._ca = ca
        self._issued = issued

    async def tell(self) -> tuple[int, bool]:
        """Tell what the deny-list ends now; return how many certificates more, and whether all could be told."""
        before = self._ca.told.trust.revoked.certificates
        ended = await self._ca.revoke()
        if not ended.complete:
            get_logger().error("more certificates are revoked than can be told; retire the epoch to end them all")
        return len(ended.unexpired - before), ended.complete

    async def strike(self, who: SpiffeId) -> int:
        """End all certificates of an identity for good; return how many that are."""
        await self._issued.strike(str(who))
        count, _ = await self.tell()
        return count
