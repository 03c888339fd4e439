# SPDX-License-Identifier: Apache-2.0
"""The decision log on the wire: entries to users of the tenant whose callers they are about, proofs to every user."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from cloister.api.keybroker.v1 import keybroker_pb2 as pb
from cloister.api.keybroker.v1 import keybroker_pb2_grpc as rpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.keyuri import KeyUri
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister.transparency.checkpoint import MAX_SIZE
from cloister.transparency.entry import LoggedEntry
from cloister.transparency.start import spki_of
from cloister_keybroker.answers import argument_error
from cloister_keybroker.logkey import LogKey
from cloister_keybroker.logproofs import Leaf, Tree, decision_not_found
from cloister_keybroker.store import KeyStore

_SERVICE: Final = "cloister.api.keybroker.v1.DecisionLogService"
_USERS: Final = frozenset({Role.USER})
CALLERS: Final[CallerTable] = {
    f"/{_SERVICE}/{method}": _USERS
    for method in (
        "ListDecisions",
        "GetDecision",
        "FollowDecisions",
        "GetCheckpoint",
        "GetInclusionProof",
        "GetConsistencyProof",
        "ExportLog",
    )
}

_PAGE: Final = 50
_MAX_PAGE: Final = 1000
_MAX_ANSWER: Final = 2 * 1024 * 1024  # bytes of one message: half of what a client receives at most
_BATCH: Final = 256  # entries or leaves read at once: the database's one thread is not held up for long
_PAUSE_S: Final = 0.1  # between two reads of one follower, however fast the log grows
# Streams hold one of the server's calls in flight each (256), for hours.
_STREAMS_PER_CALLER: Final = 8
_STREAMS: Final = 64


class DecisionLogServicer(rpc.DecisionLogServiceServicer):
    """Read the log."""

    def __init__(self, store: KeyStore, key: LogKey) -> None:
        self._store = store
        self._key = key
        self._streams: Counter[str] = Counter()

    async def ListDecisions(  # noqa: N802
        self, request: pb.ListDecisionsRequest, _context: Any
    ) -> pb.ListDecisionsResponse:
        """Answer with the newest entries; fewer than asked for when they would not fit into one message."""
        tenant, uri = _tenant(), _uri(request.key_uri)
        if request.limit > _MAX_PAGE:
            raise argument_error("limit", f"{request.limit}", f"at most {_MAX_PAGE}")
        limit = request.limit or _PAGE
        entries = await self._store.read(lambda t: list(t.log.newest(tenant, key_uri=uri, limit=limit)))
        return pb.ListDecisionsResponse(decisions=_within(_MAX_ANSWER, entries))

    async def GetDecision(self, request: pb.GetDecisionRequest, _context: Any) -> pb.GetDecisionResponse:  # noqa: N802
        tenant = _tenant()
        data, proven = await self._store.read(lambda t: t.proofs.entry(request.index))
        logged = LoggedEntry.parse(data)
        if logged.entry.tenant not in (tenant, ""):
            raise decision_not_found(request.index, proven.tree.size)
        return pb.GetDecisionResponse(
            decision=decision_message(logged),
            entry=data,
            size=proven.tree.size,
            proof=proven.proof,
            checkpoint=self._sign(proven.tree),
        )

    async def FollowDecisions(  # noqa: N802
        self, request: pb.FollowDecisionsRequest, _context: Any
    ) -> AsyncIterator[pb.FollowDecisionsResponse]:
        """Send the caller's entries from an index on, and then each new one, until the caller has enough."""
        tenant, uri, first = _tenant(), _uri(request.key_uri), min(request.from_index, MAX_SIZE)
        with self._stream():
            while True:
                written = self._store.next_write()  # before reading: what is written meanwhile is not missed
                entries = await self._store.read(
                    lambda t: list(t.log.following(tenant, key_uri=uri, first=first, limit=_BATCH))  # noqa: B023
                )
                for logged in entries:
                    yield pb.FollowDecisionsResponse(decision=decision_message(logged))
                    first = logged.index + 1
                if len(entries) < _BATCH:
                    await written.wait()
                    await asyncio.sleep(_PAUSE_S)

    async def GetCheckpoint(  # noqa: N802
        self, _request: pb.GetCheckpointRequest, _context: Any
    ) -> pb.GetCheckpointResponse:
        index = self._key.start_index
        data, proven = await self._store.read(lambda t: t.proofs.entry(index))
        return pb.GetCheckpointResponse(
            checkpoint=self._sign(proven.tree),
            size=proven.tree.size,
            root=proven.tree.root,
            signer_spki_der=spki_of(self._key.note_key.public),
            start_entry=data,
            start_index=index,
            start_proof=proven.proof,
        )

    async def GetInclusionProof(  # noqa: N802
        self, request: pb.GetInclusionProofRequest, _context: Any
    ) -> pb.GetInclusionProofResponse:
        leaf, proven = await self._store.read(lambda t: t.proofs.inclusion(request.index, size=request.size))
        return pb.GetInclusionProofResponse(
            size=proven.tree.size, leaf_hash=leaf, proof=proven.proof, checkpoint=self._sign(proven.tree)
        )

    async def GetConsistencyProof(  # noqa: N802
        self, request: pb.GetConsistencyProofRequest, _context: Any
    ) -> pb.GetConsistencyProofResponse:
        proven = await self._store.read(lambda t: t.proofs.consistency(request.old_size, new_size=request.new_size))
        return pb.GetConsistencyProofResponse(
            new_size=proven.tree.size, proof=proven.proof, checkpoint=self._sign(proven.tree)
        )

    async def ExportLog(  # noqa: N802
        self, request: pb.ExportLogRequest, _context: Any
    ) -> AsyncIterator[pb.ExportLogResponse]:
        """Send every leaf of the log as it is now; the checkpoint they add up to comes last."""
        tenant, first = _tenant(), request.from_index
        with self._stream():
            tree = await self._store.read(lambda t: t.proofs.newest())
            while first < tree.size:
                begin, end = first, min(first + _BATCH, tree.size)
                leaves = await self._store.read(lambda t: list(t.proofs.leaves(tenant, begin, end)))  # noqa: B023
                for message in _messages(leaves):
                    yield message
                first = end
            yield pb.ExportLogResponse(checkpoint=self._sign(tree))

    def _sign(self, tree: Tree) -> bytes:
        return self._key.checkpoint(size=tree.size, root=tree.root)

    @contextmanager
    def _stream(self) -> Iterator[None]:
        caller = str(current_caller().spiffe_id)
        if self._streams[caller] >= _STREAMS_PER_CALLER or self._streams.total() >= _STREAMS:
            raise CloisterError(
                Code.RATE_LIMITED,
                what="too many streams of the decision log are open",
                why=f"at most {_STREAMS_PER_CALLER} of one caller and {_STREAMS} of all",
                todo="end one, or try again later",
            )
        self._streams[caller] += 1
        try:
            yield
        finally:
            self._streams[caller] -= 1
            if not self._streams[caller]:
                del self._streams[caller]


