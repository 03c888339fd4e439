# SPDX-License-Identifier: Apache-2.0
"""Who may say who somebody is: nobody for another tenant, nobody above themselves, and not the disk."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.api.attest.v1 import attest_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.recovery import new_recovery_key
from cloister.runtime.caller import Caller, bind_caller
from cloister.runtime.database import Database
from cloister.runtime.pem import read_leaf
from cloister_attest.config import Kept
from cloister_attest.denylist import Denial, DenialKind, DenyList
from cloister_attest.operators import OperatorServicer
from cloister_attest.registry import MIGRATIONS
from cloister_attest.tableseal import TableSealer
from cloister_attest.users import Standing, User, UserRegister
from cloister_attest.workloads import Registration
from fakes.attest_harness import BACKEND, JOB, TRUST_DOMAIN, LocalAttest, csr, local_attest, spki

PB = attest_pb2
STANDINGS = {
    Standing.USER: PB.STANDING_USER,
    Standing.ADMINISTRATOR: PB.STANDING_ADMINISTRATOR,
    Standing.OPERATOR: PB.STANDING_OPERATOR,
}


def who(tenant: str, name: str) -> SpiffeId:
    return SpiffeId.of_user(TRUST_DOMAIN, tenant=tenant, user=name)


OPERATOR = who("operations", "olga")
ADMIN = who("hospital-a", "anna")
OTHER_ADMIN = who("hospital-b", "berta")
NOW = datetime(2026, 3, 1, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP256R1())


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    users = [
        User(name, bytes([number]) * 32, standing, "", None)
        for number, (name, standing) in enumerate(
            [
                (OPERATOR, Standing.OPERATOR),
                (ADMIN, Standing.ADMINISTRATOR),
                (OTHER_ADMIN, Standing.ADMINISTRATOR),
            ],
            1,
        )
    ]
    with local_attest(users=users) as local:
        await local.enrolment.attest(await local.request(local.td(Role.ATTEST)))
        yield local


async def call(attest: LocalAttest, caller: SpiffeId, method: str, message: Any) -> Any:
    operator = OperatorServicer(attest.callers(), attest.ca, attest.registry, kept=Kept.MEMORY)
    servicer = attest.identities() if hasattr(attest.identities(), method) else operator
    bind_caller(Caller(caller, b"", b"", "TLSv1.3", "X25519MLKEM768", "ipv4:127.0.0.1:1"))
    try:
        return await getattr(servicer, method)(message, None)
    finally:
        bind_caller(None)


async def refused(attest: LocalAttest, caller: SpiffeId, method: str, message: Any) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        await call(attest, caller, method, message)
    return caught.value


def issuing(name: SpiffeId | str, standing: Standing = Standing.USER, **fields: Any) -> PB.IssueIdentityRequest:
    given = fields or {"spki_der": spki(KEY)}
    return PB.IssueIdentityRequest(spiffe_id=str(name), standing=STANDINGS[standing], **given)


async def certificate(attest: LocalAttest, key: ec.EllipticCurvePrivateKey = KEY) -> bytes:
    response = await attest.enrolment.issue_user(PB.IssueUserCertificateRequest(csr_der=csr(key)))
    return response.certificate_chain_pem


async def test_an_administrator_registers_a_user_of_its_tenant_who_then_gets_certificates(attest: LocalAttest) -> None:
    bob = who("hospital-a", "bob")
    answer = await call(attest, ADMIN, "IssueIdentity", issuing(bob))
    assert answer.certificate_chain_pem == b""
    leaf = read_leaf(await certificate(attest))
    assert leaf.uris == (str(bob),)
    listed = await call(attest, ADMIN, "ListIdentities", PB.ListIdentitiesRequest())
    assert [(one.spiffe_id, one.added_by) for one in listed.identities] == [
        (f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/user/alice", ""),
        (str(ADMIN), ""),
        (str(bob), str(ADMIN)),
    ]


async def test_a_request_gets_its_certificate_at_once(attest: LocalAttest) -> None:
    answer = await call(attest, ADMIN, "IssueIdentity", issuing(who("hospital-a", "bob"), csr_der=csr(KEY, "root")))
    leaf = read_leaf(answer.certificate_chain_pem)
    assert leaf.uris == (f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/user/bob",)
    assert leaf.certificate.public_key() == KEY.public_key()


@pytest.mark.parametrize("tenant", ["hospital-b", "operations", "hospital"])
async def test_nobody_registers_removes_or_denies_users_of_another_tenant(attest: LocalAttest, tenant: str) -> None:
    stranger = who(tenant, "bob")
    for caller in (ADMIN, OPERATOR):
        if caller.tenant == tenant:
            continue
        for method, message in (
            ("IssueIdentity", issuing(stranger)),
            ("IssueIdentity", issuing(stranger, csr_der=csr(KEY))),
            ("RemoveIdentity", PB.RemoveIdentityRequest(spiffe_id=str(stranger))),
        ):
            assert (await refused(attest, caller, method, message)).code is Code.CALLER_NOT_ALLOWED
    deny = PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=str(stranger))
    assert (await refused(attest, ADMIN, "Deny", deny)).code is Code.CALLER_NOT_ALLOWED
    with pytest.raises(CloisterError):
        await certificate(attest)


async def test_another_trust_domain_is_another_tenant(attest: LocalAttest) -> None:
    elsewhere = SpiffeId.of_user("other.test", tenant="hospital-a", user="bob")
    assert (await refused(attest, ADMIN, "IssueIdentity", issuing(elsewhere))).code is Code.CALLER_NOT_ALLOWED


async def test_users_and_services_register_nobody(attest: LocalAttest) -> None:
    trainer = SpiffeId.service(TRUST_DOMAIN, Role.TRAINER)
    for caller in (attest.user_id, who("hospital-a", "unknown"), trainer):
        for method, message in (
            ("IssueIdentity", issuing(who("hospital-a", "bob"))),
            ("ListIdentities", PB.ListIdentitiesRequest()),
            ("RemoveIdentity", PB.RemoveIdentityRequest(spiffe_id=str(ADMIN))),
            ("Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=str(ADMIN))),
            ("ListWorkloads", PB.ListWorkloadsRequest()),
            ("CloseWorkload", PB.CloseWorkloadRequest(job=PB.CloseJobRequest(job_id="j-1"))),
        ):
            assert (await refused(attest, caller, method, message)).code is Code.CALLER_NOT_ALLOWED


async def test_administrators_make_no_operators_and_touch_none(attest: LocalAttest) -> None:
    await call(attest, OPERATOR, "IssueIdentity", issuing(who("operations", "otto"), Standing.OPERATOR))
    otto = who("operations", "otto")
    admin = who("operations", "ada")
    other = ec.generate_private_key(ec.SECP256R1())
    await call(attest, OPERATOR, "IssueIdentity", issuing(admin, Standing.ADMINISTRATOR, spki_der=spki(other)))
    third = spki(ec.generate_private_key(ec.SECP256R1()))
    for method, message in (
        ("IssueIdentity", issuing(who("operations", "mallory"), Standing.OPERATOR, spki_der=third)),
        ("IssueIdentity", issuing(otto, Standing.USER, spki_der=third, replace=True)),
        ("RemoveIdentity", PB.RemoveIdentityRequest(spiffe_id=str(otto))),
        ("Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=str(otto))),
        ("Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=f"spiffe://{TRUST_DOMAIN}/service/trainer")),
        ("Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_PLATFORM, value="05" * 16)),
        ("ListDenials", PB.ListDenialsRequest()),
        ("ListEpochs", PB.ListEpochsRequest()),
        ("StartEpoch", PB.StartEpochRequest()),
    ):
        assert (await refused(attest, admin, method, message)).code is Code.CALLER_NOT_ALLOWED
    # Their own kind, and users, they do.
    deny = PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=str(who("operations", "oskar")))
    await call(attest, admin, "Deny", deny)
    await call(attest, admin, "IssueIdentity", issuing(who("operations", "oda"), spki_der=third))


async def test_an_administrator_does_not_undo_what_an_operator_denied(attest: LocalAttest) -> None:
    bob = str(who("hospital-a", "bob"))
    readmit = PB.ReadmitRequest(kind=PB.DENIAL_KIND_IDENTITY, value=bob)
    await call(attest, OPERATOR, "Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=bob))
    assert (await refused(attest, ADMIN, "Readmit", readmit)).code is Code.CALLER_NOT_ALLOWED
    assert (await call(attest, OPERATOR, "Readmit", readmit)).was_denied
    # What another administrator of the tenant denied, it may.
    await call(attest, ADMIN, "Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=bob))
    assert (await refused(attest, OTHER_ADMIN, "Readmit", readmit)).code is Code.CALLER_NOT_ALLOWED
    assert (await call(attest, ADMIN, "Readmit", readmit)).was_denied
    assert not (await call(attest, ADMIN, "Readmit", readmit)).was_denied


async def test_an_administrator_sees_its_own_tenant_only(attest: LocalAttest) -> None:
    await call(attest, OTHER_ADMIN, "IssueIdentity", issuing(who("hospital-b", "ben")))
    seen = {
        one.spiffe_id for one in (await call(attest, ADMIN, "ListIdentities", PB.ListIdentitiesRequest())).identities
    }
    assert seen == {str(attest.user_id), str(ADMIN)}
    all_of_them = (await call(attest, OPERATOR, "ListIdentities", PB.ListIdentitiesRequest())).identities
    assert len(all_of_them) == 5


async def test_a_name_or_a_key_that_is_taken_is_not_taken_over(attest: LocalAttest) -> None:
    bob, other = who("hospital-a", "bob"), spki(ec.generate_private_key(ec.SECP256R1()))
    await call(attest, ADMIN, "IssueIdentity", issuing(bob))
    for message in (
        issuing(bob, spki_der=other),
        issuing(who("hospital-a", "eve")),
        issuing(who("hospital-a", "eve"), spki_der=spki(KEY), replace=True),
        issuing(attest.user_id, spki_der=other),
        issuing(attest.user_id, spki_der=other, replace=True),  # the configuration is measured
    ):
        assert (await refused(attest, ADMIN, "IssueIdentity", message)).code is Code.IDENTITY_EXISTS
    assert read_leaf(await certificate(attest)).uris == (str(bob),)


async def test_a_replaced_or_removed_key_is_nobody_and_its_certificates_end(attest: LocalAttest) -> None:
    bob, other = who("hospital-a", "bob"), ec.generate_private_key(ec.SECP256R1())
    await call(attest, ADMIN, "IssueIdentity", issuing(bob))
    first = read_leaf(await certificate(attest)).sha256
    await call(attest, ADMIN, "IssueIdentity", issuing(bob, spki_der=spki(other), replace=True))
    assert attest.ca.told.trust.revoked.certificates == {first}
    second = read_leaf(await certificate(attest, other)).sha256
    with pytest.raises(CloisterError) as caught:
        await certificate(attest, KEY)
    assert caught.value.code is Code.USER_NOT_REGISTERED
    answer = await call(attest, ADMIN, "RemoveIdentity", PB.RemoveIdentityRequest(spiffe_id=str(bob)))
    assert answer.certificates == 1
    assert attest.ca.told.trust.revoked.certificates == {first, second}
    with pytest.raises(CloisterError):
        await certificate(attest, other)
    again = await refused(attest, ADMIN, "RemoveIdentity", PB.RemoveIdentityRequest(spiffe_id=str(bob)))
    assert again.code is Code.IDENTITY_NOT_FOUND
    # Registered again, it does not bring back what was struck.
    await call(attest, ADMIN, "IssueIdentity", issuing(bob))
    await certificate(attest)
    assert attest.ca.told.trust.revoked.certificates == {first, second}


async def test_users_of_the_configuration_are_not_removed_from_outside(attest: LocalAttest) -> None:
    error = await refused(attest, ADMIN, "RemoveIdentity", PB.RemoveIdentityRequest(spiffe_id=str(attest.user_id)))
    assert error.code is Code.ARGUMENT_INVALID
    await certificate(attest, attest.user_key)


async def test_a_denied_administrator_registers_nobody(attest: LocalAttest) -> None:
    await call(attest, OPERATOR, "Deny", PB.DenyRequest(kind=PB.DENIAL_KIND_IDENTITY, value=str(ADMIN)))
    error = await refused(attest, ADMIN, "IssueIdentity", issuing(who("hospital-a", "bob")))
    assert error.code is Code.CALLER_NOT_ALLOWED


@pytest.mark.parametrize(
    "message",
    [
        issuing(f"spiffe://{TRUST_DOMAIN}/service/keybroker"),
        issuing(f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/job/j/rank/0"),
        issuing(""),
        PB.IssueIdentityRequest(spiffe_id=str(who("hospital-a", "bob")), spki_der=spki(KEY)),
        issuing(who("hospital-a", "bob"), spki_der=b""),
        issuing(who("hospital-a", "bob"), spki_der=spki(KEY) + b"\0"),
        issuing(who("hospital-a", "bob"), csr_der=b"no request"),
        issuing(who("hospital-a", "bob"), csr_der=csr(KEY)[:-1] + b"\0"),
        issuing(who("hospital-a", "bob"), csr_der=csr(KEY), spki_der=spki(ec.generate_private_key(ec.SECP256R1()))),
        issuing(
            who("hospital-a", "bob"),
            spki_der=rsa.generate_private_key(65537, 2048)
            .public_key()
            .public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
        ),
    ],
)
async def test_a_malformed_registration_registers_nobody(attest: LocalAttest, message: Any) -> None:
    error = await refused(attest, ADMIN, "IssueIdentity", message)
    assert error.code in (Code.ARGUMENT_INVALID, Code.CSR_INVALID)
    assert len((await call(attest, ADMIN, "ListIdentities", PB.ListIdentitiesRequest())).identities) == 2


# workloads


async def test_operators_see_and_close_what_services_registered(attest: LocalAttest) -> None:
    by = Registration(f"spiffe://{TRUST_DOMAIN}/service/trainer", 1_700_000_000_000)
    await attest.registry.register_job(JOB, by)
    await attest.registry.register_backend(BACKEND, by)
    listed = await call(attest, OPERATOR, "ListWorkloads", PB.ListWorkloadsRequest())
    assert [(job.job_id, job.open, job.registered_by) for job in listed.jobs] == [(JOB.job_id, True, by.service)]
    assert [one.backend_id for one in listed.backends] == [BACKEND.backend]
    place = PB.CloseBackendRequest(tenant=BACKEND.tenant, model=BACKEND.model, backend_id=BACKEND.backend)
    for closing in (PB.CloseWorkloadRequest(job=PB.CloseJobRequest(job_id=JOB.job_id)),
                    PB.CloseWorkloadRequest(backend=place)):  # fmt: skip
        await call(attest, OPERATOR, "CloseWorkload", closing)
    listed = await call(attest, OPERATOR, "ListWorkloads", PB.ListWorkloadsRequest())
    assert (list(listed.jobs), list(listed.backends)) == ([], [])
    listed = await call(attest, OPERATOR, "ListWorkloads", PB.ListWorkloadsRequest(closed=True))
    assert (listed.jobs[0].open, listed.backends[0].open) == (False, False)
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.attest(await attest.request(attest.td(Role.RANK)))
    assert caught.value.code is Code.WORKLOAD_NOT_REGISTERED
    for closing, code in (
        (PB.CloseWorkloadRequest(), Code.ARGUMENT_INVALID),
        (PB.CloseWorkloadRequest(job=PB.CloseJobRequest(job_id="none")), Code.JOB_NOT_FOUND),
    ):
        assert (await refused(attest, OPERATOR, "CloseWorkload", closing)).code is code


# the disk is the operator's


def edited(path: Path, statement: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement)


EDITS = [
    f"INSERT INTO users VALUES (x'{'ee' * 32}', 'spiffe://{TRUST_DOMAIN}/ns/hospital-a/user/eve', 'user', 'me', 0)",
    "UPDATE users SET standing = 'operator'",
    f"UPDATE users SET spki_sha256 = x'{'ee' * 32}'",
    "UPDATE users SET spiffe_id = replace(spiffe_id, 'hospital-a', 'hospital-b')",
    "DELETE FROM users",
    "DELETE FROM denials",
    "UPDATE denials SET value = 'spiffe://cloister.test/ns/hospital-a/user/nobody'",
    "UPDATE table_seals SET mac = zeroblob(48)",
    "UPDATE table_seals SET generation = generation + 1",
    "UPDATE table_seals SET mac = (SELECT mac FROM table_seals WHERE name = 'denials') WHERE name = 'users'",
    "DELETE FROM table_seals",
]


@pytest.mark.parametrize("statement", EDITS)
async def test_a_register_that_somebody_edited_on_disk_is_refused(tmp_path: Path, statement: str) -> None:
    path, key = tmp_path / "attest.sqlite", new_recovery_key()

    async def opened(generation: int, *, begin: bool = False) -> list[str]:
        database = Database.open(path, MIGRATIONS)
        try:
            sealer = TableSealer(database)
            users, denials = UserRegister(database, sealer), DenyList(database, sealer)
            await (sealer.begin if begin else sealer.load)(key, generation)
            await users.load()
            if begin:
                bob = User(who("hospital-a", "bob"), b"\x0b" * 32, Standing.USER, str(ADMIN), NOW)
                await users.add(bob, replace=False)
                await denials.add(Denial(DenialKind.IDENTITY, str(OPERATOR), "", str(ADMIN), NOW))
            return [str(user.spiffe_id) for user in users.all()]
        finally:
            database.close()

    names = await opened(1, begin=True)
    assert await opened(2) == names
    edited(path, statement)
    with pytest.raises(CloisterError) as caught:
        await opened(3)
    assert caught.value.code is Code.REGISTER_DAMAGED


async def test_a_database_of_an_earlier_generation_is_noticed(tmp_path: Path) -> None:
    path, key = tmp_path / "attest.sqlite", new_recovery_key()

    async def taken(generation: int, *, begin: bool = False) -> None:
        database = Database.open(path, MIGRATIONS)
        try:
            sealer = TableSealer(database)
            await (sealer.begin if begin else sealer.load)(key, generation)
        finally:
            database.close()

    await taken(1, begin=True)
    old = path.read_bytes()
    await taken(2)
    await taken(3)
    path.write_bytes(old)
    for leftover in tmp_path.glob("attest.sqlite-*"):
        leftover.unlink()
    with pytest.raises(CloisterError) as caught:
        await taken(4)
    assert "put back" in caught.value.why


async def test_an_edit_while_attest_runs_is_noticed_at_the_next_change(attest: LocalAttest) -> None:
    await call(attest, ADMIN, "IssueIdentity", issuing(who("hospital-a", "bob")))
    await attest.database.write(lambda connection: connection.execute("UPDATE users SET standing = 'operator'").close())
    other = spki(ec.generate_private_key(ec.SECP256R1()))
    error = await refused(attest, ADMIN, "IssueIdentity", issuing(who("hospital-a", "eve"), spki_der=other))
    assert error.code is Code.REGISTER_DAMAGED
    # What counts is what was registered, not what the disk says now.
    assert (await refused(attest, who("hospital-a", "bob"), "StartEpoch", PB.StartEpochRequest())).code is (
        Code.CALLER_NOT_ALLOWED
    )
