# SPDX-License-Identifier: Apache-2.0
"""A stack of real processes for the trainer's tests: simulated platform, attest, keybroker, trainer; two tenants."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.api.trainer.v1 import trainer_pb2 as pb
from cloister.api.trainer.v1 import trainer_pb2_grpc as pb_grpc
from cloister.cli.policyfile import PolicyDraft
from cloister.errors import CloisterError
from cloister.guest.enrol import Identity
from cloister.guest.guest import Guest
from cloister.guest.measure import digest_of_environment
from cloister.guest.ownerkeys import OwnerKeyClient
from cloister.identity import Role
from cloister.protocol import job_config_digest
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel, stream
from cloister.runtime.credentials import StaticCredentials, TlsMaterial
from cloister.runtime.endpoints import read_endpoints
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.secret import SecretBytes
from cloister.tdx import workload
from cloister.tlv import sha384
from fakes.signing import OWNER_KEY

TRUST_DOMAIN = "cloister.test"
TENANT, OTHER_TENANT = "lab", "rival"
PACKAGES = {"attest": "cloister_attest", "keybroker": "cloister_keybroker", "trainer": "cloister_trainer"}
ENDED = (pb.JOB_STATE_SUCCEEDED, pb.JOB_STATE_FAILED, pb.JOB_STATE_CANCELLED)


def wait_until(condition: Callable[[], Any], *, timeout_s: float = 30.0, what: str = "") -> Any:
    """Poll until `condition` gives something true, and return that."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(what or "what was waited for did not come")


@dataclass
class Provisioned:
    """A sealed directory and the keys that a policy gives to jobs of certain scripts."""

    directory: Path
    data_uri: str
    output_uri: str
    digest: bytes

    def input(self, name: str = "data") -> pb.SealedInput:
        return pb.SealedInput(
            name=name, uri=self.directory.as_uri(), key_uri=self.data_uri, manifest_digest=self.digest
        )

    def output(self, directory: Path) -> pb.SealedOutput:
        return pb.SealedOutput(uri=directory.as_uri(), key_uri=self.output_uri)


