# SPDX-License-Identifier: Apache-2.0
"""A real TD: registers, boot log, journal and a source of quotes, held together so that they never disagree.

When it is opened, the boot log and then the journal are replayed and must give the registers as they are. Extensions
in the journal were made by an earlier process of this boot. This process makes the same ones again, in the same
order, before it adds its own: they are compared, not extended a second time. Only when it has caught up is there a
quote; a process that measures something else gets none.
"""

from __future__ import annotations

import hmac
import threading
from collections import deque
from typing import Final, NoReturn

from cloister.guest.providers.base import DIGEST_SIZE, EXTENDABLE, QuoteSource, failed
from cloister.guest.providers.journal import Extension, Journal
from cloister.guest.providers.registers import Registers
from cloister.tdx.eventlog import REGISTERS, EventLog, EventLogRejected
from cloister.tdx.quote import Quote, QuoteRejected
from cloister.tlv import sha384

_NEW_TD: Final = "start this workload in a new TD"


class TdProvider:
    """The QuoteProvider of a real TD. Safe from several threads."""

    def __init__(self, *, boot_log: bytes, registers: Registers, quotes: QuoteSource, journal: Journal | None) -> None:
        """Compare log, journal and registers; raise CloisterError(QUOTE_PROVIDER_FAILED) when they differ."""
        self._boot_log = boot_log
        self._registers, self._quotes, self._journal = registers, quotes, journal
        self._lock = threading.Lock()
        self._usable = True
        try:
            # The registers as this process's own log replays; the kernel's are ahead by what is due again.
            self._values = list(EventLog.parse(boot_log).replay())
        except EventLogRejected as error:
            raise failed("the boot event log cannot be read", why=error.reason, todo=_NEW_TD) from None
        self._due = deque(self._made_before())

    @property
    def boot_log(self) -> bytes:
        return self._boot_log

    def extend(self, index: int, digest: bytes) -> bytes:
        """Extend RTMR2 or RTMR3 with 48 bytes, or find that an earlier process did; return the new value."""
        if index not in EXTENDABLE or len(digest) != DIGEST_SIZE:
            raise ValueError(f"RTMR2 and RTMR3 can be extended, with {DIGEST_SIZE} bytes; not {index}, {len(digest)}")
        with self._lock:
            self._require_usable()
            if self._due:
                self._repeat(index, digest)
            else:
                self._extend(index, digest)
            return self._values[index]

    def quote(self, report_data: bytes) -> bytes:
        """Return a quote over 64 bytes and over the registers as this process knows them."""
        with self._lock:
            self._require_usable()
            if self._due:
                raise failed(
                    "this TD has measured more than this process",
                    why=f"{len(self._due)} extensions of an earlier process, such as keys it received, are in RTMR3",
                    todo=_NEW_TD,
                )
            data = self._quotes.quote(report_data)
            self._require_ours(data, report_data)
            return data

    def close(self) -> None:
        """Let go of the journal; the TD and its registers live on."""
        with self._lock:
            self._usable = False
            if self._journal is not None:
                self._journal.close()

    def _made_before(self) -> tuple[Extension, ...]:
        """Return the extensions that lead from the boot log to the registers as they are."""
        now = [self._registers.read(index) for index in range(REGISTERS)]
        entries = self._journal.entries if self._journal is not None else ()
        if self._replayed(entries) == now:
            return entries
        # The last line is written before its extension is made: a process that died between the two left one too many.
        if entries and self._journal is not None and self._replayed(entries[:-1]) == now:
            self._journal.drop_last()
            return entries[:-1]
        differs = next(i for i, (want, got) in enumerate(zip(self._replayed(entries), now, strict=True)) if want != got)
        if differs != REGISTERS - 1:
            raise failed(
                f"the boot event log does not replay to RTMR{differs}",
                why=f"the register is {now[differs].hex()}; something extended it without logging it",
                todo="boot an image whose firmware logs what it measures, with nothing else in it that extends RTMRs",
            )
        raise failed(
            "RTMR3 was extended by something that this workload has no record of",
            why=f"the register is {now[differs].hex()}; boot log and journal ({len(entries)} lines) do not give it",
            todo=f"{_NEW_TD}; to let it start again in a running TD, "
            "give guest.provider a journal, as ?journal=/run/cloister/extensions",
        )

    def _replayed(self, entries: tuple[Extension, ...]) -> list[bytes]:
        values = list(self._values)
        for index, digest in entries:
            values[index] = sha384(values[index], digest)
        return values

    def _repeat(self, index: int, digest: bytes) -> None:
        if (index, digest) != self._due[0]:
            raise failed(
                "an earlier process of this TD measured something else",
                why=f"RTMR{self._due[0][0]} holds {self._due[0][1].hex()} where this one measures {digest.hex()}",
                todo=_NEW_TD,
            )
        self._due.popleft()
        self._values[index] = sha384(self._values[index], digest)

    def _extend(self, index: int, digest: bytes) -> None:
        expected = sha384(self._values[index], digest)
        self._usable = False  # until it is known what the register holds
        if self._journal is not None:
            self._journal.append(index, digest)
        value = self._registers.extend(index, digest)
        if not hmac.compare_digest(value, expected):
            self._changed(index)
        self._values[index] = value
        self._usable = True

    def _require_ours(self, data: bytes, report_data: bytes) -> None:
        """Refuse a quote that attest would refuse, with the reason that only this side knows."""
        try:
            body = Quote.parse(data).body
        except QuoteRejected as error:
            raise failed(
                "the platform's quote is malformed",
                why=error.reason,
                todo="look at the log of qgsd on the host",
            ) from None
        if not hmac.compare_digest(body.report_data, report_data):
            raise failed(
                "the platform's quote is over other report data",
                why="the answer belongs to another request",
                todo="look at the log of qgsd on the host; nothing was given away",
            )
        for index, (known, quoted) in enumerate(zip(self._values, body.rtmrs, strict=True)):
            if not hmac.compare_digest(known, quoted):
                self._changed(index)

    def _changed(self, index: int) -> NoReturn:
        raise failed(
            f"RTMR{index} is not what this process made it",
            why="something else in this TD extended it, or the quote is of another TD",
            todo="run nothing else in this TD that extends it; then start the workload in a new TD",
        )

    def _require_usable(self) -> None:
        if not self._usable:
            raise failed(
                "this TD can no longer be used by this process",
                why="an extension failed half-way, or the provider is closed",
                todo="start the workload again; with a journal, it finds out what was extended",
            )
