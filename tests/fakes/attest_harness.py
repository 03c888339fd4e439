# SPDX-License-Identifier: Apache-2.0
"""Attest with everything real around it: in this process with a clock to turn, or as the processes users run."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.appraisal.policy import STRICT, TdPolicy
from cloister.appraisal.references import ReferenceSet
from cloister.collateral.offline import OfflineCollateral
from cloister.errors import CloisterError
from cloister.guest.enrol import Identity
from cloister.guest.evidence import EvidenceVerifier
from cloister.guest.guest import Guest
from cloister.guest.measure import attest_configuration, digest_of_package
from cloister.holderkey import read_holder_public
from cloister.identity import Role, SpiffeId
from cloister.protocol import combined_nonce
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import invoke, open_channel, open_enrolment_channel
from cloister.runtime.credentials import CredentialSource, StaticCredentials, TlsMaterial
from cloister.runtime.database import Database
from cloister.runtime.endpoints import read_endpoints
from cloister.secret import SecretBytes
from cloister.tdx import workload
from cloister.tdx.collateral import Collateral
from cloister.tdx.pckchain import load_pck_chain
from cloister.tdx.pckextension import PckExtension
from cloister.tdx.quote import Quote, TdBody
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verifier import Verifier
from cloister.tdx.workload import BackendClaim, DatasetClaim, RankClaim
from cloister.tlv import sha384
from cloister_attest.appraise import AppraisalPolicy
from cloister_attest.ca import WorkloadCa
from cloister_attest.castate import CaState
from cloister_attest.denylist import DenyList
from cloister_attest.enrolment import Enrolment, Terms
from cloister_attest.epochs import Schedule
from cloister_attest.identities import Callers, IdentityServicer
from cloister_attest.issued import IssuedRegister
from cloister_attest.registry import MIGRATIONS, Registry
from cloister_attest.results import td_policy_digest
from cloister_attest.revocation import Revocation
from cloister_attest.tableseal import TableSealer
from cloister_attest.users import Standing, User, UserRegister
from cloister_attest.verdicts import Verdicts
from cloister_attest.workloads import Backend, Job
from cloister_sim.platform import SimulatedPlatform, SimulatedTd

TRUST_DOMAIN = "cloister.test"
ATTEST_ID = f"spiffe://{TRUST_DOMAIN}/service/attest"
IMAGE = b"\x11" * 48
ENVIRONMENT = b"\x12" * 48
SCRIPT = b"\x13" * 48
CONFIG = b"\x14" * 48
MANIFEST = b"\x15" * 48
SCHEDULE = Schedule()
JOB = Job("j-1", "hospital-a", 2, SCRIPT, CONFIG)
BACKEND = Backend("hospital-a", "reviews", "b-0", SCRIPT, CONFIG)


class TdProvider:
    """A quote provider on a TD in this process; `change` lets an adversary's platform report something else."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        self._platform = platform
        self._td: SimulatedTd = platform.launch(IMAGE)
        self.attributes: bytes | None = None

    @property
    def boot_log(self) -> bytes:
        return self._td.boot_log

    def extend(self, index: int, digest: bytes) -> bytes:
        return self._td.extend(index, digest)

    def quote(self, report_data: bytes) -> bytes:
        body: TdBody = self._td.report(report_data)
        if self.attributes is not None:
            body = replace(body, td_attributes=self.attributes)
        return self._platform.sign(body)

    def close(self) -> None:
        pass


@dataclass
class Clock:
    """A clock that stands until it is turned; `set_to` changes what it shows, and no time goes by."""

    now: datetime = field(default_factory=lambda: datetime.now(UTC))
    gone: timedelta = timedelta()

    def __call__(self) -> datetime:
        return self.now

    def turn(self, **by: float) -> None:
        self.now += timedelta(**by)
        self.gone += timedelta(**by)

    def set_to(self, now: datetime) -> None:
        self.now = now

    def elapsed_s(self) -> float:
        return self.gone.total_seconds()