@dataclass
class Stack:
    """Processes of one directory; use `running_stack`."""

    directory: Path
    cores: tuple[int, ...]
    options: dict[str, Any]  # more of [trainer]
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _users: dict[str, ec.EllipticCurvePrivateKey] = field(default_factory=dict)
    _keys: int = 0

    def start(self) -> None:
        for tenant in (TENANT, OTHER_TENANT):
            self._users[tenant] = ec.generate_private_key(ec.SECP256R1())
        self._lifeline_read, self._lifeline_write = os.pipe()
        socket = self.directory / "sim.sock"
        self._spawn("sim", ["-m", "cloister_sim", "--directory", str(self.directory / "sim"), "--socket", str(socket)])
        wait_until(socket.exists, what="the simulated platform did not start")
        self.start_service("attest")
        root_key, store = self.directory / "root.key", self.directory / "keybroker"
        command = [sys.executable, "-m", "cloister_keybroker", "init"]
        command += ["--root-key-file", str(root_key), "--state-dir", str(store)]
        subprocess.run(command, check=True, capture_output=True)
        self.start_service("keybroker")
        self.start_service("trainer")

    def start_service(self, name: str) -> None:
        path = self.directory / f"{name}.toml"
        path.write_text(getattr(self, f"_{name}_toml")())
        self._endpoints_file(name).unlink(missing_ok=True)
        self._spawn(name, ["-m", PACKAGES[name], "--config", str(path)])

        def ready() -> bool:
            if self._processes[name].poll() is not None:
                raise RuntimeError(f"{name} ended:\n{self.log(name)[-3000:]}")
            return self._endpoints_file(name).exists()

        wait_until(ready, what=f"{name} did not start")

    def stop_service(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        process = self._processes.pop(name)
        process.send_signal(how)
        process.wait(30)

    def stop(self) -> None:
        for name in reversed(list(self._processes)):
            self.stop_service(name)
        os.close(self._lifeline_write)
        os.close(self._lifeline_read)

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def process_id(self, name: str) -> int:
        return self._processes[name].pid

    def endpoint(self, service: str, name: str = "grpc") -> str:
        return read_endpoints(self._endpoints_file(service))[name]

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle.parse((self.directory / "bundle.json").read_bytes())

    def user(self, tenant: str = TENANT) -> StaticCredentials:
        """Return a fresh certificate of a tenant's user."""
        key = self._users[tenant]
        request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())

        async def issue() -> bytes:
            async with open_enrolment_channel(self.endpoint("attest", "enrolment"), bundle=self.bundle) as channel:
                answer = await invoke(
                    attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate,
                    attest_pb2.IssueUserCertificateRequest(csr_der=request.public_bytes(serialization.Encoding.DER)),
                    timeout_s=10,
                    what="get a user's certificate",
                )
                return bytes(answer.certificate_chain_pem)

        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return StaticCredentials(TlsMaterial.from_pem(SecretBytes(pem), _in_a_loop(issue()), self.bundle))

    def provision(
        self, source: Path, *, scripts: Sequence[bytes], tenant: str = TENANT, lease: str = "1h"
    ) -> Provisioned:
        """Seal a directory, and let jobs of `tenant` with one of these scripts train on it."""
        self._keys += 1
        owner = f"spiffe://{TRUST_DOMAIN}/ns/{tenant}/user/owner"
        uris = [f"cloister-key://{tenant}/{kind}-{self._keys}" for kind in ("data", "output")]
        credentials = self.user(tenant)

        async def work() -> Path:
            client = OwnerKeyClient(credentials, self.endpoint("keybroker"), signing_key=OWNER_KEY)
            for uri in uris:
                draft = PolicyDraft(
                    "tests",
                    owner,
                    uri,
                    ("train",),
                    [f"sha384:{sha384(script).hex()}" for script in scripts],
                    [f"spiffe://{TRUST_DOMAIN}/ns/{tenant}/job/*/rank/*"],
                    simulated=True,
                    lease=lease,
                )
                await client.create_key(uri, purposes=["train", "export"], policy=draft.to_yaml().encode())
            data_key = await client.generate_data_key(uris[0])
            out = self.directory / f"sealed-{self._keys}"
            seal_directory(source, out, data_key=data_key, dataset="tests")
            return out

        out = _in_a_loop(work())
        return Provisioned(out, uris[0], uris[1], SealedDirectory.peek(out).manifest_digest)

    def open(self, directory: Path, tenant: str = TENANT) -> SealedDirectory:
        """Open a sealed directory as its owner."""
        return SealedDirectory.open(directory, data_key=self.open_key(directory, tenant))

    def open_key(self, sealed: Path | Provisioned, tenant: str = TENANT) -> DataKey:
        """Return the data key of a sealed directory to its owner."""
        peek = SealedDirectory.peek(sealed.directory if isinstance(sealed, Provisioned) else sealed)
        client = OwnerKeyClient(self.user(tenant), self.endpoint("keybroker"), signing_key=OWNER_KEY)
        key: DataKey = _in_a_loop(
            client.open_data_key(peek.key_uri, key_version=peek.key_version, wrapped=peek.wrapped)
        )
        return key

    def _spawn(self, name: str, arguments: list[str]) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, *arguments, "--lifeline-fd", str(self._lifeline_read)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[self._lifeline_read],
            )

    def _endpoints_file(self, name: str) -> Path:
        return self.directory / f"{name}.endpoints.json"

    def _service_toml(self, name: str) -> str:
        return (
            f'[service]\ntrust_domain = "{TRUST_DOMAIN}"\nstate_dir = "{self.directory / name}"\n'
            f'endpoints_file = "{self._endpoints_file(name)}"\n'
            f'[guest]\nprovider = "simulated:{self.directory / "sim.sock"}"\n'
        )

    def _guest_toml(self) -> str:
        enrolment = self.endpoint("attest", "enrolment")
        return f'attest_endpoint = "{enrolment}"\ntrust_bundle = "{self.directory / "bundle.json"}"\n'

    def _attest_toml(self) -> str:
        services = "".join(
            f'[[services]]\nrole = "{role}"\nscript = ["sha384:{digest_now(package)}"]\n'
            for role, package in PACKAGES.items()
        )
        users = "".join(
            f'[[users]]\nspiffe_id = "spiffe://{TRUST_DOMAIN}/ns/{tenant}/user/owner"\n'
            f'spki_sha256 = "{_spki_sha256(key)}"\n'
            for tenant, key in self._users.items()
        )
        return (
            f'{self._service_toml("attest")}[attest]\nbundle_file = "{self.directory / "bundle.json"}"\n'
            f'[collateral]\nsource = "offline:{self.directory / "sim" / "collateral"}"\n'
            f'[[trust_roots]]\npath = "{self.directory / "sim" / "root.pem"}"\nsimulated = true\n{services}{users}'
        )

    def _keybroker_toml(self) -> str:
        return (
            self._service_toml("keybroker")
            + self._guest_toml()
            + f'[keybroker]\nroot_key = "file:{self.directory / "root.key"}"\n'
        )

    def _trainer_toml(self) -> str:
        more = "".join(f"{name} = {value}\n" for name, value in self.options.items())
        return (
            self._service_toml("trainer")
            + self._guest_toml()
            + f'[trainer]\nattest_endpoint = "{self.endpoint("attest")}"\n'
            + f'keybroker_endpoint = "{self.endpoint("keybroker")}"\ncores = {list(self.cores)}\n{more}'
        )


@contextmanager
def running_stack(directory: Path, *, cores: tuple[int, ...] = (0, 1), **options: Any) -> Iterator[Stack]:
    """Start the processes and end them; `options` go into the trainer's section."""
    directory.mkdir(parents=True, exist_ok=True)
    stack = Stack(directory, cores, options)
    try:
        stack.start()
        yield stack
    finally:
        stack.stop()


