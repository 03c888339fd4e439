# SPDX-License-Identifier: Apache-2.0
"""Which platforms a set of collateral is about."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Code

FMSPC_SIZE: Final = 6
_NAME: Final = re.compile(r"(tdx|sgx)-([0-9a-f]{12})-(platform|processor)-(standard|early)")


class Tee(enum.StrEnum):
    """The technology whose quotes are verified."""

    TDX = "tdx"
    SGX = "sgx"


class PckCa(enum.StrEnum):
    """The CA that certifies a platform: Platform for several packages (all servers with TDX), Processor for one."""

    PLATFORM = "platform"
    PROCESSOR = "processor"

    @property
    def common_name(self) -> str:
        """The CA's name in certificates."""
        return f"Intel SGX PCK {self.capitalize()} CA"


class Edition(enum.StrEnum):
    """When a new TCB evaluation begins to count.

    Early: as it is published, so that platforms are out of date at once. Standard: after the time that Intel grants
    operators to update. They are different documents; one never stands in for the other.
    """

    STANDARD = "standard"
    EARLY = "early"


@dataclass(frozen=True, slots=True)
class Family:
    """Platforms that share their collateral."""

    fmspc: bytes  # 6: family, model, stepping, platform type, custom SKU
    ca: PckCa
    tee: Tee
    edition: Edition = Edition.STANDARD

    def __post_init__(self) -> None:
        if len(self.fmspc) != FMSPC_SIZE:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"an FMSPC has {FMSPC_SIZE} bytes, not {len(self.fmspc)}",
                todo="write it as 12 hexadecimal digits, such as b0c06f000000",
            )

    @classmethod
    def of(cls, fmspc: str, ca: str, tee: str, edition: str = "standard") -> Family:
        """Read what a person or a file wrote; raise CloisterError(ARGUMENT_INVALID)."""
        found = _NAME.fullmatch(f"{tee}-{fmspc.lower()}-{ca}-{edition}")
        if found is None:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{fmspc[:20]!r}, {ca[:20]!r}, {tee[:20]!r}, {edition[:20]!r} names no platform family",
                why="an FMSPC is 12 hexadecimal digits; CAs are platform, processor; TEEs tdx, sgx; editions standard, "
                "early",
                todo="`cloister quote show` prints the FMSPC and the CA of a quote",
            )
        return cls(bytes.fromhex(found[2]), PckCa(found[3]), Tee(found[1]), Edition(found[4]))

    @property
    def name(self) -> str:
        """The family as a file name: tdx-b0c06f000000-platform-standard."""
        return f"{self.tee}-{self.fmspc.hex()}-{self.ca}-{self.edition}"

    def __str__(self) -> str:
        return f"FMSPC {self.fmspc.hex()}"