class PlatformCollateral:
    """What Intel would say about a simulated platform, at the clock's time; `change` lets a test say something else."""

    def __init__(self, platform: SimulatedPlatform, clock: Clock) -> None:
        self._collateral = platform.collateral(clock())
        self.asked: list[tuple[bytes, str, str]] = []
        self.problem: CloisterError | None = None

    def change(self, collateral: Collateral) -> None:
        self._collateral = collateral

    async def get(self, fmspc: bytes, ca: str, tee: str) -> Collateral:
        self.asked.append((fmspc, ca, tee))
        if self.problem is not None:
            raise self.problem
        return self._collateral


class LocalAttest:
    """Attest's core without its ports: the same objects that the process wires together."""

    def __init__(
        self,
        directory: Path,
        *,
        trust_domain: str = TRUST_DOMAIN,
        kept_verdicts: int = 1000,
        kept_bundles: int = 1000,
        policy: TdPolicy = STRICT,
        references: Sequence[ReferenceSet] = (),
        quotes: Callable[[TrustRoot], Verifier] | None = None,
        users: Sequence[User] = (),
        schedule: Schedule = SCHEDULE,
    ) -> None:
        self.clock = Clock()
        self.platform = SimulatedPlatform.create(directory / "platform")
        self.database = Database.open(directory / "attest.sqlite", MIGRATIONS)
        self.state = CaState.begin(trust_domain, now=self.clock())
        self.sealer = TableSealer(self.database)
        self.database.write_sync(lambda connection: self.sealer.take(
            connection, self.state.register_key, self.state.epochs.generation, present=False
        ))  # fmt: skip
        self.issued = IssuedRegister(self.database)
        self.ca = WorkloadCa(self.state, issued=self.issued, sealer=self.sealer, schedule=schedule, clock=self.clock)
        self.revocation = Revocation(self.ca, self.issued)
        self.registry = Registry(self.database)
        self.verdicts = Verdicts(self.database, limit=kept_verdicts, grounds_limit=kept_bundles)
        self.denials = DenyList(self.database, self.sealer)
        self.source = PlatformCollateral(self.platform, self.clock)
        self.verifier = EvidenceVerifier(
            self.root, self.source, policy=policy, references=references, quotes=quotes and quotes(self.root)
        )
        self.user_key = ec.generate_private_key(ec.SECP256R1())
        self.user_id = SpiffeId.of_user(trust_domain, tenant="hospital-a", user="alice")
        alice = User(self.user_id, hashlib.sha256(spki(self.user_key)).digest(), Standing.USER, "", None)
        self.users = UserRegister(self.database, self.sealer, [alice, *users])
        services = {role: frozenset({SCRIPT}) for role in Role if role.is_service}
        self.enrolment = Enrolment(
            ca=self.ca,
            policy=AppraisalPolicy(trust_domain, self.bundle.digest, services, td_policy_digest(self.verifier)),
            verifier=self.verifier,
            users=self.users,
            issued=self.issued,
            registry=self.registry,
            verdicts=self.verdicts,
            denials=self.denials,
            terms=Terms(
                svid=timedelta(hours=1),
                result=timedelta(minutes=5),
                user=timedelta(hours=12),
                nonce=timedelta(seconds=60),
            ),
            clock=self.clock,
            elapsed_s=self.clock.elapsed_s,
        )

    @property
    def bundle(self) -> TrustBundle:
        return self.ca.bundle

    def callers(self) -> Callers:
        return Callers(self.users, self.denials)

    def identities(self) -> IdentityServicer:
        """The RPCs about users and denials, without their port."""
        return IdentityServicer(self.callers(), self.users, self.denials, self.enrolment, self.revocation,
                                own_facts=lambda: self.enrolment.own_facts, clock=self.clock)  # fmt: skip

    @property
    def root(self) -> TrustRoot:
        return TrustRoot.from_pem(self.platform.root_pem, simulated=True)

    @property
    def platform_fmspc(self) -> bytes:
        return self._pck.fmspc

    @property
    def platform_piid(self) -> bytes:
        return self._pck.platform_instance_id

    @property
    def _pck(self) -> PckExtension:
        quote = Quote.parse(self.platform.launch(IMAGE).quote(bytes(64)))
        return load_pck_chain(quote.signature.pck_chain_pem, roots=[self.root]).pck

    def td(
        self,
        role: Role,
        *,
        platform: SimulatedPlatform | None = None,
        script: bytes = SCRIPT,
        config: bytes = CONFIG,
        bundle: bytes | None = None,
        rank: RankClaim | None = None,
        backend: BackendClaim | None = None,
        attributes: bytes | None = None,
    ) -> Guest:
        """Launch, measure and seal a TD: an acceptable one of its role unless told otherwise."""
        provider = TdProvider(platform or self.platform)
        provider.attributes = attributes
        guest = Guest(provider)
        measure(guest, role, bundle=bundle or self.bundle.digest, script=script, config=config, rank=rank,
                backend=backend)  # fmt: skip
        return guest

    async def enrol(self, guest: Guest) -> Identity:
        return await Identity.enrol_through(self.enrolment, guest, bundle=self.bundle, clock=self.clock)

    async def request(self, guest: Guest, *, relying_party_nonce: bytes = b"") -> attest_pb2.AttestRequest:
        """Return an acceptable request, for a test to spoil."""
        challenge = await self.enrolment.challenge(attest_pb2.ChallengeRequest(role=guest.role))
        return attest_pb2.AttestRequest(
            evidence=guest.evidence(
                nonce=combined_nonce(challenge.nonce, relying_party_nonce),
                audience=challenge.audience,
                trust_domain=self.bundle.trust_domain,
            ),
            challenge_nonce=challenge.nonce,
            relying_party_nonce=relying_party_nonce,
            csr_der=csr(guest.keys.tls),
        )


