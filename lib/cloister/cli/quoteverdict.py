# SPDX-License-Identifier: Apache-2.0
"""What `cloister quote verify` finds out about one quote, as one document: answer, table and report show the same.

The order is that of docs/attestation.md, except that the quote's own signatures come before collateral: for a quote
that nobody certified nothing is asked of any server. A quote that is rejected lists what held until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from cloister.cli.collateralsource import require_of_time
from cloister.cli.output import error_document
from cloister.collateral.commands import family_of
from cloister.collateral.family import Edition, Family
from cloister.errors import EXIT_CODE, CloisterError, Code
from cloister.tdx.check import Check
from cloister.tdx.collateral import Collateral, verify_collateral
from cloister.tdx.defaultpolicy import appraise_platform
from cloister.tdx.pckchain import PckChain, verify_pck_chain
from cloister.tdx.quote import AnyQuote, Quote, QuoteRejected, parse_quote
from cloister.tdx.show import describe
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verify import Verdict, authenticate, sane_time, verify_with_collateral

if TYPE_CHECKING:
    from cloister.cli.quote import Policy

Source = Callable[[Family], tuple[Collateral, str]]  # collateral, and where it is from


class Outcome(StrEnum):
    """The two answers; that there is none (collateral is missing, or of another time) is an error."""

    ACCEPT = "accept"
    REJECT = "reject"


def examine(
    data: bytes,
    source: Source,
    *,
    root: TrustRoot,
    now: datetime,
    policy: Policy,
    fixed: bool = False,
    edition: Edition = Edition.STANDARD,
) -> dict[str, Any]:
    """Verify a quote, and appraise it when `policy` is the default one; return the document.

    `fixed` says that somebody chose `now`, so that an error about the time of collateral is not about a clock.
    Raises CloisterError when collateral cannot be had, or is not of this time: that is no verdict on the quote.
    """
    document = _blank(root, now, policy)
    held: list[Check] = []
    try:
        quote = _read(data, now, held)
        document |= _facts_of_quote(quote)
        chain = verify_pck_chain(quote.signature.pck_chain_pem, roots=[root], now=now)
        document |= _facts_of_chain(chain)
        held += chain.checks
        authenticate(quote, chain)
        held.append(Check("E1-E4, Q7", True, "PCK key, quoting enclave and attestation key sign in turn", "verified"))
        family = family_of(data, roots=[root], edition=edition)
        collateral, document["collateral"] = source(family)
        try:
            verdict = verify_with_collateral(data, collateral, roots=[root], now=now)
        except QuoteRejected:
            held += _checks_of_collateral(collateral, chain, family, now, fixed=fixed)
            raise
    except QuoteRejected as rejected:
        failed = Check(rejected.check, False, f"row {rejected.check} of docs/attestation.md", rejected.reason)
        document["checks"] = _rows([*held, failed])
        return document | _rejected(Code.QUOTE_REJECTED, failed, "the quote does not verify")
    document |= _facts_of_verdict(verdict)
    if policy == "default":
        appraisal = appraise_platform(verdict)
        document["policy_checks"] = _rows(appraisal.checks)
        if appraisal.first_failure is not None:
            what = "the quote is authentic; the default policy does not accept it"
            document |= _rejected(Code.APPRAISAL_FAILED, appraisal.first_failure, what)
    return document


def _blank(root: TrustRoot, now: datetime, policy: str) -> dict[str, Any]:
    """Return a document with every member, in the order in which they are read; what is not known is None."""
    unknown = dict.fromkeys(
        ("tee", "quote_version", "fmspc", "pce_id", "platform_instance_id", "pck_ca", "status", "launch_status")
    )
    unknown |= dict.fromkeys(("current_status", "tcb_date", "tcb_evaluation_number", "earliest_expiry", "collateral"))
    return {
        "verdict": Outcome.ACCEPT.value,
        "policy": str(policy),
        "check": None,
        "reason": None,
        "simulated": root.simulated,
        "root_sha256": root.fingerprint.hex(),
        "time": _time(now),
        **unknown,
        "advisories": [],
        "warnings": [],
        "checks": [],
        "policy_checks": [],
    }


def _read(data: bytes, now: datetime, held: list[Check]) -> AnyQuote:
    sane_time(now)
    held.append(Check("X1", True, "a time between 2018 and 2100", _time(now)))
    quote = parse_quote(data)
    held.append(Check("H1-H9, D1-D4", True, "one quote of version 3, 4 or 5, sizes exact", f"version {quote.version}"))
    return quote


def _checks_of_collateral(
    collateral: Collateral, chain: PckChain, family: Family, now: datetime, *, fixed: bool
) -> Iterable[Check]:
    """Return what held of collateral with which a quote was rejected; raise CloisterError when only its time is wrong.

    That is for the owner of the collateral to put right, and says nothing about the quote.
    """
    try:
        verified = verify_collateral(collateral, chain)
        verified.require_not_revoked(chain)
    except QuoteRejected:
        return ()
    require_of_time(family, max(window.start for window in verified.windows), verified.expires, now, fixed=fixed)
    return verified.checks


def _facts_of_quote(quote: AnyQuote) -> dict[str, Any]:
    return {
        "tee": "TDX" if isinstance(quote, Quote) else "SGX",
        "quote_version": quote.version,
        "quote": [list(row) for row in describe(quote)],
    }


def _facts_of_chain(chain: PckChain) -> dict[str, Any]:
    return {
        "fmspc": chain.pck.fmspc.hex(),
        "pce_id": chain.pck.pce_id.hex(),
        "platform_instance_id": chain.pck.platform_instance_id.hex() or None,
        "pck_ca": chain.ca_name,
    }


def _facts_of_verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "status": str(verdict.status),
        "launch_status": str(verdict.launch_status),
        "current_status": str(verdict.current_status),
        "tcb_date": _time(verdict.tcb_date),
        "tcb_evaluation_number": verdict.tcb_evaluation_number,
        "earliest_expiry": _time(verdict.earliest_expiry),
        "advisories": list(verdict.advisories),
        "warnings": list(verdict.warnings),
        "checks": _rows(verdict.checks),
    }


def _rejected(code: Code, failed: Check, what: str) -> dict[str, Any]:
    error = CloisterError(code, what=what, why=f"{failed.name}: {_reason(code, failed)}", todo=_todo(code, failed.name))
    return {
        "verdict": Outcome.REJECT.value,
        "check": failed.name,
        "reason": _reason(code, failed),
        "error": error_document(error),
        "exit_code": EXIT_CODE[error.kind],
    }


def _reason(code: Code, failed: Check) -> str:
    return failed.got if code is Code.QUOTE_REJECTED else f"wanted {failed.wanted}, got {failed.got}"


def _todo(code: Code, row: str) -> str:
    if row == "P2":
        return "if the quote is of a development platform, name its root with --root; else do not rely on it"
    if row == "status":
        return "update the platform's firmware, as the advisories say; then take a new quote"
    if row.startswith("H"):
        return "give the raw bytes of one quote, not their hexadecimal or Base64 form"
    if code is Code.APPRAISAL_FAILED:
        return "start the TD without what the failed checks name; --policy verify asks for authenticity alone"
    return "do not rely on this quote; docs/attestation.md explains the row"


def _rows(checks: Iterable[Check]) -> list[dict[str, Any]]:
    return [{"name": c.name, "ok": c.ok, "wanted": c.wanted, "got": c.got} for c in checks]


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
