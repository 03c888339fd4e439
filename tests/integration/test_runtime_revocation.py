# SPDX-License-Identifier: Apache-2.0
"""What a server trusts changes while calls run: who is revoked ends, who began in time does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.credentials import Revoked, StaticCredentials, TlsMaterial
from cloister.runtime.pem import read_leaf
from fakes.certs import TestCa
from fakes.evidence_server import EvidenceFake, ask, evidence_server, evidence_stub


def revoking(material: TlsMaterial) -> Revoked:
    return Revoked(certificates=frozenset({read_leaf(material.chain_pem).sha256}))


@asynccontextmanager
async def running(
    server_side: StaticCredentials, material: TlsMaterial
) -> AsyncIterator[tuple[EvidenceFake, Any, asyncio.Task[Any]]]:
    """A server, and a call of `material`'s holder in the middle of it."""
    servicer = EvidenceFake()
    async with (
        evidence_server(server_side, servicer) as server,
        evidence_stub(server.endpoint, StaticCredentials(material)) as stub,
    ):
        call = asyncio.create_task(ask(stub, "wait", timeout_s=20))
        await servicer.entered.wait()
        yield servicer, stub, call
        call.cancel()


async def code_of(awaitable: Any) -> Code:
    with pytest.raises(CloisterError) as caught:
        await asyncio.wait_for(awaitable, 10)
    return caught.value.code


async def test_a_revoked_certificate_is_refused_and_ends_in_the_middle_of_its_call() -> None:
    ca = TestCa()
    server_side, bad = ca.credentials(Role.KEYBROKER), ca.material(Role.USER)
    async with running(server_side, bad) as (_, stub, call):
        await ask(stub)
        server_side.replace(replace(server_side.current(), revoked=revoking(bad)))
        assert await code_of(call) is Code.DENY_LISTED
        assert await code_of(ask(stub)) is Code.DENY_LISTED


async def test_the_calls_of_others_go_on() -> None:
    ca = TestCa()
    server_side, good = ca.credentials(Role.KEYBROKER), ca.material(Role.USER)
    async with running(server_side, good) as (servicer, stub, call):
        server_side.replace(replace(server_side.current(), revoked=revoking(ca.material(Role.USER))))
        await ask(stub)
        servicer.leave.set()
        assert (await call).role.endswith("/user/alice")


async def test_a_retired_ca_ends_its_calls_even_when_its_certificates_are_unknown() -> None:
    old, new = TestCa(epoch="one"), TestCa(epoch="two")
    server_side = old.credentials(Role.KEYBROKER, bundle=old.bundle_with(new))
    user = old.material(Role.USER)
    async with running(server_side, user) as (_, _, call):
        server_side.replace(new.material(Role.KEYBROKER))
        assert await code_of(call) is Code.DENY_LISTED


async def test_a_call_that_began_in_time_outlives_its_certificate_and_the_planned_end_of_its_ca() -> None:
    """A stream runs for hours; the certificate it began with is over, and so is the CA's time, some day."""
    old, new = TestCa(epoch="one"), TestCa(epoch="two")
    server_side = old.credentials(Role.KEYBROKER, bundle=old.bundle_with(new))
    user = old.material(Role.USER, life=timedelta(seconds=1))
    async with running(server_side, user) as (servicer, _, call):
        while datetime.now(UTC) <= user.not_after:
            await asyncio.sleep(0.05)
        server_side.replace(new.material(Role.KEYBROKER))
        await asyncio.sleep(0.1)
        assert not call.done()
        # Retired before its time it is another matter: nobody knows who else had its keys.
        key_id = read_leaf(user.chain_pem).issuer_key_id
        server_side.replace(replace(server_side.current(), revoked=Revoked(authorities=frozenset({key_id}))))
        assert await code_of(call) is Code.DENY_LISTED
        assert not servicer.leave.is_set()


def test_own_credentials_say_whether_others_would_take_them() -> None:
    ca, other = TestCa(epoch="one"), TestCa(epoch="two")
    mine = ca.material(Role.KEYBROKER)
    assert mine.is_trusted
    assert not replace(mine, revoked=revoking(mine)).is_trusted
    assert not replace(mine, bundle=other.bundle).is_trusted
    assert replace(mine, bundle=other.bundle_with(ca)).is_trusted