@contextmanager
def local_attest(**options: object) -> Iterator[LocalAttest]:
    with tempfile.TemporaryDirectory() as directory:
        attest = LocalAttest(Path(directory), **options)  # type: ignore[arg-type]
        try:
            yield attest
        finally:
            attest.database.close()


def measure(
    guest: Guest,
    role: Role,
    *,
    bundle: bytes,
    script: bytes = SCRIPT,
    config: bytes = CONFIG,
    rank: RankClaim | None = None,
    backend: BackendClaim | None = None,
) -> None:
    """Measure a plausible workload and seal the TD."""
    guest.measure(workload.ENVIRONMENT, ENVIRONMENT)
    guest.measure(workload.TRUST_BUNDLE, bundle)
    guest.measure(workload.SCRIPT, script)
    guest.measure(workload.CONFIG, config)
    if role is Role.RANK:
        claim = rank or RankClaim(JOB.tenant, JOB.job_id, 0, JOB.world_size)
        guest.measure(workload.RANK, claim.to_payload())
        guest.measure(workload.DATASET, DatasetClaim("train", MANIFEST).to_payload())
    if role is Role.BACKEND:
        place = backend or BackendClaim(BACKEND.tenant, BACKEND.model, BACKEND.backend)
        guest.measure(workload.BACKEND, place.to_payload())
    guest.seal(role)


def csr(key: ec.EllipticCurvePrivateKey, common_name: str = "") -> bytes:
    names = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
    return (x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names)).sign(key, SHA256())).public_bytes(
        Encoding.DER
    )


