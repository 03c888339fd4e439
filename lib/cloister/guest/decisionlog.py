# SPDX-License-Identifier: Apache-2.0
"""The broker's decision log, read by somebody who does not take the broker's word for it.

A look at the log begins with a checkpoint. The receipt key that the broker's verified evidence names endorses the log's
key in an entry that the checkpoint's log holds; from then on the log's key is known, and every checkpoint has to
continue the one that was seen before.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.protocol import ReceiptClaims
from cloister.runtime.channel import invoke, stream
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.documents import GrowthDocument, ReceiptDocument, SignedReceipt
from cloister.transparency.entry import EntryInvalid, LoggedEntry
from cloister.transparency.logfile import Leaf
from cloister.transparency.note import NoteKey
from cloister.transparency.proofs import (
    ProvenEntry,
    check_continues,
    check_entry,
    check_same_log,
    check_start,
    open_checkpoint,
)
from cloister.transparency.seen import Seen
from cloister.transparency.start import Start

_TIMEOUT_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Look:
    """The log as it was proven to be just now."""

    seen: Seen
    checkpoint: Checkpoint
    start: ProvenEntry  # of the broker's present life


class LogClient:
    """Read the log over a channel to the broker."""

    def __init__(self, channel: Any) -> None:
        self._stub = rpc.DecisionLogServiceStub(channel)

    async def look(self, *, receipt_spki_der: bytes, seen: Seen | None) -> Look:
        """Return the log as it is now; it must be what was seen before, or more.

        `receipt_spki_der` is the receipt key of the broker's evidence, verified by the caller. Raises CloisterError:
        LOG_INVALID, LOG_CONTRADICTED.
        """
        answer = await self._call("GetCheckpoint", pb.GetCheckpointRequest(), "get a checkpoint of the decision log")
        start = ProvenEntry(answer.start_index, answer.start_entry, tuple(answer.start_proof))
        # What the entry claims only chooses the key: check_start then demands that the receipt key endorsed it.
        key = _claimed_log(start)
        if seen is not None:
            check_same_log(seen.log, key)
        checkpoint = open_checkpoint(answer.checkpoint, key)
        found = check_start(start, checkpoint, key)
        if found.receipt_spki_der != receipt_spki_der:
            raise CloisterError(
                Code.LOG_INVALID,
                what="the broker's log does not verify",
                why="its present life began with another receipt key than the broker's evidence names",
                todo="do not trust this broker: what answers is not what was verified",
            )
        if seen is not None:
            check_continues(seen.checkpoint, checkpoint, await self._growth(seen.checkpoint, checkpoint))
        return Look(Seen(key, answer.checkpoint), checkpoint, start)

    async def decision(self, index: int, key: NoteKey) -> tuple[LoggedEntry, ProvenEntry, Checkpoint]:
        """Return one entry, proven."""
        answer = await self._call("GetDecision", pb.GetDecisionRequest(index=index), f"get decision {index}")
        checkpoint = open_checkpoint(answer.checkpoint, key)
        found = ProvenEntry(index, answer.entry, tuple(answer.proof))
        return check_entry(found, checkpoint), found, checkpoint

    async def growth(self, old_note: bytes, new_note: bytes, key: NoteKey) -> GrowthDocument:
        """Return a document that proves the growth between two checkpoints."""
        old, new = open_checkpoint(old_note, key), open_checkpoint(new_note, key)
        document = GrowthDocument(key, old_note, new_note, await self._growth(old, new))
        document.check(key)
        return document

    async def receipt_document(self, receipt: SignedReceipt, look: Look) -> ReceiptDocument:
        """Return a verified receipt of the broker's present life, with all that proves it; `look` is newer than it."""
        index, size = ReceiptClaims.parse(receipt.message).index, look.checkpoint.size
        entry = await self._call("GetDecision", pb.GetDecisionRequest(index=index), f"get decision {index}")
        inclusion = await self._call(
            "GetInclusionProof", pb.GetInclusionProofRequest(index=index, size=size), f"get the proof of {index}"
        )
        growth = await self._call(
            "GetConsistencyProof",
            pb.GetConsistencyProofRequest(old_size=index + 1, new_size=size),
            "get the proof that the log only grew",
        )
        document = ReceiptDocument(
            log=look.seen.log,
            receipt=receipt,
            decision=ProvenEntry(index, entry.entry, tuple(inclusion.proof)),
            start=look.start,
            growth=tuple(growth.proof),
            checkpoint=look.seen.note,
        )
        document.check(look.seen.log)
        return document

    async def newest(self, *, limit: int, key_uri: str = "") -> list[pb.Decision]:
        """Return the caller's newest decisions, newest first."""
        request = pb.ListDecisionsRequest(limit=limit, key_uri=key_uri)
        answer = await self._call("ListDecisions", request, "read the decision log")
        return list(answer.decisions)

    async def follow(self, *, first: int, key_uri: str = "") -> AsyncIterator[pb.Decision]:
        """Yield the caller's decisions from an index on, as they come."""
        while True:
            request = pb.FollowDecisionsRequest(from_index=first, key_uri=key_uri)
            async for answer in stream(self._stub.FollowDecisions, request, what="follow the decision log"):
                yield answer.decision
                first = answer.decision.index + 1

    async def export(self) -> AsyncIterator[Leaf | bytes]:
        """Yield every leaf of the log, then the checkpoint; whoever takes them verifies them."""
        request = pb.ExportLogRequest()
        async for answer in stream(self._stub.ExportLog, request, what="export the decision log"):
            for leaf in answer.leaves:
                yield Leaf(leaf.index, leaf.entry, leaf.leaf_hash)
            if answer.checkpoint:
                yield answer.checkpoint

    async def _growth(self, old: Checkpoint, new: Checkpoint) -> tuple[bytes, ...]:
        if old.size >= new.size:
            return ()  # equal: the roots decide; smaller: nothing could prove it
        answer = await self._call(
            "GetConsistencyProof",
            pb.GetConsistencyProofRequest(old_size=old.size, new_size=new.size),
            "get the proof that the log only grew",
        )
        return tuple(answer.proof)

    async def _call(self, method: str, request: Any, what: str) -> Any:
        return await invoke(getattr(self._stub, method), request, timeout_s=_TIMEOUT_S, what=what)


def _claimed_log(start: ProvenEntry) -> NoteKey:
    try:
        return Start.of(LoggedEntry.parse(start.data)).log
    except EntryInvalid as error:
        raise CloisterError(
            Code.LOG_INVALID,
            what="the broker's log does not verify",
            why=f"the entry of its present life: {error}",
            todo="do not trust this broker: what answers is not what was verified",
        ) from None
