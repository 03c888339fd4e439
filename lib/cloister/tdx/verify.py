# SPDX-License-Identifier: Apache-2.0
"""Is a quote authentic, and how up to date is its platform? The algorithm, its rows numbered as in errors and reports.

1. X1      the time is one at which TDX exists, and has a zone
2. H1-H9   size, header, and nothing behind the signature data
   D1-D4   the signature data: types and sizes, exactly
3. P1-P8   the PCK chain leads to a configured root, and is valid now
4. R1-R6   revocation lists: signed, current, of the right issuers, and name nothing of this
   T1-T7   TCB info: signed by its role under the same root, strict, current
   Q1-Q3   the quoting enclave's identity, likewise
   X2      all within sizes
5. E4      signatures and key are numbers that ECDSA P-256 allows
   E1      the PCK key signed the quoting enclave's report
   E2      that report names the attestation key
   Q7      the quoting enclave is not a debug enclave
   E3      the attestation key signed header and body
6. T3-T14, Q2-Q8, M1-M3   what TCB info and identity say about this platform, module and enclave; revoked is refused

`verify_quote` is steps 1 to 3 and 5: a quote that passes is of a platform that Intel (or the development root)
certified. `verify_with_collateral` is all six. Whether the TD is acceptable (rows A) is decided elsewhere, by policy.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from typing import Final, NoReturn

from cloister.tdx import ecdsa
from cloister.tdx.certificate import require_within
from cloister.tdx.check import Check
from cloister.tdx.collateral import Collateral, VerifiedCollateral, verify_collateral
from cloister.tdx.pckchain import PckChain, TrustRoot, load_pck_chain, verify_pck_chain
from cloister.tdx.pckextension import PckExtension
from cloister.tdx.quote import AnyQuote, QeReport, Quote, QuoteRejected, parse_quote
from cloister.tdx.tcb import TcbVerdict, evaluate_tcb
from cloister.tdx.tcbinfo import TcbStatus

__all__ = [
    "Check",
    "QuoteRejected",
    "TrustRoot",
    "Verdict",
    "VerifiedQuote",
    "verify_quote",
    "verify_with_collateral",
]

_EARLIEST: Final = datetime(2018, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(2100, 1, 1, tzinfo=UTC)

_WITNESS: Final = object()


@dataclass(frozen=True, slots=True)
class VerifiedQuote:
    """A quote that is authentic: only `verify_quote` makes one."""

    quote: Quote
    simulated: bool  # it comes from under a development root
    fmspc: bytes  # 6
    pceid: bytes  # 2
    ppid: bytes  # 16
    platform_instance_id: bytes  # 16, or empty
    root_fingerprint: bytes  # 32, SHA-256 of the root's certificate
    checks: tuple[Check, ...]  # all of them passed
    # An InitVar, so that dataclasses.replace() cannot make an altered one either.
    witness: InitVar[object]

    def __post_init__(self, witness: object) -> None:
        if witness is not _WITNESS:
            raise TypeError("only verify_quote makes a VerifiedQuote")


@dataclass(frozen=True, slots=True)
class Verdict:
    """A quote that is authentic, of a platform that is not revoked: only verification makes one."""

    quote: AnyQuote
    chain: PckChain
    collateral: VerifiedCollateral
    tcb: TcbVerdict
    now: datetime  # when it was verified; UTC
    witness: InitVar[object]

    def __post_init__(self, witness: object) -> None:
        if witness is not _WITNESS:
            raise TypeError("only verification makes a Verdict")

    @property
    def pck(self) -> PckExtension:
        """The platform: FMSPC, PCE id, PPID, instance id."""
        return self.chain.pck

    @property
    def simulated(self) -> bool:
        """It comes from under a development root."""
        return self.chain.root.simulated

    @property
    def root_fingerprint(self) -> bytes:
        return self.chain.root.fingerprint

    @property
    def status(self) -> TcbStatus:
        """Never Revoked; TD relaunch statuses only of TD 1.5."""
        return self.tcb.status

    @property
    def launch_status(self) -> TcbStatus:
        return self.tcb.launch.status

    @property
    def current_status(self) -> TcbStatus:
        """Of the TDX module that runs now; of a TD 1.5 it can be Revoked."""
        return self.tcb.current.status

    @property
    def advisories(self) -> tuple[str, ...]:
        """Of platform, TDX module and quoting enclave, at launch."""
        return self.tcb.advisories

    @property
    def tcb_date(self) -> datetime:
        return self.tcb.date

    @property
    def tcb_evaluation_number(self) -> int:
        """The lower one of TCB info and QE identity."""
        return min(self.collateral.tcb_info.evaluation_number, self.collateral.qe_identity.evaluation_number)

    @property
    def earliest_expiry(self) -> datetime:
        """The first moment after which some part of what was relied on is not valid any more."""
        return min(self.collateral.expires, *(window.end for window in self.chain.windows))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd but no reason to refuse (T13)."""
        info, identity = self.collateral.tcb_info.evaluation_number, self.collateral.qe_identity.evaluation_number
        if info == identity:
            return ()
        return (f"T13: TCB info is of evaluation {info}, the QE identity of {identity}",)

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks in their order; all of them passed."""
        module = "" if self.tcb.current is self.tcb.launch else f", now {self.current_status}"
        return (
            *_form_checks(self.quote),
            *self.chain.checks,
            *self.collateral.checks,
            *_signature_checks(self.quote),
            Check("T3-T12", True, "a supported TCB level", f"{self.launch_status}{module}"),
            Check("T13", True, "TCB evaluation numbers", f"{self.tcb_evaluation_number}"),
            Check("T14", True, "a module as launched, or newer", f"{self.status}"),
            Check(
                "Q4-Q8", True, f"Intel's {self.collateral.qe_identity.id}", "signer, product and attributes as wanted"
            ),
            Check("M1-M3", True, "not revoked", f"{self.status}, TCB of {self.tcb_date:%Y-%m-%d}"),
        )


def verify_quote(data: bytes, *, roots: Sequence[TrustRoot], now: datetime) -> VerifiedQuote:
    """Verify a TD quote against the configured roots at the time `now` (aware).

    Raise QuoteRejected, with the row of the first check that fails, for everything else.
    """
    now = sane_time(now)  # 1
    quote = Quote.parse(data)  # 2
    chain = verify_pck_chain(quote.signature.pck_chain_pem, roots=roots, now=now)  # 3
    authenticate(quote, chain)  # 5
    return VerifiedQuote(
        quote=quote,
        simulated=chain.root.simulated,
        fmspc=chain.pck.fmspc,
        pceid=chain.pck.pce_id,
        ppid=chain.pck.ppid,
        platform_instance_id=chain.pck.platform_instance_id,
        root_fingerprint=chain.root.fingerprint,
        checks=(*_form_checks(quote), *chain.checks, *_signature_checks(quote)),
        witness=_WITNESS,
    )


def verify_with_collateral(
    data: bytes, collateral: Collateral, *, roots: Sequence[TrustRoot], now: datetime
) -> Verdict:
    """Verify a quote of any kind and judge its platform by this collateral at the time `now` (aware).

    The collateral must be under the same root as the quote. Raise QuoteRejected, with the row of the first check that
    fails; whatever is accepted has a status, and Revoked is not one of them. Nothing is remembered: `Verifier` does.
    """
    now = sane_time(now)  # 1
    quote = parse_quote(data)  # 2
    chain = load_pck_chain(quote.signature.pck_chain_pem, roots=roots)  # 3
    verified = verify_collateral(collateral, chain)  # 4
    verified.require_not_revoked(chain)
    return judge(quote, chain, verified, now)  # 3 (P6), 4 (times), 5, 6


def judge(
    quote: AnyQuote, chain: PckChain, collateral: VerifiedCollateral, now: datetime, *, vouched: bool = False
) -> Verdict:
    """Judge a quote by its chain and by collateral that does not revoke it; both are verified, and asked for `now`.

    `vouched`: this PCK key's signature over this very QE report (E1) was verified before.
    """
    require_within(chain.windows, now)
    require_within(collateral.windows, now)
    report = authenticate(quote, chain, vouched=vouched)
    tcb = evaluate_tcb(collateral.tcb_info, collateral.qe_identity, chain.pck, report, quote)
    return Verdict(quote, chain, collateral, tcb, now, witness=_WITNESS)


def sane_time(now: datetime) -> datetime:
    """Return `now` in UTC; raise QuoteRejected X1: a clock that was never set must not make old things valid."""
    if now.tzinfo is None or not _EARLIEST <= now < _LATEST:
        _reject("X1", "the time of verification has no zone or is not between 2018 and 2100")
    return now.astimezone(UTC)


def authenticate(quote: AnyQuote, chain: PckChain, *, vouched: bool = False) -> QeReport:
    """Verify the three signatures of a quote below its chain (E1 to E4, Q7); return the quoting enclave's report.

    `vouched`: E1 of these very bytes was verified before.
    """
    signature = quote.signature
    # E4: before E1 to E3, which compute with these numbers. High s is valid.
    try:
        attestation_key = ecdsa.public_key(signature.attestation_key)
    except ValueError:
        raise QuoteRejected("E4", "the attestation key is not a point on P-256") from None
    report_signature = _signature(signature.qe_report_signature, "QE report")
    quote_signature = _signature(signature.signature, "quote")
    # E1: the platform vouches for its quoting enclave, ...
    if not vouched and not ecdsa.verifies(chain.leaf.key, report_signature, signature.qe_report):
        _reject("E1", "the PCK key did not sign the QE report")
    # E2: ... which vouches for the attestation key.
    report = QeReport.parse(signature.qe_report)
    wanted = hashlib.sha256(signature.attestation_key + signature.qe_auth_data).digest() + bytes(32)
    if not hmac.compare_digest(report.report_data, wanted):
        _reject("E2", "the QE report is about another attestation key")
    # Q7: a debug enclave's memory is open to its host. No identity mask can hide that here.
    if report.debug:
        _reject("Q7", "the quoting enclave is a debug enclave")
    # E3: the quoting enclave vouches for header and body.
    if not ecdsa.verifies(attestation_key, quote_signature, quote.signed_bytes()):
        _reject("E3", "the attestation key did not sign this quote")
    return report


def _form_checks(quote: AnyQuote) -> tuple[Check, ...]:
    kind = "TD" if isinstance(quote, Quote) else "SGX enclave"
    pem = f"{len(quote.signature.pck_chain_pem)} bytes of PEM"
    return (
        Check("X1", True, "a time between 2018 and 2100", "as wanted"),
        Check("H1-H9", True, "one quote of version 3, 4 or 5", f"version {quote.version}, of a {kind}"),
        Check("D1-D4", True, "a QE report and a PCK chain, sizes exact", pem),
    )


def _signature_checks(quote: AnyQuote) -> tuple[Check, ...]:
    report = QeReport.parse(quote.signature.qe_report)
    return (
        Check("E4", True, "0 < r, s < n; a key on the curve", "as wanted"),
        Check("E1", True, "QE report signed by the PCK key", "verifies"),
        Check("E2", True, "attestation key named by the QE report", report.report_data[:32].hex()),
        Check("Q7", True, "no debug quoting enclave", f"attributes {report.attributes.hex()}"),
        Check("E3", True, "quote signed by the attestation key", "verifies"),
    )


def _signature(raw: bytes, what: str) -> bytes:
    try:
        return ecdsa.to_der(raw)
    except ValueError as error:
        raise QuoteRejected("E4", f"the {what}'s signature: {error}") from None


def _reject(check: str, reason: str) -> NoReturn:
    raise QuoteRejected(check, reason)