def mounted_log(store: KeyStore, key: LogKey) -> Sequence[Mounted]:
    """Return the log's service, ready for GrpcServer with CALLERS."""
    return (Mounted(_SERVICE, rpc.add_DecisionLogServiceServicer_to_server, DecisionLogServicer(store, key)),)


def decision_message(logged: LoggedEntry) -> pb.Decision:
    """Return an entry as lists show it."""
    entry = logged.entry
    return pb.Decision(
        index=logged.index,
        time_unix_ms=logged.time_ms,
        action=entry.action,
        key_uri=entry.key_uri,
        caller=entry.caller,
        granted=entry.granted,
        blocks=[pb.Block(name=b.name, ok=b.ok, wanted=b.wanted, got=b.got) for b in entry.blocks],
    )


def _tenant() -> str:
    return current_caller().spiffe_id.tenant


def _uri(text: str) -> str:
    return str(KeyUri.parse(text)) if text else ""


def _within(limit: int, entries: Iterable[LoggedEntry]) -> list[pb.Decision]:
    decisions, size = [], 0
    for logged in entries:
        decision = decision_message(logged)
        size += decision.ByteSize() + 8
        if size > limit:
            break
        decisions.append(decision)
    return decisions


def _messages(leaves: Iterable[Leaf]) -> Iterator[pb.ExportLogResponse]:
    """Put leaves into as few messages as their size allows."""
    message, size = pb.ExportLogResponse(), 0
    for leaf in leaves:
        if size + len(leaf.entry) > _MAX_ANSWER:
            yield message
            message, size = pb.ExportLogResponse(), 0
        if leaf.entry:
            message.leaves.add(index=leaf.index, entry=leaf.entry)
        else:
            message.leaves.add(index=leaf.index, leaf_hash=leaf.hash)
        size += len(leaf.entry) + 64
    yield message