def spki(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class AttestProcess:
    """`python -m cloister_attest` on a `python -m cloister_sim`, as `cloister dev up` starts them."""

    def __init__(self, directory: Path, *, ca: str = "", fixed_ports: bool = False, **attest_options: int) -> None:
        """`ca` is the text of the section [ca]; `attest_options` are lines of [attest]. Ports last over restarts."""
        self.directory = directory
        self.ca = ca
        self.users = ""
        self.listen, self.enrolment_listen = (f"127.0.0.1:{free_port() if fixed_ports else 0}" for _ in range(2))
        self.socket = directory / "platform.sock"
        self.bundle_file = directory / "bundle.json"
        self.endpoints_file = directory / "attest.endpoints.json"
        self.config_file = directory / "attest.toml"
        self.log_file = directory / "attest.log"
        self.user_key = ec.generate_private_key(ec.SECP256R1())
        self.user_id = SpiffeId.of_user(TRUST_DOMAIN, tenant="hospital-a", user="alice")
        self._options = attest_options
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def endpoints(self) -> dict[str, str]:
        return read_endpoints(self.endpoints_file)

    @property
    def bundle(self) -> TrustBundle:
        return TrustBundle.parse(self.bundle_file.read_bytes())

    @property
    def root(self) -> TrustRoot:
        return TrustRoot.from_pem((self.directory / "platform" / "root.pem").read_bytes(), simulated=True)

    @property
    def verifier(self) -> EvidenceVerifier:
        """An owner's own verifier, with the platform's collateral."""
        return EvidenceVerifier(self.root, OfflineCollateral(self.directory / "platform/collateral", root=self.root))

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def write_config(self, **scripts: str) -> None:
        """Write the configuration; `scripts` names other digests ("trainer" -> hex) than those installed here."""
        digest_of_package.cache_clear()  # a test run is long, and code may change in it
        digests = {"attest": digest_of_package("cloister_attest").hex()}
        digests |= {role: SCRIPT.hex() for role in ("keybroker", "trainer", "gateway")} | scripts
        options = "".join(f"{name} = {value}\n" for name, value in self._options.items())
        services = "".join(
            f'[[services]]\nrole = "{role}"\nscript = ["sha384:{digest}"]\n' for role, digest in digests.items()
        )
        fingerprint = hashlib.sha256(spki(self.user_key)).hexdigest()
        self.config_file.write_text(
            f'[service]\ntrust_domain = "{TRUST_DOMAIN}"\nstate_dir = "state"\n'
            f'endpoints_file = "{self.endpoints_file.name}"\nlisten = "{self.listen}"\n'
            f'[guest]\nprovider = "simulated:{self.socket}"\n'
            f'[attest]\nbundle_file = "{self.bundle_file.name}"\n'
            f'enrolment_listen = "{self.enrolment_listen}"\n{options}'
            f"[ca]\n{self.ca}\n"
            '[collateral]\nsource = "offline:platform/collateral"\n'
            f'[[trust_roots]]\npath = "platform/root.pem"\nsimulated = true\n{services}'
            f'[[users]]\nspiffe_id = "{self.user_id}"\nspki_sha256 = "{fingerprint}"\noperator = true\n{self.users}'
        )

    def measured_configuration(self, holders: Sequence[Path] = ()) -> bytes:
        """Return the digest of the configuration as attest measures it."""
        keys = [read_holder_public(path) for path in holders]
        config = self.config_file.read_bytes()
        return sha384(attest_configuration(config, self.root.certificate_der, STRICT.source, [], holders=keys))

    async def start_platform(self) -> None:
        await self._start("cloister_sim", "--directory", self.directory / "platform", "--socket", self.socket)
        await self._until(self.socket.exists, "cloister_sim")

    async def start(self) -> None:
        """Start attest and wait until it is ready."""
        self.endpoints_file.unlink(missing_ok=True)
        await self._start("cloister_attest", "--config", self.config_file)
        await self._until(self.endpoints_file.exists, "cloister_attest")

    async def start_sealed(self) -> str:
        """Start attest and wait until it waits for shares; return where."""
        place = self.directory / "state/recovery.json"
        self.endpoints_file.unlink(missing_ok=True)
        await self._start("cloister_attest", "--config", self.config_file)
        await self._until(place.exists, "cloister_attest")
        return read_endpoints(place)["recovery"]

    async def ready(self) -> None:
        """Wait until an attest that was started is ready."""
        await self._until(self.endpoints_file.exists, "cloister_attest")

    async def stop(self, name: str = "cloister_attest", *, kill: bool = False) -> int:
        process = self._processes.pop(name)
        if process.returncode is None:
            process.kill() if kill else process.terminate()
        return await process.wait()

    async def stop_all(self) -> None:
        for name in ("cloister_attest", "cloister_sim"):
            if name in self._processes:
                await self.stop(name)

    async def run_to_end(self) -> tuple[int, str]:
        """Run attest until it ends by itself; return exit code and standard error."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cloister_attest", "--config", str(self.config_file), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        return process.returncode or 0, errors.decode()

    async def user(self, key: ec.EllipticCurvePrivateKey | None = None) -> StaticCredentials:
        """Fetch a certificate for the user of the configuration, who is an operator, or for another key."""
        key = key or self.user_key
        async with open_enrolment_channel(self.endpoints["enrolment"], bundle=self.bundle) as channel:
            method = attest_pb2_grpc.EnrolmentServiceStub(channel).IssueUserCertificate
            request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(key))
            response = await invoke(method, request, timeout_s=10, what="get a certificate")
        return StaticCredentials(user_material(key, response.certificate_chain_pem, self.bundle))

    async def call(self, service: str, method: str, request: object, who: CredentialSource | None = None) -> Any:
        """Call attest over mutual TLS, as its operator unless told otherwise."""
        credentials = who or await self.user()
        async with open_channel(self.endpoints["grpc"], role=Role.ATTEST, credentials=credentials) as channel:
            stub = getattr(attest_pb2_grpc, f"{service}Stub")(channel)
            return await invoke(getattr(stub, method), request, timeout_s=10, what=method)

    async def retire_epoch(self, epoch: str = "") -> str:
        """End an epoch, the newest unless told otherwise, and wait until attest has a certificate of the next one."""
        request = attest_pb2.RetireEpochRequest(epoch=epoch or self.bundle.epoch)
        issuing = str((await self.call("OperatorService", "RetireEpoch", request)).issuing.epoch)
        deadline = time.monotonic() + 10
        while True:
            try:
                await self.user()
            except CloisterError:
                assert time.monotonic() < deadline, self.log()[-4000:]
                await asyncio.sleep(0.05)
            else:
                return issuing

    def launch(self) -> Guest:
        return Guest.open(f"simulated:{self.socket}")

    async def service(self, role: Role) -> Identity:
        """Enrol a service with the code that the configuration expects."""
        guest = await asyncio.to_thread(self.launch)
        measure(guest, role, bundle=self.bundle.digest)
        return await Identity.enrol(guest, attest_endpoint=self.endpoints["enrolment"], bundle=self.bundle)

    async def _start(self, module: str, *arguments: object) -> None:
        with self.log_file.open("ab") as log:
            self._processes[module] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", module, *map(str, arguments), stdout=log, stderr=log, env=dict(os.environ)
            )

    async def _until(self, ready: object, module: str) -> None:
        deadline = time.monotonic() + 30
        while not ready():  # type: ignore[operator]
            if self._processes[module].returncode is not None or time.monotonic() > deadline:
                raise AssertionError(f"{module} did not become ready:\n{self.log()[-4000:]}")
            await asyncio.sleep(0.02)


@asynccontextmanager
async def attest_process(
    *,
    ca: str = "",
    fixed_ports: bool = False,
    prepare: Callable[[AttestProcess], None] | None = None,
    **attest_options: int,
) -> AsyncIterator[AttestProcess]:
    """Run platform and attest for a test. In a directory of its own: a socket's path must be short."""
    with tempfile.TemporaryDirectory(prefix="clo-") as directory:
        attest = AttestProcess(Path(directory), ca=ca, fixed_ports=fixed_ports, **attest_options)
        try:
            if prepare is not None:
                prepare(attest)
            await attest.start_platform()
            attest.write_config()
            await attest.start()
            yield attest
        finally:
            await attest.stop_all()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def user_material(key: ec.EllipticCurvePrivateKey, chain_pem: bytes, bundle: TrustBundle) -> TlsMaterial:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsMaterial.from_pem(SecretBytes(pem), chain_pem, bundle)
