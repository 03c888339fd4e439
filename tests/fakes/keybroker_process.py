# SPDX-License-Identifier: Apache-2.0
"""The broker as the process that users run, next to a real attest and a simulated platform."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.cli.policyfile import PolicyDraft
from cloister.guest.enrol import Identity
from cloister.guest.measure import digest_of_package
from cloister.guest.owner import VerifiedService, verify_service_evidence
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.runtime.endpoints import read_endpoints
from cloister_keybroker.__main__ import init
from cloister_keybroker.config import STORE_FILE
from fakes.attest_harness import CONFIG, JOB, SCRIPT, TRUST_DOMAIN, AttestProcess, csr, measure, user_material


class BrokerProcess:
    """`python -m cloister_keybroker` next to attest and a platform."""

    def __init__(self, attest: AttestProcess) -> None:
        self.attest = attest
        self.directory = attest.directory
        self.root_key = self.directory / "root.key"
        self.store = self.directory / "keybroker" / STORE_FILE
        self.endpoints_file = self.directory / "keybroker.endpoints.json"
        self.config_file = self.directory / "keybroker.toml"
        self.log_file = self.directory / "keybroker.log"
        self.process: asyncio.subprocess.Process | None = None

    @property
    def endpoint(self) -> str:
        return read_endpoints(self.endpoints_file)["grpc"]

    def write_config(self, more: str = "", *, root_key: str = "file:root.key") -> None:
        self.config_file.write_text(
            f'[service]\ntrust_domain = "{TRUST_DOMAIN}"\nstate_dir = "keybroker"\n'
            f'endpoints_file = "{self.endpoints_file.name}"\n'
            f'[guest]\nprovider = "simulated:{self.attest.socket}"\n'
            f'attest_endpoint = "{self.attest.endpoints["enrolment"]}"\n'
            f'trust_bundle = "{self.attest.bundle_file.name}"\n'
            f'[keybroker]\nroot_key = "{root_key}"\noperators = ["{self.attest.user_id}"]\n{more}'
        )

    async def start(self) -> None:
        """Start, and wait until it is ready or has ended."""
        with self.log_file.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "cloister_keybroker",
                "--config",
                str(self.config_file),
                stdout=log,
                stderr=log,
                env=dict(os.environ),
            )
        deadline = time.monotonic() + 30
        while not self.endpoints_file.exists():
            if self.process.returncode is not None or time.monotonic() > deadline:
                raise AssertionError(f"exit {self.process.returncode}\n{self.log_file.read_text()[-4000:]}")
            await asyncio.sleep(0.02)

    async def fails(self) -> tuple[int, str]:
        """Start and expect it to end by itself; return exit code and log."""
        self.log_file.unlink(missing_ok=True)
        with pytest.raises(AssertionError, match="exit"):
            await self.start()
        assert self.process is not None
        return self.process.returncode or 0, self.log_file.read_text()

    async def stop(self, *, kill: bool = False) -> int:
        if self.process is None:
            return 0
        if self.process.returncode is None:
            if kill:
                self.process.kill()
            else:
                self.process.terminate()
        return await self.process.wait()


@asynccontextmanager
async def a_stack(root_key: str = "file:root.key") -> AsyncIterator[tuple[AttestProcess, BrokerProcess]]:
    """Give attest, and a broker that was not started yet; its store is made where the root key is a file."""
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        attest = AttestProcess(Path(directory))
        broker = BrokerProcess(attest)
        try:
            await attest.start_platform()
            attest.write_config(keybroker=digest_of_package("cloister_keybroker").hex())
            await attest.start()
            if root_key.startswith("file:"):
                arguments = ["--root-key-file", str(broker.root_key), "--state-dir", str(broker.store.parent)]
                assert await asyncio.to_thread(init, arguments) == 0
            broker.write_config(root_key=root_key)
            yield attest, broker
        finally:
            await broker.stop()
            await attest.stop_all()


async def the_user(attest: AttestProcess) -> StaticCredentials:
    """Give the credentials of the one registered user: an owner of keys, and the broker's operator."""
    async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
        request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key))
        method = attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate
        response = await invoke(method, request, timeout_s=10, what="get a certificate")
    return StaticCredentials(user_material(attest.user_key, response.certificate_chain_pem, attest.bundle))


async def the_verified_broker(broker: BrokerProcess, credentials: StaticCredentials) -> VerifiedService:
    """Verify the broker's evidence as users do."""
    return await verify_service_evidence(
        broker.endpoint,
        role=Role.KEYBROKER,
        credentials=credentials,
        verifier=broker.attest.verifier,
        expected_scripts=[digest_of_package("cloister_keybroker")],
        now=datetime.now(UTC),
    )


async def a_rank(attest: AttestProcess) -> Identity:
    """Register a job and enrol a rank of it."""
    trainer = await attest.service(Role.TRAINER)
    async with open_channel(attest.endpoints["grpc"], role=Role.ATTEST, credentials=trainer) as channel:
        request = attest_pb2.RegisterJobRequest(
            job_id=JOB.job_id, tenant=JOB.tenant, world_size=2, script_digest=SCRIPT, config_digest=CONFIG
        )
        await invoke(
            attest_pb2_grpc.RegistryServiceStub(channel).RegisterJob, request, timeout_s=10, what="register a job"
        )
    guest = attest.launch()
    measure(guest, Role.RANK, bundle=attest.bundle.digest)
    return await Identity.enrol(guest, attest_endpoint=attest.endpoints["enrolment"], bundle=attest.bundle)


def a_policy(attest: AttestProcess, uri: str, *, simulated: bool, version: int = 1, previous: str = "") -> bytes:
    """Return a policy that lets that rank in."""
    draft = PolicyDraft(
        name="reviews",
        owner=str(attest.user_id),
        key_uri=uri,
        purposes=["train"],
        scripts=[f"sha384:{SCRIPT.hex()}"],
        identities=[f"spiffe://{TRUST_DOMAIN}/ns/{JOB.tenant}/job/*/rank/*"],
        simulated=simulated,
        version=version,
        previous=previous,
    )
    return draft.to_yaml().encode()
