# SPDX-License-Identifier: Apache-2.0
"""Run one case of an outside suite: a line of JSON in, a line of JSON out.

    in   {"id", "quote_hex", "collateral": {nine strings}, "root_der_b64", "now": unix seconds,
          "policy": "verify" | "default"}
    out  {"id", "verdict": "accept" | "reject" | null, "status", "advisory_ids", "check", "error"}

"verify" is cryptography and TCB; "default" adds the strict default policy, all but what depends on who asks (A9, A10).
`check` and `error` say why not. A line that is no case has verdict null: that is not a rejection.
"""

from __future__ import annotations

import base64
import binascii
import json
from datetime import UTC, datetime
from typing import Any, Final

from cloister.errors import CloisterError
from cloister.tdx.collateral import MAX_COLLATERAL_SIZE, Collateral
from cloister.tdx.defaultpolicy import appraise_platform
from cloister.tdx.quote import QuoteRejected
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verify import Verdict, verify_with_collateral

MAX_CASE_SIZE: Final = 2 * MAX_COLLATERAL_SIZE  # bytes of one line

_POLICIES: Final = ("verify", "default")
_END_OF_TIME: Final = 253_402_300_799  # the last second that a datetime has


class CaseError(ValueError):
    """A line that is no case."""


def run_case(line: bytes) -> bytes:
    """Return the answer to one case, without a newline. Never raises."""
    case_id: object = None
    try:
        case = _parse(line)
        case_id = case.get("id")
        answer = _answer(case)
    except CaseError as error:
        answer = {"verdict": None, "status": None, "advisory_ids": [], "check": None, "error": str(error)}
    # An id of another kind is given back as it came: JSON in, JSON out.
    return json.dumps({"id": case_id} | answer).encode()


def _answer(case: dict[str, Any]) -> dict[str, Any]:
    policy = case.get("policy", "verify")
    if policy not in _POLICIES:
        raise CaseError(f"policy is not one of {', '.join(_POLICIES)}")
    quote, root_der = _quote(case), _root(case)
    collateral = case.get("collateral")
    if not isinstance(collateral, dict):
        raise CaseError("collateral is not an object of nine strings")
    try:
        root = TrustRoot(root_der, simulated=True)
        verdict = verify_with_collateral(quote, Collateral.of(collateral), roots=[root], now=_now(case))
    except QuoteRejected as error:
        return _rejected(error.check, error.reason)
    except CloisterError as error:
        return _rejected("P2", f"{error.what}: {error.why}")
    return _judged(verdict, policy)


def _judged(verdict: Verdict, policy: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "verdict": "accept",
        "status": str(verdict.status),
        "advisory_ids": list(verdict.advisories),
        "check": None,
        "error": None,
    }
    failure = appraise_platform(verdict).first_failure if policy == "default" else None
    if failure is not None:
        reason = f"wanted {failure.wanted}, got {failure.got}"
        answer |= {"verdict": "reject", "check": failure.name, "error": reason}
    return answer


def _rejected(check: str, reason: str) -> dict[str, Any]:
    return {"verdict": "reject", "status": None, "advisory_ids": [], "check": check, "error": reason}


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_CASE_SIZE:
        raise CaseError(f"a line of {len(line)} bytes; at most {MAX_CASE_SIZE}")
    try:
        case = json.loads(line.decode())
    except (ValueError, RecursionError):
        raise CaseError("the line is not UTF-8 JSON") from None
    if not isinstance(case, dict):
        raise CaseError("the line is not an object")
    return case


def _quote(case: dict[str, Any]) -> bytes:
    text = case.get("quote_hex")
    if not isinstance(text, str):
        raise CaseError("quote_hex is missing")
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise CaseError("quote_hex is not hex") from None


def _root(case: dict[str, Any]) -> bytes:
    text = case.get("root_der_b64")
    if not isinstance(text, str):
        raise CaseError("root_der_b64 is missing")
    try:
        return base64.b64decode(text.encode(), validate=True)
    except (ValueError, binascii.Error):
        raise CaseError("root_der_b64 is not base64") from None


def _now(case: dict[str, Any]) -> datetime:
    """Return the time; numbers that are none in our bounds are a matter for row X1, not malformed."""
    now = case.get("now")
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise CaseError("now is not a number of seconds")
    if not 0 <= now <= _END_OF_TIME:  # NaN is not
        raise QuoteRejected("X1", f"{now} is no time between 2018 and 2100, in seconds")
    return datetime.fromtimestamp(now, UTC)
