# SPDX-License-Identifier: Apache-2.0
"""One line of a verdict: what was wanted, what was there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check, in public text, for logs, answers and reports."""

    name: str  # the row id of a quote check ("P2"), or the name of a policy block
    ok: bool
    wanted: str
    got: str
