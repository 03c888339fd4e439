# SPDX-License-Identifier: Apache-2.0
"""The parts of attest, each by itself: nonces, limits, authority, registry, verdicts, users."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from cloister.api.attest.v1 import attest_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.runtime.config import load_config
from cloister.runtime.database import Database
from cloister.tdx.check import Check
from cloister_attest.appraise import AppraisalPolicy
from cloister_attest.authority import Authority, bundle_of
from cloister_attest.config import AttestConfig
from cloister_attest.nonces import Nonces
from cloister_attest.ratelimit import RateLimit
from cloister_attest.registry import MIGRATIONS, Registry
from cloister_attest.turns import Turns
from cloister_attest.verdicts import Verdict
from cloister_attest.workloads import Backend
from fakes.attest_harness import BACKEND, JOB, TRUST_DOMAIN, LocalAttest, csr, local_attest, spki
from fakes.certs import some_id

NOW = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
def attest() -> Iterator[LocalAttest]:
    with local_attest() as local:
        yield local


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create(now=NOW)


def code_of(error: pytest.ExceptionInfo[CloisterError]) -> Code:
    return error.value.code


# nonces


def test_a_nonce_is_taken_once() -> None:
    time_s = [5.0]
    nonces = Nonces(timedelta(seconds=60), lambda: time_s[0])
    nonce = nonces.give(role="rank")
    assert len(nonce) == 32
    time_s[0] = 12.5
    taken = nonces.take(nonce)
    assert taken is not None
    assert (taken.role, taken.age_s) == ("rank", 7.5)
    assert nonces.take(nonce) is None


def test_outstanding_nonces_are_bounded_and_expired_ones_make_room() -> None:
    time_s = [0.0]
    nonces = Nonces(timedelta(seconds=60), lambda: time_s[0], limit=3)
    for _ in range(3):
        nonces.give(role="rank")
    time_s[0] = 59.0
    with pytest.raises(CloisterError) as caught:
        nonces.give(role="rank")
    assert code_of(caught) is Code.RATE_LIMITED
    time_s[0] = 60.0
    assert nonces.give(role="rank")


async def test_a_restart_is_a_new_epoch_in_which_no_nonce_of_before_counts() -> None:
    # Why nonces are kept in memory only: they need not outlive the process that gave them.
    with local_attest() as before, local_attest() as after:
        assert before.ca.issuing.epoch != after.ca.issuing.epoch
        request = await before.request(before.td(Role.TRAINER))
        with pytest.raises(CloisterError) as caught:
            await after.enrolment.attest(request)
        assert code_of(caught) is Code.NONCE_UNKNOWN
        await before.enrolment.attest(request)


# rate limit


def test_an_address_may_spend_its_burst_then_waits_for_what_it_earns_and_then_is_refused() -> None:
    time_s = [0.0]
    limit = RateLimit(per_s=2, burst=3, clock_s=lambda: time_s[0])
    assert [limit.spend("10.0.0.1") for _ in range(5)] == [0.0, 0.0, 0.0, 0.5, 1.0]
    with pytest.raises(CloisterError) as caught:
        limit.spend("10.0.0.1")
    assert code_of(caught) is Code.RATE_LIMITED
    assert limit.spend("10.0.0.2") == 0.0
    time_s[0] = 0.5
    assert limit.spend("10.0.0.1") == 1.0  # two are before it, of which one has gone
    with pytest.raises(CloisterError):
        limit.spend("10.0.0.1")
    time_s[0] = 60.0
    assert [limit.spend("10.0.0.1") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


async def test_an_address_with_many_calls_waits_for_itself_and_another_does_not_wait_for_it() -> None:
    turns, begun, go_on = Turns(2), [], asyncio.Event()

    async def call(address: str, number: int) -> None:
        async with turns.of(address):
            begun.append((address, number))
            await go_on.wait()

    many = [asyncio.create_task(call("10.0.0.1", number)) for number in range(5)]
    await asyncio.sleep(0)
    other = asyncio.create_task(call("10.0.0.2", 0))
    await asyncio.sleep(0)
    assert begun == [("10.0.0.1", 0), ("10.0.0.1", 1), ("10.0.0.2", 0)]
    many[3].cancel()
    go_on.set()
    await asyncio.gather(*many, other, return_exceptions=True)
    assert begun[3:] == [("10.0.0.1", 2), ("10.0.0.1", 4)]  # in their order
    assert len(turns) == 0


# authority


@pytest.mark.parametrize("role", list(Role))
def test_a_certificate_says_who_and_nothing_more(authority: Authority, role: Role) -> None:
    who = some_id(role)
    issued = authority.issue(who, KEY.public_key(), life=timedelta(hours=99), now=NOW)
    leaf, ca = x509.load_pem_x509_certificates(issued.chain_pem)
    leaf.verify_directly_issued_by(ca)
    assert bundle_of([authority], trust_domain=TRUST_DOMAIN, sequence=0).intermediate(role).strip() in issued.chain_pem
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [str(who)]
    assert names.get_values_for_type(x509.DNSName) == ([f"{role}.{TRUST_DOMAIN}"] if role.is_service else [])
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert (ExtendedKeyUsageOID.SERVER_AUTH in usages) == role.is_service
    assert ExtendedKeyUsageOID.CLIENT_AUTH in usages
    longest = timedelta(hours=12) if role is Role.USER else timedelta(hours=1)
    assert leaf.not_valid_after_utc - leaf.not_valid_before_utc == longest
    assert issued.not_after == leaf.not_valid_after_utc


def test_no_certificate_outlives_its_authority(authority: Authority) -> None:
    late = NOW + timedelta(days=90) - timedelta(minutes=5)
    issued = authority.issue(some_id(Role.RANK), KEY.public_key(), life=timedelta(hours=1), now=late)
    assert issued.not_after == NOW + timedelta(days=90)


def test_two_epochs_share_nothing(authority: Authority) -> None:
    other = Authority.create(now=NOW)
    assert other.epoch != authority.epoch
    bundles = [bundle_of([one], trust_domain=TRUST_DOMAIN, sequence=0) for one in (authority, other)]
    assert bundles[0].digest != bundles[1].digest
    ours, theirs = (x509.load_pem_x509_certificate(found.root_pem) for found in bundles)
    assert ours.subject != theirs.subject


def test_the_appraisal_policy_digest_depends_on_every_part() -> None:
    policy = AppraisalPolicy(TRUST_DOMAIN, b"\x01" * 48, {Role.TRAINER: frozenset({b"\x02" * 48})}, b"\x04" * 48)
    others = [
        replace(policy, trust_domain="other.test"),
        replace(policy, bundle_digest=b"\x02" * 48),
        replace(policy, services={Role.GATEWAY: frozenset({b"\x02" * 48})}),
        replace(policy, services={Role.TRAINER: frozenset({b"\x03" * 48})}),
        replace(policy, services={}),
        replace(policy, td_policy=b"\x05" * 48),
    ]
    assert len({policy.digest, *(other.digest for other in others)}) == 7
    assert replace(policy).digest == policy.digest


# registry


async def test_registering_the_same_twice_is_fine_and_something_else_is_not(attest: LocalAttest) -> None:
    registry = attest.registry
    await registry.register_job(JOB)
    await registry.register_job(JOB)
    assert await registry.job(JOB.job_id) == JOB
    for other in (
        replace(JOB, tenant="hospital-b"),
        replace(JOB, world_size=3),
        replace(JOB, script=b"\x66" * 48),
        replace(JOB, config=b"\x66" * 48),
    ):
        with pytest.raises(CloisterError) as caught:
            await registry.register_job(other)
        assert code_of(caught) is Code.WORKLOAD_EXISTS
    assert await registry.job(JOB.job_id) == JOB
    assert await registry.job("j-2") is None


async def test_a_closed_name_stays_closed(attest: LocalAttest) -> None:
    registry = attest.registry
    await registry.register_job(JOB)
    await registry.close_job(JOB.job_id)
    await registry.close_job(JOB.job_id)
    assert await registry.job(JOB.job_id) == replace(JOB, open=False)
    with pytest.raises(CloisterError) as caught:
        await registry.register_job(JOB)
    assert code_of(caught) is Code.WORKLOAD_EXISTS
    with pytest.raises(CloisterError) as caught:
        await registry.close_job("j-2")
    assert code_of(caught) is Code.JOB_NOT_FOUND


async def test_backends_of_two_tenants_may_share_names(attest: LocalAttest) -> None:
    registry = attest.registry
    await registry.register_backend(BACKEND)
    await registry.register_backend(BACKEND)
    await registry.register_backend(Backend("hospital-b", "reviews", "b-0", b"\x66" * 48, b"\x66" * 48))
    with pytest.raises(CloisterError) as caught:
        await registry.register_backend(replace(BACKEND, script=b"\x66" * 48))
    assert code_of(caught) is Code.WORKLOAD_EXISTS
    await registry.close_backend("hospital-b", "reviews", "b-0")
    found = await registry.backend("hospital-a", "reviews", "b-0")
    assert found == BACKEND
    with pytest.raises(CloisterError) as caught:
        await registry.close_backend("hospital-c", "reviews", "b-0")
    assert code_of(caught) is Code.MODEL_NOT_FOUND


async def test_the_registry_survives_a_restart(tmp_path: Path) -> None:
    database = Database.open(tmp_path / "attest.sqlite", MIGRATIONS)
    await Registry(database).register_job(JOB)
    await Registry(database).register_backend(BACKEND)
    database.close()
    database = Database.open(tmp_path / "attest.sqlite", MIGRATIONS)
    assert await Registry(database).job(JOB.job_id) == JOB
    assert await Registry(database).backend(BACKEND.tenant, BACKEND.model, BACKEND.backend) == BACKEND
    database.close()


# verdicts


def verdict(spiffe_id: str, tenant: str = "", *, accepted: bool = True) -> Verdict:
    check = Check("x", accepted, "1", "2")
    return Verdict(NOW, "rank", tenant, spiffe_id, accepted, True, (check,), b"\x01" * 48, b"\x02" * 48)


async def test_a_tenant_sees_its_own_verdicts_and_those_of_services(attest: LocalAttest) -> None:
    ours, theirs = (
        str(SpiffeId.of_rank(TRUST_DOMAIN, tenant=t, job="j", rank=0)) for t in ("hospital-a", "hospital-b")
    )
    service = str(SpiffeId.service(TRUST_DOMAIN, Role.TRAINER))
    refusal = verdict("", accepted=False)
    for one in (verdict(ours, "hospital-a"), verdict(theirs, "hospital-b"), verdict(service), refusal):
        await attest.verdicts.add(one)
    seen = await attest.verdicts.newest(limit=10, tenant="hospital-a")
    assert [one.spiffe_id for one in seen] == [service, ours]
    assert len(await attest.verdicts.newest(limit=10)) == 4
    assert (await attest.verdicts.newest(limit=1))[0] == refusal
    assert [one.spiffe_id for one in await attest.verdicts.newest(limit=10, spiffe_id=theirs)] == [theirs]
    assert await attest.verdicts.newest(limit=10, spiffe_id=theirs, tenant="hospital-a") == []


# users


async def test_a_user_gets_twelve_hours_and_the_registered_name(attest: LocalAttest) -> None:
    request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key, "root"))
    response = await attest.enrolment.issue_user(request)
    assert response.spiffe_id == "spiffe://cloister.test/ns/hospital-a/user/alice"
    assert response.trust_bundle == attest.bundle.to_bytes()
    life_s = response.certificate_not_after_unix_s - attest.clock().timestamp()
    assert 11.9 * 3600 < life_s <= 12 * 3600
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert (verdict.role, verdict.spiffe_id, verdict.accepted) == ("user", response.spiffe_id, True)


async def test_a_key_that_is_not_registered_or_not_held_gets_nothing(attest: LocalAttest) -> None:
    stranger = ec.generate_private_key(ec.SECP256R1())
    unheld = csr(stranger).replace(spki(stranger), spki(attest.user_key))
    for request, code in (
        (csr(stranger), Code.USER_NOT_REGISTERED),
        (unheld, Code.CSR_INVALID),
        (b"", Code.CSR_INVALID),
        (b"\x30" * 9000, Code.CSR_INVALID),
    ):
        with pytest.raises(CloisterError) as caught:
            await attest.enrolment.issue_user(attest_pb2.IssueUserCertificateRequest(csr_der=request))
        assert code_of(caught) is code
        verdict = (await attest.verdicts.newest(limit=1))[0]
        assert (verdict.role, verdict.spiffe_id, verdict.accepted) == ("user", "", False)
        assert not verdict.checks[-1].ok


# configuration


CONFIG = f"""
[service]
trust_domain = "cloister.test"
state_dir = "state"
endpoints_file = "endpoints.json"
[guest]
provider = "simulated:/run/platform.sock"
[attest]
bundle_file = "bundle.json"
[collateral]
source = "offline:collateral"
[[trust_roots]]
path = "root.pem"
simulated = true
[[services]]
role = "attest"
script = ["sha384:{"00" * 48}"]
[[users]]
spiffe_id = "spiffe://cloister.test/ns/hospital-a/user/alice"
spki_sha256 = "{hashlib.sha256(b"").hexdigest()}"
"""


def test_a_configuration_loads_with_paths_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "attest.toml"
    path.write_text(CONFIG)
    config = load_config(path, AttestConfig)
    assert config.attest.bundle_file == tmp_path / "bundle.json"
    assert config.trust_roots[0].path == tmp_path / "root.pem"
    assert config.attest.svid_ttl_s == 3600


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('bundle_file = "bundle.json"', 'bundle_file = "bundle.json"\nsvid_ttl_s = 3601'),
        ('bundle_file = "bundle.json"', 'bundle_file = "bundle.json"\near_ttl_s = 301'),
        ('bundle_file = "bundle.json"', 'bundle_file = "bundle.json"\nuser_ttl_s = 43201'),
        ('role = "attest"', 'role = "rank"'),
        ('role = "attest"', 'role = "user"'),
        ("sha384:", "sha256:"),
        ("/user/alice", "/job/j/rank/0"),
        ("simulated = true", ""),
        ("offline:collateral", "offline:"),
        ("offline:collateral", "http://pccs.example"),
        ('[collateral]\nsource = "offline:collateral"', ""),
        ("[[services]]", '[[trust_roots]]\npath = "other.pem"\nsimulated = false\n[[services]]'),
    ],
)
def test_a_configuration_that_would_weaken_attest_is_refused(tmp_path: Path, right: str, wrong: str) -> None:
    path = tmp_path / "attest.toml"
    path.write_text(CONFIG.replace(right, wrong, 1))
    with pytest.raises(CloisterError) as caught:
        load_config(path, AttestConfig)
    assert code_of(caught) is Code.CONFIG_INVALID
