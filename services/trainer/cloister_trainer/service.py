# SPDX-License-Identifier: Apache-2.0
"""gRPC in and out. Who a caller is comes from its certificate: a user's tenant, a rank's job and number."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

from cloister.api.trainer.v1 import trainer_pb2 as pb
from cloister.api.trainer.v1 import trainer_pb2_grpc as pb_grpc
from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.caller import current_caller
from cloister.runtime.guard import CallerTable
from cloister.runtime.server import Mounted
from cloister_trainer import job as jobs
from cloister_trainer import logs, wire
from cloister_trainer.coordinator import Coordinator
from cloister_trainer.journal import Journal
from cloister_trainer.livejob import LiveJob
from cloister_trainer.rendezvous import KeySpace
from cloister_trainer.spec import parse_request_id, parse_spec

_TRAINER: Final = "cloister.api.trainer.v1.TrainerService"
_RANK: Final = "cloister.api.trainer.v1.RankService"
_RENDEZVOUS: Final = "cloister.api.trainer.v1.RendezvousService"
_DEFAULT_LIMIT: Final = 50
_MAX_LIMIT: Final = 1000
# Progress is kept at least this far apart, and further as the job grows older, so that what is kept stays bounded.
_PROGRESS_EVERY_MS: Final = 500
_PROGRESS_PER_AGE: Final = 2000

_USERS: Final = frozenset({Role.USER})
_RANKS: Final = frozenset({Role.RANK})
CALLERS: Final[CallerTable] = {
    **{
        f"/{_TRAINER}/{method}": _USERS
        for method in ("SubmitJob", "GetJob", "ListJobs", "CancelJob", "WatchJob", "StreamLogs")
    },
    f"/{_RANK}/ReportEvent": _RANKS,
    **{
        f"/{_RENDEZVOUS}/{method}": _RANKS
        for method in ("Set", "Get", "Wait", "Add", "Check", "CompareSet", "DeleteKey")
    },
}


class TrainerServicer(pb_grpc.TrainerServiceServicer):
    """What people do with jobs; each sees those of their tenant."""

    def __init__(self, coordinator: Coordinator, journal: Journal, log_path: Callable[[str, int], Path]) -> None:
        self._coordinator = coordinator
        self._journal = journal
        self._log_path = log_path

    async def SubmitJob(self, request: pb.SubmitJobRequest, _context: Any) -> pb.SubmitJobResponse:  # noqa: N802
        caller = current_caller().spiffe_id
        spec, request_id = parse_spec(request.spec), parse_request_id(request.client_request_id)
        job_id = await self._coordinator.submit(spec, caller=caller, request_id=request_id)
        return pb.SubmitJobResponse(job=await self._journal.job(job_id, caller.tenant))

    async def GetJob(self, request: pb.GetJobRequest, _context: Any) -> pb.GetJobResponse:  # noqa: N802
        return pb.GetJobResponse(job=await self._journal.job(request.job_id, _tenant()))

    async def ListJobs(self, request: pb.ListJobsRequest, _context: Any) -> pb.ListJobsResponse:  # noqa: N802
        if request.limit > _MAX_LIMIT:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"a list of {request.limit:,} jobs",
                why=f"the limit is {_MAX_LIMIT:,}",
                todo="ask for fewer",
            )
        return pb.ListJobsResponse(jobs=await self._journal.jobs(_tenant(), request.limit or _DEFAULT_LIMIT))

    async def CancelJob(self, request: pb.CancelJobRequest, _context: Any) -> pb.CancelJobResponse:  # noqa: N802
        tenant = _tenant()
        await self._coordinator.cancel(request.job_id, tenant)
        return pb.CancelJobResponse(job=await self._journal.job(request.job_id, tenant))

    async def WatchJob(  # noqa: N802
        self, request: pb.WatchJobRequest, _context: Any
    ) -> AsyncIterator[pb.WatchJobResponse]:
        async for event in self._coordinator.watch(request.job_id, _tenant(), request.after_sequence):
            yield pb.WatchJobResponse(event=event)

    async def StreamLogs(  # noqa: N802
        self, request: pb.StreamLogsRequest, _context: Any
    ) -> AsyncIterator[pb.StreamLogsResponse]:
        job = await self._journal.job(request.job_id, _tenant())
        if not -1 <= request.rank < job.spec.nodes:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"there is no rank {request.rank}",
                why=f"the job has ranks 0 to {job.spec.nodes - 1}; -1 stands for all",
                todo="name one of them",
            )
        ranks = range(job.spec.nodes) if request.rank == -1 else [request.rank]
        paths = {rank: self._log_path(job.job_id, rank) for rank in ranks}
        go_on = (lambda: self._coordinator.runs(job.job_id)) if request.follow else (lambda: False)
        async for rank, line in logs.follow(paths, go_on=go_on):
            yield pb.StreamLogsResponse(rank=rank, line=line)


class RankServicer(pb_grpc.RankServiceServicer):
    """What ranks report; job and rank are those of the certificate."""

    def __init__(self, coordinator: Coordinator, now_ms: Callable[[], int]) -> None:
        self._coordinator = coordinator
        self._now_ms = now_ms

    async def ReportEvent(self, request: pb.ReportEventRequest, _context: Any) -> pb.ReportEventResponse:  # noqa: N802
        caller = current_caller().spiffe_id
        live = self._coordinator.of_rank(caller)
        match request.WhichOneof("kind"):
            case "message":
                live.check_room()
                message = request.message
                running = message.phase == "running"
                record = jobs.rank_running(live.record, caller.rank) if running else live.record
                event = wire.message_event(caller.rank, message.phase, message.text, message.elapsed_s)
                await live.apply(record, [event])
            case "progress":
                await self._progress(live, caller.rank, request.progress)
            case "metrics":
                live.check_room()
                await self._metrics(live, caller.rank, request.metrics)
            case "artifact":
                live.check_room()
                await live.apply(live.record, [wire.artifact_event(caller.rank, request.artifact)])
            case "failure":
                await self._coordinator.rank_failed(live, wire.failure_from(caller.rank, request.failure))
            case _:
                pass  # a rank that only asks whether to go on
        return pb.ReportEventResponse(cancelled=live.record.cancel_requested)

    async def _progress(self, live: LiveJob, rank: int, report: pb.Progress) -> None:
        progress = wire.progress_from(report)
        record = jobs.rank_progress(live.record, rank, progress)
        now_ms = self._now_ms()
        age_ms = now_ms - record.started_ms
        if now_ms - live.last_progress_ms.get(rank, 0) < max(_PROGRESS_EVERY_MS, age_ms / _PROGRESS_PER_AGE):
            live.record = record
            return
        live.last_progress_ms[rank] = now_ms
        await live.apply(record, [wire.progress_event(rank, progress)] if live.has_room else [])

    async def _metrics(self, live: LiveJob, rank: int, report: pb.MetricsLogged) -> None:
        event = wire.metrics_event(rank, report)
        results = wire.final_results(live.record.results, report) if report.final else live.record.results
        await live.apply(jobs.with_results(live.record, results), [event])


class RendezvousServicer(pb_grpc.RendezvousServiceServicer):
    """torch.distributed's store; the key space is that of the certificate's job."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._coordinator = coordinator

    def _space(self) -> KeySpace:
        return self._coordinator.of_rank(current_caller().spiffe_id).key_space

    async def Set(self, request: pb.SetRequest, _context: Any) -> pb.SetResponse:  # noqa: N802
        await self._space().set(request.key, request.value)
        return pb.SetResponse()

    async def Get(self, request: pb.GetRequest, _context: Any) -> pb.GetResponse:  # noqa: N802
        return pb.GetResponse(value=await self._space().get(request.key))

    async def Wait(self, request: pb.WaitRequest, _context: Any) -> pb.WaitResponse:  # noqa: N802
        await self._space().wait(list(request.keys))
        return pb.WaitResponse()

    async def Add(self, request: pb.AddRequest, _context: Any) -> pb.AddResponse:  # noqa: N802
        return pb.AddResponse(value=await self._space().add(request.key, request.amount))

    async def Check(self, request: pb.CheckRequest, _context: Any) -> pb.CheckResponse:  # noqa: N802
        return pb.CheckResponse(present=await self._space().check(list(request.keys)))

    async def CompareSet(self, request: pb.CompareSetRequest, _context: Any) -> pb.CompareSetResponse:  # noqa: N802
        value = await self._space().compare_set(request.key, request.expected, request.desired)
        return pb.CompareSetResponse(value=value)

    async def DeleteKey(self, request: pb.DeleteKeyRequest, _context: Any) -> pb.DeleteKeyResponse:  # noqa: N802
        return pb.DeleteKeyResponse(deleted=await self._space().delete(request.key))


def mounted(trainer: TrainerServicer, rank: RankServicer, rendezvous: RendezvousServicer) -> list[Mounted]:
    """Return the services, ready to be mounted; their callers are CALLERS."""
    return [
        Mounted(_TRAINER, pb_grpc.add_TrainerServiceServicer_to_server, trainer),
        Mounted(_RANK, pb_grpc.add_RankServiceServicer_to_server, rank),
        Mounted(_RENDEZVOUS, pb_grpc.add_RendezvousServiceServicer_to_server, rendezvous),
    ]


def _tenant() -> str:
    return current_caller().spiffe_id.tenant
