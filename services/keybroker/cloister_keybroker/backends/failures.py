# SPDX-License-Identifier: Apache-2.0
"""What can go wrong at a custodian, in one form for all of them. `name` is the back end's; no text names a key."""

from __future__ import annotations

from cloister.errors import CloisterError, Code


def unavailable(name: str, why: str, todo: str = "") -> CloisterError:
    """Say that it cannot be reached, or cannot answer now."""
    return CloisterError(
        Code.CUSTODIAN_UNAVAILABLE,
        what=f"the back end {name} does not answer",
        why=why,
        todo=todo or "try again; if it stays so, the operator looks at the back end",
    )


def refused(name: str, why: str, todo: str = "") -> CloisterError:
    """Say that it answers, and does not do this for this broker."""
    return CloisterError(
        Code.CUSTODIAN_REFUSED,
        what=f"the back end {name} refuses this",
        why=why,
        todo=todo or "the operator looks at the back end: see docs/keybroker-backends.md",
    )


def key_lost(name: str) -> CloisterError:
    """Say that a key is not there any more: it was not this broker that deleted it."""
    return CloisterError(
        Code.CUSTODIAN_KEY_LOST,
        what=f"the back end {name} has no such key",
        why="it was deleted there, or the back end was made anew",
        todo="the operator restores the back end from its backup",
    )


def key_disabled(name: str) -> CloisterError:
    """Say that a key is disabled there."""
    return CloisterError(
        Code.KEY_DISABLED,
        what="the key is disabled",
        why=f"it is disabled at the back end {name}",
        todo="its owner enables it: cloister key enable",
    )


def answer_invalid(name: str, why: str) -> CloisterError:
    """Say that an answer is none: another server, a proxy's page, or a damaged store."""
    return CloisterError(
        Code.CUSTODIAN_ANSWER_INVALID,
        what=f"the answer of the back end {name} makes no sense",
        why=why,
        todo="the operator checks what answers at the back end's address",
    )
