# SPDX-License-Identifier: Apache-2.0
"""Jobs in attest's registry: measurements that may become ranks, while the job runs."""

from __future__ import annotations

from typing import Final

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.runtime.channel import SwappingChannel, invoke
from cloister_trainer.job import JobRecord

_TIMEOUT_S: Final = 20.0


class AttestRegistry:
    """Attest's RegistryService."""

    def __init__(self, channel: SwappingChannel) -> None:
        self._stub = attest_pb2_grpc.RegistryServiceStub(channel)

    async def register(self, record: JobRecord) -> None:
        """Register a job before its first rank starts; raise CloisterError."""
        request = attest_pb2.RegisterJobRequest(
            job_id=record.job_id,
            tenant=record.tenant,
            world_size=record.spec.nodes,
            script_digest=record.spec.script_digest,
            config_digest=record.spec.config_digest,
        )
        await invoke(self._stub.RegisterJob, request, timeout_s=_TIMEOUT_S, what="register the job with attest")

    async def close(self, job_id: str) -> None:
        """Let no more ranks of a job enrol; raise CloisterError."""
        request = attest_pb2.CloseJobRequest(job_id=job_id)
        await invoke(self._stub.CloseJob, request, timeout_s=_TIMEOUT_S, what="close the job at attest")
