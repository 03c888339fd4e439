# SPDX-License-Identifier: Apache-2.0
"""The broker as users run it: enrolled with a real attest, keys released to a TD that a real platform quotes for."""

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
from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.keys import KeyClient
from cloister.guest.measure import digest_of_package
from cloister.guest.owner import OwnerKeyClient, verify_service_evidence
from cloister.identity import Role
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.credentials import StaticCredentials
from cloister.runtime.endpoints import read_endpoints
from cloister_keybroker.__main__ import init
from cloister_keybroker.config import STORE_FILE
from cloister_keybroker.rootkey import create_root_key
from fakes.attest_harness import CONFIG, JOB, SCRIPT, TRUST_DOMAIN, AttestProcess, csr, measure, user_material

URI = "cloister-key://hospital-a/datasets/reviews"


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

    def write_config(self, more: str = "") -> None:
        self.config_file.write_text(
            f'[service]\ntrust_domain = "{TRUST_DOMAIN}"\nstate_dir = "keybroker"\n'
            f'endpoints_file = "{self.endpoints_file.name}"\n'
            f'[guest]\nprovider = "simulated:{self.attest.socket}"\n'
            f'attest_endpoint = "{self.attest.endpoints["enrolment"]}"\n'
            f'trust_bundle = "{self.attest.bundle_file.name}"\n'
            f'[keybroker]\nroot_key = "file:root.key"\n{more}'
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
async def a_stack() -> AsyncIterator[tuple[AttestProcess, BrokerProcess]]:
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        attest = AttestProcess(Path(directory))
        broker = BrokerProcess(attest)
        try:
            await attest.start_platform()
            attest.write_config(keybroker=digest_of_package("cloister_keybroker").hex())
            await attest.start()
            arguments = ["--root-key-file", str(broker.root_key), "--state-dir", str(broker.store.parent)]
            assert await asyncio.to_thread(init, arguments) == 0
            broker.write_config()
            yield attest, broker
        finally:
            await broker.stop()
            await attest.stop_all()


async def the_owner(attest: AttestProcess) -> StaticCredentials:
    async with open_enrolment_channel(attest.endpoints["enrolment"], bundle=attest.bundle) as channel:
        request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key))
        method = attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate
        response = await invoke(method, request, timeout_s=10, what="get a certificate")
    return StaticCredentials(user_material(attest.user_key, response.certificate_chain_pem, attest.bundle))


async def a_rank(attest: AttestProcess) -> Identity:
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


def a_policy(attest: AttestProcess, *, simulated: bool, version: int = 1, previous: str = "") -> bytes:
    draft = PolicyDraft(
        name="reviews",
        owner=str(attest.user_id),
        key_uri=URI,
        purposes=["train"],
        scripts=[f"sha384:{SCRIPT.hex()}"],
        identities=[f"spiffe://{TRUST_DOMAIN}/ns/{JOB.tenant}/job/*/rank/*"],
        simulated=simulated,
        version=version,
        previous=previous,
    )
    return draft.to_yaml().encode()


async def test_from_a_sealed_key_to_an_attested_rank_and_across_a_restart() -> None:
    async with a_stack() as (attest, broker):
        await broker.start()
        credentials = await the_owner(attest)
        await verify_service_evidence(
            broker.endpoint,
            role=Role.KEYBROKER,
            credentials=credentials,
            verifier=attest.verifier,
            expected_scripts=[digest_of_package("cloister_keybroker")],
            now=datetime.now(UTC),
        )
        owner = OwnerKeyClient(credentials, broker.endpoint)
        await owner.create_key(URI, purposes=["train", "export"], policy_yaml=a_policy(attest, simulated=False))
        made = await owner.generate_data_key(URI)
        rank = await a_rank(attest)
        with pytest.raises(CloisterError, match=r"block tee\.simulated") as caught:
            await KeyClient(rank, broker.endpoint).release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert caught.value.code is Code.RELEASE_DENIED

        digest = (await owner.policy(URI)).digest.hex()
        allowed = a_policy(attest, simulated=True, version=2, previous=f"sha384:{digest}")
        await owner.put_policy(URI, allowed)
        client = KeyClient(rank, broker.endpoint)
        released = await client.release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert released.secret == made.secret
        again = await client.release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert again.secret == made.secret
        new = await client.release(URI, "train", wrapped=None)
        assert new.secret != made.secret

        await broker.stop(kill=True)
        broker.endpoints_file.unlink()
        await broker.start()
        owner = OwnerKeyClient(credentials, broker.endpoint)
        opened = await owner.open_data_key(URI, key_version=1, wrapped=new.wrapped)
        assert opened.secret == new.secret
        await owner.disable(URI)
        with pytest.raises(CloisterError) as caught:
            await KeyClient(rank, broker.endpoint).release(URI, "train", wrapped=made.wrapped, key_version=1)
        assert caught.value.code is Code.KEY_DISABLED
        await rank.aclose()
        assert await broker.stop() == 0
        # What was written anywhere never holds a data key or the root key.
        root = broker.root_key.read_text().strip()
        for path in broker.directory.rglob("*"):
            if path.is_file() and path != broker.root_key:
                data = path.read_bytes()
                for secret in (made.secret.reveal(), new.secret.reveal(), bytes.fromhex(root)):
                    assert secret not in data, path
                    assert secret.hex().encode() not in data, path


@pytest.mark.parametrize(
    "trouble",
    [
        "no root key",
        "open root key",
        "other root key",
        "unknown key in the file",
        "no such back end",
        "no store",
        "empty store",
        "shares",
    ],
)
async def test_a_broker_that_cannot_be_right_does_not_start(trouble: str) -> None:
    async with a_stack() as (_, broker):
        if trouble == "other root key":
            await broker.start()
            assert await broker.stop() == 0
            broker.root_key.unlink()
            create_root_key(broker.root_key)
        elif trouble == "no root key":
            broker.root_key.unlink()
        elif trouble == "open root key":
            broker.root_key.chmod(0o644)
        elif trouble == "no store":
            broker.store.unlink()
        elif trouble == "empty store":
            broker.store.write_bytes(b"")
        elif trouble == "shares":
            broker.config_file.write_text(broker.config_file.read_text().replace("file:root.key", "shares"))
        elif trouble == "no such back end":
            broker.write_config("backend = 'cloud'\n")
        else:
            broker.write_config("cloud = true\n")
        code, log = await broker.fails()
        expected = {
            "no root key": (5, "CLO-1003"),
            "open root key": (2, "CLO-1001"),
            "other root key": (1, "CLO-1310"),
            "unknown key in the file": (2, "allowed keys: backend, former_backends, operators, root_key"),
            "no such back end": (2, "it does not begin with a scheme"),
            "no store": (5, "there is no database at"),
            "empty store": (1, "is empty"),
            "shares": (2, "the store's root key comes from: file"),
        }[trouble]
        assert (code, expected[1] in log) == (expected[0], True), log
        # Nothing was made in its place.
        assert not (trouble == "no store" and broker.store.exists())
        assert not (trouble == "no root key" and broker.root_key.exists())
