# SPDX-License-Identifier: Apache-2.0
"""A job that has not ended: its record, its events as they happen, and whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from cloister.api.trainer.v1 import trainer_pb2
from cloister.errors import CloisterError, Code
from cloister_trainer import wire
from cloister_trainer.job import JobRecord
from cloister_trainer.journal import Journal
from cloister_trainer.rendezvous import KeySpace

# Events beyond this are refused: the record of a job must not fill the coordinator's disk.
MAX_EVENTS: Final = 50_000
_RESERVED: Final = 100  # of these, for the coordinator: a job can always say how it ended


class LiveJob:
    """One job between its start and its end. Belongs to the event loop; records are replaced, not edited."""

    def __init__(self, record: JobRecord, journal: Journal, now_ms: Callable[[], int], *, sequence: int = 0) -> None:
        self.record = record
        self.key_space = KeySpace()
        self.ended = asyncio.Event()
        self.stopping = asyncio.Event()  # the ranks were told to end
        self.ending = False  # its end is being stored
        self.last_progress_ms: dict[int, int] = {}  # of each rank, when one was last kept
        self._journal = journal
        self._now_ms = now_ms
        self._sequence = sequence
        self._committed = sequence
        self._changed = asyncio.Condition()

    def first_events(self) -> list[trainer_pb2.Event]:
        """Return the numbered events that go into the journal with the job itself."""
        return self._numbered([wire.state_event(self.record)])

    async def apply(self, record: JobRecord, events: Sequence[trainer_pb2.Event] = ()) -> None:
        """Make `record` the job's, append events (and one for a change of state), and tell who waits.

        The record changes before the first await, so callers may compute one from the other without a lock.
        """
        changed = record.state is not self.record.state
        self.record = record
        numbered = self._numbered([*events, *([wire.state_event(record)] if changed else [])])
        # The journal keeps the order of these calls, so a watcher never sees a later event first.
        await self._journal.store(wire.job_message(record), numbered)
        if numbered:
            self._committed = max(self._committed, numbered[-1].sequence)
        if record.state.ended:
            self.ended.set()
            await self.key_space.close()
        async with self._changed:
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raise CloisterError(RATE_LIMITED) when the ranks have reported as much as a job may."""
        if not self.has_room:
            raise CloisterError(
                Code.RATE_LIMITED,
                what="the job has reported too many events",
                why=f"at most {MAX_EVENTS:,} are kept",
                todo="report less often",
            )

    @property
    def has_room(self) -> bool:
        return self._sequence < MAX_EVENTS - _RESERVED

    async def wait_beyond(self, sequence: int) -> None:
        """Return when there are events behind `sequence`, or the job has ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._committed > sequence or self.ended.is_set())

    def _numbered(self, events: Sequence[trainer_pb2.Event]) -> list[trainer_pb2.Event]:
        for event in events:
            self._sequence += 1
            event.sequence = self._sequence
            event.time_unix_ms = self._now_ms()
        return list(events)
