# SPDX-License-Identifier: Apache-2.0
"""What EHSM's refusals are to the broker's callers. Nothing that EHSM wrote is in their text."""

from __future__ import annotations

from cloister.errors import CloisterError, Code
from cloister_keybroker.backends import failures
from cloister_keybroker.backends.ehsm.answers import Outcome, Refusal


class Undone(CloisterError):
    """A failure after which nothing was changed there, for sure."""

    @classmethod
    def of(cls, error: CloisterError) -> Undone:
        return cls(error.code, what=error.what, why=error.why, todo=error.todo)


def refusal_error(name: str, refusal: Refusal, skew_s: float | None) -> CloisterError:
    """Return the error for a refusal; `skew_s` is how far EHSM's clock is ahead."""
    match refusal.outcome:
        case Outcome.KEY_LOST:
            return failures.key_lost(name)
        case Outcome.KEY_DISABLED:
            return failures.key_disabled(name)
        case Outcome.KEY_EXPIRED:
            return CloisterError(
                Code.CUSTODIAN_KEY_LOST,
                what=f"the back end {name} does not use this key any more",
                why="it is a year old, and was not re-wrapped in time",
                todo="the operator restores the back end from its backup, sets its clock back, and re-wraps",
            )
        case Outcome.NOT_OPENED:
            return failures.refused(
                name, "it does not open what the store says it wrapped", "the stored key is damaged"
            )
        case Outcome.CREDENTIALS:
            return failures.refused(
                name,
                "it does not know the broker's appid, or its API key is another",
                "the operator checks the files that keybroker.backend names as appid and apikey",
            )
        case Outcome.CLOCK:
            told = "" if skew_s is None else f": its own is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}"
            return failures.refused(
                name, f"it says that this machine's clock is wrong{told}", "set both clocks, by NTP or PTP"
            )
        case Outcome.REPEATED:
            return failures.unavailable(name, "it takes every attempt for one that it has seen")
        case Outcome.TROUBLE:
            return failures.unavailable(name, "its database or its enclave fails")
        case Outcome.UNKNOWN_ACTION:
            return failures.refused(name, "it is too old to know this action")
        case Outcome.REQUEST:
            return failures.refused(name, "it does not accept the broker's request; the broker's log has its words")


def no_answer(name: str, why: str, *, sent: bool) -> CloisterError:
    """Return the error for an exchange without an answer."""
    error = failures.unavailable(name, why)
    return error if sent else Undone.of(error)


def not_the_server(name: str, why: str) -> CloisterError:
    """Return the error for a certificate that is not the configured one."""
    todo = "find out who answers there; after a planned change of its certificate, correct ca or pin"
    return Undone.of(failures.refused(name, why, todo))
