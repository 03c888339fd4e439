# SPDX-License-Identifier: Apache-2.0
"""One check with what it wanted and what it got, and the verdict over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True, slots=True)
class Block:
    """One check: what it wanted, what it got, whether that will do."""

    name: str
    ok: bool
    wanted: str
    got: str


@dataclass(frozen=True, slots=True)
class Decision:
    """The verdict and its grounds."""

    blocks: tuple[Block, ...]
    lease: timedelta = timedelta()

    @property
    def granted(self) -> bool:
        """True when there are blocks and every one holds: no blocks grant nothing."""
        return bool(self.blocks) and all(block.ok for block in self.blocks)

    @property
    def failed(self) -> Block | None:
        """The first block that does not hold."""
        return next((block for block in self.blocks if not block.ok), None)
