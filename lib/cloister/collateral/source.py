# SPDX-License-Identifier: Apache-2.0
"""Where a verifier gets collateral from: a cache in front of a server, or files."""

from __future__ import annotations

from typing import Protocol

from cloister.tdx.collateral import Collateral


class CollateralSource(Protocol):
    """Give collateral that is good now, or say why there is none; never something expired."""

    async def get(self, fmspc: bytes, ca: str, tee: str) -> Collateral:
        """Return the nine parts for a platform family; raise CloisterError (COLLATERAL_*).

        `fmspc` (6 bytes) and `ca` ("platform", "processor") are of a PCK certificate that verified: names that anyone
        could send would become requests to the server. `tee` is "tdx" or "sgx".
        """
        ...
