# SPDX-License-Identifier: Apache-2.0
"""Attest's core in this process, with a clock to turn and a platform whose quotes a test can spoil."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from cloister.api.attest.v1 import attest_pb2
from cloister.appraisal.policy import STRICT, TdPolicy
from cloister.appraisal.references import ReferenceSet
from cloister.errors import CloisterError
from cloister.guest.enrol import Identity
from cloister.guest.evidence import EvidenceVerifier
from cloister.guest.guest import Guest
from cloister.identity import Role, SpiffeId
from cloister.protocol import combined_nonce
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import TlsMaterial
from cloister.runtime.database import Database
from cloister.secret import SecretBytes
from cloister.tdx import workload
from cloister.tdx.collateral import Collateral
from cloister.tdx.pckchain import load_pck_chain
from cloister.tdx.pckextension import PckExtension
from cloister.tdx.quote import Quote, TdBody
from cloister.tdx.trustroot import TrustRoot
from cloister.tdx.verifier import Verifier
from cloister.tdx.workload import BackendClaim, DatasetClaim, RankClaim
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


def user_material(key: ec.EllipticCurvePrivateKey, chain_pem: bytes, bundle: TrustBundle) -> TlsMaterial:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsMaterial.from_pem(SecretBytes(pem), chain_pem, bundle)
