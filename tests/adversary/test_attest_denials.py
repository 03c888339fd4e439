# SPDX-License-Identifier: Apache-2.0
"""Who is on the deny-list gets no certificate, whatever else is right; and only operators write it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cloister.api.attest.v1 import attest_pb2
from cloister.errors import CloisterError, Code
from cloister.identity import Role, SpiffeId
from cloister.runtime.caller import Caller, bind_caller
from cloister.runtime.database import Database
from cloister.secret import SecretBytes
from cloister_attest.denylist import Denial, DenialKind, DenyList, parse_value
from cloister_attest.registry import MIGRATIONS
from cloister_attest.tableseal import TableSealer
from cloister_attest.users import Standing, User
from fakes.attest_harness import (
    CONFIG,
    ENVIRONMENT,
    JOB,
    MANIFEST,
    SCRIPT,
    TRUST_DOMAIN,
    LocalAttest,
    csr,
    local_attest,
)

RANK = f"spiffe://{TRUST_DOMAIN}/ns/hospital-a/job/j-1/rank/0"
OPERATOR = SpiffeId.of_user(TRUST_DOMAIN, tenant="operations", user="olga")


@pytest.fixture
async def attest() -> AsyncIterator[LocalAttest]:
    with local_attest(users=[User(OPERATOR, b"\x01" * 32, Standing.OPERATOR, "", None)]) as local:
        await local.registry.register_job(JOB)
        yield local


async def deny(attest: LocalAttest, kind: DenialKind, value: str) -> None:
    await attest.denials.add(Denial(kind, value, "test", str(OPERATOR), attest.clock()))


async def enrol(attest: LocalAttest, role: Role = Role.RANK) -> str:
    response = await attest.enrolment.attest(await attest.request(attest.td(role)))
    return response.spiffe_id


async def refused(attest: LocalAttest, role: Role = Role.RANK) -> str:
    with pytest.raises(CloisterError) as caught:
        await enrol(attest, role)
    assert caught.value.code is Code.DENY_LISTED
    verdict = (await attest.verdicts.newest(limit=1))[0]
    assert (verdict.accepted, verdict.checks[-1].name) == (False, "not-denied")
    return verdict.checks[-1].got


async def test_a_denied_identity_is_not_renewed_and_its_neighbours_are(attest: LocalAttest) -> None:
    identity = await attest.enrol(attest.td(Role.RANK))
    await deny(attest, DenialKind.IDENTITY, RANK)
    with pytest.raises(CloisterError) as caught:
        await identity.refresh()
    assert caught.value.code is Code.DENY_LISTED
    assert await refused(attest) == f"identity {RANK}"
    assert (await enrol(attest, Role.TRAINER)).endswith("/trainer")
    assert await attest.denials.remove(DenialKind.IDENTITY, RANK)
    await identity.refresh()


async def test_nothing_enrols_on_a_denied_platform(attest: LocalAttest) -> None:
    for value in (attest.platform_fmspc.hex(), attest.platform_piid.hex()):
        await deny(attest, DenialKind.PLATFORM, value)
        assert await refused(attest) == f"platform {value}"
        assert await refused(attest, Role.TRAINER) == f"platform {value}"
        await attest.denials.remove(DenialKind.PLATFORM, value)
    await enrol(attest)


@pytest.mark.parametrize("digest", [SCRIPT, ENVIRONMENT, CONFIG, MANIFEST])
async def test_nothing_enrols_with_a_denied_measurement(attest: LocalAttest, digest: bytes) -> None:
    await enrol(attest)
    await deny(attest, DenialKind.MEASUREMENT, digest.hex())
    assert await refused(attest) == f"measurement {digest.hex()}"


async def test_a_denied_user_gets_no_certificate(attest: LocalAttest) -> None:
    request = attest_pb2.IssueUserCertificateRequest(csr_der=csr(attest.user_key))
    await attest.enrolment.issue_user(request)
    await deny(attest, DenialKind.IDENTITY, str(attest.user_id))
    with pytest.raises(CloisterError) as caught:
        await attest.enrolment.issue_user(request)
    assert caught.value.code is Code.DENY_LISTED


async def test_the_list_survives_a_restart_and_the_first_reason_stays(tmp_path: Path, attest: LocalAttest) -> None:
    database, key = Database.open(tmp_path / "attest.sqlite", MIGRATIONS), SecretBytes(bytes(32))
    sealer = TableSealer(database)
    await sealer.begin(key, 1)
    first = Denial(DenialKind.IDENTITY, RANK, "left the project", str(OPERATOR), attest.clock().replace(microsecond=0))
    await DenyList(database, sealer).add(first)
    await DenyList(database, sealer).add(Denial(DenialKind.IDENTITY, RANK, "other", "somebody", attest.clock()))
    database.close()
    database = Database.open(tmp_path / "attest.sqlite", MIGRATIONS)
    sealer = TableSealer(database)
    await sealer.load(key, 2)
    assert await DenyList(database, sealer).all() == [first]
    database.close()


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (DenialKind.IDENTITY, RANK, RANK),
        (DenialKind.PLATFORM, "B0C06F000000", "b0c06f000000"),
        (DenialKind.PLATFORM, "05" * 16, "05" * 16),
        (DenialKind.MEASUREMENT, f"sha384:{'0a' * 48}", "0a" * 48),
        (DenialKind.IDENTITY, "spiffe://cloister.test/ns/hospital-a/*", None),
        (DenialKind.IDENTITY, "", None),
        (DenialKind.PLATFORM, "05" * 15, None),
        (DenialKind.PLATFORM, "", None),
        (DenialKind.MEASUREMENT, "0a" * 47, None),
        (DenialKind.MEASUREMENT, "zz" * 48, None),
    ],
)
def test_values_have_one_spelling(kind: DenialKind, text: str, value: str | None) -> None:
    if value is not None:
        assert parse_value(kind, text) == value
        return
    with pytest.raises(CloisterError) as caught:
        parse_value(kind, text)
    assert caught.value.code is Code.ARGUMENT_INVALID


async def test_only_operators_that_are_not_denied_see_and_change_the_list(attest: LocalAttest) -> None:
    await enrol(attest, Role.ATTEST)
    servicer = attest.identities()
    request = attest_pb2.DenyRequest(kind=attest_pb2.DENIAL_KIND_IDENTITY, value=RANK, reason="left")

    async def called_by(who: SpiffeId, method: str, message: Any) -> Any:
        bind_caller(Caller(who, b"", b"", "TLSv1.3", "X25519MLKEM768", "ipv4:127.0.0.1:1"))
        try:
            return await getattr(servicer, method)(message, None)
        finally:
            bind_caller(None)

    async def fails(who: SpiffeId, method: str, message: Any) -> Code:
        with pytest.raises(CloisterError) as caught:
            await called_by(who, method, message)
        return caught.value.code

    for method, message in (
        ("Deny", request),
        ("Readmit", attest_pb2.ReadmitRequest(kind=attest_pb2.DENIAL_KIND_IDENTITY, value=RANK)),
        ("ListDenials", attest_pb2.ListDenialsRequest()),
    ):
        assert await fails(attest.user_id, method, message) is Code.CALLER_NOT_ALLOWED
    await called_by(OPERATOR, "Deny", request)
    answer = await called_by(OPERATOR, "ListDenials", attest_pb2.ListDenialsRequest())
    assert [(found.value, found.reason, found.operator) for found in answer.denials] == [(RANK, "left", str(OPERATOR))]
    platform = attest.platform_piid.hex()
    for kind, value, reason in (
        (attest_pb2.DENIAL_KIND_UNSPECIFIED, RANK, ""),
        (attest_pb2.DENIAL_KIND_IDENTITY, str(OPERATOR), ""),
        (attest_pb2.DENIAL_KIND_IDENTITY, f"spiffe://{TRUST_DOMAIN}/service/attest", ""),
        (attest_pb2.DENIAL_KIND_PLATFORM, platform, ""),  # attest's own
        (attest_pb2.DENIAL_KIND_IDENTITY, RANK, "x" * 201),
        (attest_pb2.DENIAL_KIND_IDENTITY, RANK, "two\nlines"),
    ):
        message = attest_pb2.DenyRequest(kind=kind, value=value, reason=reason)
        assert await fails(OPERATOR, "Deny", message) is Code.ARGUMENT_INVALID
    await deny(attest, DenialKind.IDENTITY, str(OPERATOR))
    assert await fails(OPERATOR, "Deny", request) is Code.CALLER_NOT_ALLOWED
