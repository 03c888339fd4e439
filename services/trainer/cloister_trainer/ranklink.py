# SPDX-License-Identifier: Apache-2.0
"""A rank's line to its coordinator: reports out, the wish to cancel in, and the rendezvous.

The script runs on the main thread and must not wait for the network; an event loop on a thread of its own does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Final, TypeVar

from cloister.api.trainer.v1 import trainer_pb2 as pb
from cloister.api.trainer.v1 import trainer_pb2_grpc as pb_grpc
from cloister.errors import CloisterError, Kind
from cloister.runtime.channel import SwappingChannel, invoke
from cloister.runtime.logging import get_logger
from cloister.train.job import Progress

_T = TypeVar("_T")
_REPORT_EVERY_S: Final = 0.5
_REPORT_TIMEOUT_S: Final = 5.0
_MAX_QUEUED: Final = 1000  # beyond this, the oldest message is given up: a script in a loop must not fill the memory


class LoopThread:
    """An event loop on a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="cloister", daemon=True).start()

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run to the end on the loop, and return or raise what that gives, on the calling thread."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run without waiting."""
        asyncio.run_coroutine_threadsafe(work, self._loop)


class RankLink:
    """Reporter and Rendezvous of `cloister.train` over the coordinator's RankService and RendezvousService."""

    def __init__(self, loop: LoopThread, channel: SwappingChannel) -> None:
        """Call on the loop's thread: the stubs belong to it."""
        self._loop = loop
        self._ranks = pb_grpc.RankServiceStub(channel)
        self._store = pb_grpc.RendezvousServiceStub(channel)
        self._queue: deque[pb.ReportEventRequest] = deque(maxlen=_MAX_QUEUED)
        self._progress: pb.ReportEventRequest | None = None
        self._cancelled = False
        self._sending = asyncio.Lock()

    def start(self) -> None:
        """Begin to send what is reported, and to ask whether to go on."""
        self._loop.start(self._send_forever())

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    def message(self, phase: str, text: str, elapsed_s: float) -> None:
        self._queue.append(pb.ReportEventRequest(message=pb.RankMessage(phase=phase, text=text, elapsed_s=elapsed_s)))

    def progress(self, progress: Progress) -> None:
        self._progress = pb.ReportEventRequest(
            progress=pb.Progress(
                epoch=progress.epoch,
                epochs=progress.epochs,
                step=progress.step,
                steps=progress.steps,
                loss=progress.loss,
                samples_per_s=progress.samples_per_s,
                eta_s=progress.eta_s,
            )
        )

    def metrics(self, values: Mapping[str, float], *, step: int, final: bool) -> None:
        # Behind the progress that led to it.
        self._take_progress()
        self._queue.append(pb.ReportEventRequest(metrics=pb.MetricsLogged(step=step, values=dict(values), final=final)))

    def artifact(self, name: str, uri: str, manifest_digest: bytes) -> None:
        self._queue.append(
            pb.ReportEventRequest(artifact=pb.ArtifactWritten(name=name, uri=uri, manifest_digest=manifest_digest))
        )

    def failure(self, error: CloisterError) -> None:
        """Send the reason why this rank ends, behind everything before it; give up after a few seconds."""
        failure = pb.RankFailure(code=error.code.text, what=error.what, why=error.why, todo=error.todo)
        self._queue.append(pb.ReportEventRequest(failure=failure))
        self.flush()

    def flush(self) -> None:
        """Send what is still here; give up after a few seconds."""
        self._take_progress()

        async def bounded() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REPORT_TIMEOUT_S):
                    await self._send_all()

        self._loop.run(bounded())

    def set(self, key: str, value: bytes, *, timeout_s: float) -> None:
        self._call(self._store.Set, pb.SetRequest(key=key, value=value), timeout_s)

    def get(self, key: str, *, timeout_s: float) -> bytes:
        return bytes(self._call(self._store.Get, pb.GetRequest(key=key), timeout_s).value)

    def wait(self, keys: Sequence[str], *, timeout_s: float) -> None:
        self._call(self._store.Wait, pb.WaitRequest(keys=keys), timeout_s)

    def add(self, key: str, amount: int, *, timeout_s: float) -> int:
        return int(self._call(self._store.Add, pb.AddRequest(key=key, amount=amount), timeout_s).value)

    def check(self, keys: Sequence[str], *, timeout_s: float) -> bool:
        return bool(self._call(self._store.Check, pb.CheckRequest(keys=keys), timeout_s).present)

    def compare_set(self, key: str, expected: bytes, desired: bytes, *, timeout_s: float) -> bytes:
        request = pb.CompareSetRequest(key=key, expected=expected, desired=desired)
        return bytes(self._call(self._store.CompareSet, request, timeout_s).value)

    def delete_key(self, key: str, *, timeout_s: float) -> bool:
        return bool(self._call(self._store.DeleteKey, pb.DeleteKeyRequest(key=key), timeout_s).deleted)

    def _call(self, method: Any, request: Any, timeout_s: float) -> Any:
        return self._loop.run(invoke(method, request, timeout_s=timeout_s, what="meet the other ranks"))

    def _take_progress(self) -> None:
        latest, self._progress = self._progress, None
        if latest is not None:
            self._queue.append(latest)

    async def _send_forever(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY_S)
            self._take_progress()
            if not self._queue:
                self._queue.append(pb.ReportEventRequest())  # only asks whether to go on
            await self._send_all()

    async def _send_all(self) -> None:
        """Send the queue in order; what cannot be sent now stays, what is refused is dropped."""
        async with self._sending:
            while self._queue:
                request = self._queue[0]
                try:
                    response = await invoke(
                        self._ranks.ReportEvent, request, timeout_s=_REPORT_TIMEOUT_S, what="report to the trainer"
                    )
                except CloisterError as error:
                    if error.kind in (Kind.UNAVAILABLE, Kind.DEADLINE):
                        return
                    get_logger().warning("report refused", kind=request.WhichOneof("kind"), error=str(error))
                else:
                    self._cancelled = self._cancelled or response.cancelled
                # The deque may have dropped it itself while it was being sent.
                if self._queue and self._queue[0] is request:
                    self._queue.popleft()