class Client:
    """A user's view of the trainer."""

    def __init__(self, channel: Any) -> None:
        self.stub = pb_grpc.TrainerServiceStub(channel)

    async def submit(self, spec: pb.JobSpec, request_id: str = "") -> pb.Job:
        request = pb.SubmitJobRequest(spec=spec, client_request_id=request_id)
        job: pb.Job = (await invoke(self.stub.SubmitJob, request, timeout_s=10, what="submit")).job
        return job

    async def job(self, job_id: str) -> pb.Job:
        answer = await invoke(self.stub.GetJob, pb.GetJobRequest(job_id=job_id), timeout_s=10, what="get")
        job: pb.Job = answer.job
        return job

    async def cancel(self, job_id: str) -> pb.Job:
        answer = await invoke(self.stub.CancelJob, pb.CancelJobRequest(job_id=job_id), timeout_s=10, what="cancel")
        job: pb.Job = answer.job
        return job

    async def watch(self, job_id: str, after: int = 0) -> AsyncIterator[pb.Event]:
        request = pb.WatchJobRequest(job_id=job_id, after_sequence=after)
        async for answer in stream(self.stub.WatchJob, request, what="watch"):
            yield answer.event

    async def until(self, job_id: str, found: Callable[[pb.Event], bool]) -> pb.Event:
        """Watch until an event is `found`."""
        async for event in self.watch(job_id):
            if found(event):
                return event
        raise AssertionError(f"the job ended without it: {(await self.job(job_id)).reason}")

    async def to_the_end(self, job_id: str) -> tuple[pb.Job, list[pb.Event]]:
        events = [event async for event in self.watch(job_id)]
        return await self.job(job_id), events

    async def logs(self, job_id: str, rank: int = -1, *, follow: bool = False) -> list[tuple[int, str]]:
        request = pb.StreamLogsRequest(job_id=job_id, rank=rank, follow=follow)
        return [(a.rank, a.line) async for a in stream(self.stub.StreamLogs, request, what="logs")]


@asynccontextmanager
async def client_of(stack: Stack, tenant: str = TENANT) -> AsyncIterator[Client]:
    """Open the trainer as a tenant's user."""
    credentials = await asyncio.to_thread(stack.user, tenant)
    async with open_channel(stack.endpoint("trainer"), role=Role.TRAINER, credentials=credentials) as channel:
        yield Client(channel)


async def enrol_as_rank(
    stack: Stack, job: pb.Job, rank: int = 0, *, tenant: str = TENANT, world_size: int = 0, script: bytes = b""
) -> Identity:
    """Enrol this process's own simulated TD as a rank of a job, by claims that may be false."""
    nodes = world_size or job.spec.nodes
    guest = Guest.open(f"simulated:{stack.directory / 'sim.sock'}")
    config = job_config_digest(args=job.spec.args, nodes=nodes, seed=job.spec.seed, inputs=[], output_key_uri="")
    guest.measure(workload.ENVIRONMENT, digest_of_environment())
    guest.measure(workload.TRUST_BUNDLE, stack.bundle.digest)
    guest.measure(workload.SCRIPT, sha384(script or job.spec.script))
    guest.measure(workload.CONFIG, config)
    guest.measure(workload.RANK, workload.RankClaim(tenant, job.job_id, rank, nodes).to_payload())
    guest.seal(Role.RANK)
    endpoint = stack.endpoint("attest", "enrolment")
    try:
        return await Identity.enrol(guest, attest_endpoint=endpoint, bundle=stack.bundle)
    except CloisterError:
        guest.close()
        raise


def spec(script: str | bytes, *, nodes: int = 1, **fields: Any) -> pb.JobSpec:
    """Return a job description."""
    data = script.encode() if isinstance(script, str) else script
    return pb.JobSpec(name="tests", script=data, nodes=nodes, seed=7, **fields)


def phase(name: str, rank: int | None = None) -> Callable[[pb.Event], bool]:
    """Recognise a rank's message."""
    return lambda event: event.message.phase == name and rank in (None, event.rank)


def living(job: pb.Job) -> list[int]:
    """Return the processes of a job's ranks that still live."""
    return [rank.process_id for rank in job.ranks if rank.process_id and _lives(rank.process_id)]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def digest_now(package: str) -> str:
    """Measure a package (hex) in a new process: this one keeps the first digest, and sources may have changed since."""
    code = "import sys; from cloister.guest.measure import digest_of_package as d; print(d(sys.argv[1]).hex())"
    return subprocess.run(
        [sys.executable, "-c", code, package], check=True, capture_output=True, text=True
    ).stdout.strip()


def _spki_sha256(key: ec.EllipticCurvePrivateKey) -> str:
    spki = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(spki).hexdigest()


def _in_a_loop(work: Any) -> Any:
    """Run on a loop of its own: fixtures are not async, tests are."""
    return asyncio.run(work)
