# SPDX-License-Identifier: Apache-2.0
"""Verify many quotes: what was verified once is not verified again, and is still asked for its time at every use.

A fleet's quotes share collateral; a platform's quotes share its PCK chain, and its quoting enclave's report for as long
as that keeps its attestation key. They are kept by the hash of their bytes, with what was verified about them for all
times: signatures, roles, revocation. What depends on time is not kept but asked again: an entry outlives neither its
certificates nor its nextUpdate, and a clock that steps back finds it not yet valid. Only successes are kept: a forgery
poisons nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from datetime import datetime
from typing import Final, Generic, TypeVar

from cloister.tdx.collateral import Collateral, VerifiedCollateral, verify_collateral
from cloister.tdx.pckchain import PckChain, TrustRoot, load_pck_chain
from cloister.tdx.quote import QuoteRejected, parse_quote
from cloister.tdx.verify import Verdict, judge, sane_time

MAX_COLLATERAL: Final = 64  # families of platforms at once, times early and standard; about 200 KB each
MAX_CHAINS: Final = 4096  # platforms at once; about 20 KB each

_T = TypeVar("_T")


class _Kept(Generic[_T]):
    """The most recently used values, each until its own end. Safe to share between threads."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[bytes, tuple[datetime, _T]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now: datetime) -> _T | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            if now > entry[0]:
                del self._entries[key]
                return None
            self._entries.move_to_end(key)
            return entry[1]

    def put(self, key: bytes, end: datetime, value: _T) -> None:
        with self._lock:
            self._entries[key] = (end, value)
            self._entries.move_to_end(key)
            if len(self._entries) > self._capacity:
                self._entries.popitem(last=False)


class Verifier:
    """`verify_with_collateral` with a memory. It gives the same verdicts."""

    def __init__(
        self,
        roots: Sequence[TrustRoot],
        *,
        minimum_evaluation_number: int = 0,
        max_collateral: int = MAX_COLLATERAL,
        max_chains: int = MAX_CHAINS,
    ) -> None:
        self._roots = tuple(roots)
        self._minimum_evaluation_number = minimum_evaluation_number
        self._collateral: _Kept[VerifiedCollateral] = _Kept(max_collateral)
        self._chains: _Kept[PckChain] = _Kept(max_chains)
        self._reports: _Kept[bool] = _Kept(max_chains)

    def verify(self, data: bytes, collateral: Collateral, *, now: datetime) -> Verdict:
        """Verify a quote and judge its platform at `now` (aware); raise QuoteRejected."""
        now = sane_time(now)
        quote = parse_quote(data)
        chain, verified = self._known(quote.signature.pck_chain_pem, collateral, now)
        signature = quote.signature
        report_key = hashlib.sha256(chain.leaf.der + signature.qe_report + signature.qe_report_signature).digest()
        vouched = self._reports.get(report_key, now) is not None
        verdict = judge(quote, chain, verified, now, vouched=vouched)
        if not vouched:
            self._reports.put(report_key, min(window.end for window in chain.windows), True)
        # T13: signed, and too old all the same.
        if verdict.tcb_evaluation_number < self._minimum_evaluation_number:
            raise QuoteRejected(
                "T13", f"TCB evaluation {verdict.tcb_evaluation_number}, below {self._minimum_evaluation_number}"
            )
        return verdict

    @property
    def kept(self) -> tuple[int, int, int]:
        """How much is kept: collateral, chains, reports of quoting enclaves."""
        return len(self._collateral), len(self._chains), len(self._reports)

    def _known(self, pem: bytes, collateral: Collateral, now: datetime) -> tuple[PckChain, VerifiedCollateral]:
        """Return chain and collateral, verified now or before; the chain's revocation is bound to this collateral."""
        chain_key = hashlib.sha256(collateral.digest + pem).digest()
        chain = self._chains.get(chain_key, now)
        checked = chain is not None
        if chain is None:
            chain = load_pck_chain(pem, roots=self._roots)
        collateral_key = collateral.digest + chain.root.fingerprint
        verified = self._collateral.get(collateral_key, now)
        if verified is None:
            verified = verify_collateral(collateral, chain)
            self._collateral.put(collateral_key, verified.expires, verified)
        if not checked:
            verified.require_not_revoked(chain)
            self._chains.put(chain_key, min(window.end for window in chain.windows), chain)
        return chain, verified
