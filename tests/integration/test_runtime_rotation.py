# SPDX-License-Identifier: Apache-2.0
"""Certificates change under load; nobody restarts and nobody notices."""

from __future__ import annotations

import asyncio
import os
from datetime import timedelta
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.identity import Role
from cloister.runtime.credentials import FileCredentials, StaticCredentials, TlsMaterial
from cloister.runtime.limits import Limits
from fakes.certs import TestCa
from fakes.evidence_server import EvidenceFake, ask, evidence_server, evidence_stub

ROTATIONS = 10
WORKERS = 8


async def test_rotation_of_both_sides_and_of_the_ca_fails_no_call() -> None:
    cas = (TestCa(epoch="one"), TestCa(epoch="two"))
    both = cas[0].bundle_with(cas[1])  # while CAs change, everyone trusts the old and the new one
    server_side = cas[0].credentials(Role.KEYBROKER, bundle=both)
    client_side = cas[0].credentials(Role.USER, bundle=both)
    limits = Limits(max_connection_age_s=0.5)  # connections end all the time, too
    calls, failures = 0, []
    enough = asyncio.Event()

    async with (
        evidence_server(server_side, limits=limits) as server,
        evidence_stub(server.endpoint, client_side) as stub,
    ):

        async def work() -> None:
            nonlocal calls
            while not enough.is_set():
                try:
                    await ask(stub)
                except CloisterError as error:
                    failures.append(str(error))
                calls += 1

        workers = [asyncio.create_task(work()) for _ in range(WORKERS)]
        for rotation in range(1, ROTATIONS + 1):
            before = calls
            ca = cas[rotation % 2]
            server_side.replace(ca.material(Role.KEYBROKER, bundle=both))
            client_side.replace(ca.material(Role.USER, bundle=both))
            while calls < before + 50:
                await asyncio.sleep(0.01)
        enough.set()
        await asyncio.gather(*workers)
    assert failures == []
    assert calls >= ROTATIONS * 50


async def test_a_server_shows_its_new_certificate_from_the_next_handshake_on() -> None:
    old, new = TestCa(epoch="one"), TestCa(epoch="two")
    server_side = old.credentials(Role.KEYBROKER, bundle=old.bundle_with(new))
    only_new = new.credentials(Role.USER)
    async with evidence_server(server_side) as server:
        async with evidence_stub(server.endpoint, only_new) as stub:
            with pytest.raises(CloisterError) as caught:
                await ask(stub)
            assert caught.value.code is Code.UNREACHABLE
        server_side.replace(new.material(Role.KEYBROKER))
        async with evidence_stub(server.endpoint, only_new) as stub:
            await ask(stub)


async def test_a_call_in_flight_survives_the_change_of_its_channel() -> None:
    ca, servicer = TestCa(), EvidenceFake()
    credentials = ca.credentials(Role.USER)
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER), servicer) as server,
        evidence_stub(server.endpoint, credentials) as stub,
    ):
        old = stub.GetEvidence.channel.current()
        call = asyncio.create_task(ask(stub, "wait"))
        await servicer.entered.wait()
        credentials.replace(ca.material(Role.USER))
        await ask(stub)
        assert stub.GetEvidence.channel.current() is not old
        servicer.leave.set()
        assert (await call).role.endswith("/user/alice")


async def test_a_connection_does_not_outlive_the_ca_it_began_under() -> None:
    old, new = TestCa(epoch="one"), TestCa(epoch="two")
    server_side = old.credentials(Role.KEYBROKER, bundle=old.bundle_with(new))
    async with (
        evidence_server(server_side) as server,
        evidence_stub(server.endpoint, old.credentials(Role.USER)) as stub,
    ):
        await ask(stub)
        server_side.replace(new.material(Role.KEYBROKER))
        with pytest.raises(CloisterError) as caught:
            await ask(stub)
    assert caught.value.code is Code.CALLER_UNKNOWN


async def test_a_connection_does_not_outlive_its_certificate() -> None:
    ca = TestCa()
    credentials = ca.credentials(Role.USER, life=timedelta(seconds=2))
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER)) as server,
        evidence_stub(server.endpoint, credentials) as stub,
    ):
        await ask(stub)
        caught: list[CloisterError] = []
        while not caught:
            try:
                await ask(stub)
                await asyncio.sleep(0.05)
            except CloisterError as error:
                caught.append(error)
    assert caught[0].code is Code.CERTIFICATE_EXPIRED


def write(directory: Path, material: TlsMaterial) -> tuple[Path, Path, Path]:
    paths = (directory / "key.pem", directory / "chain.pem", directory / "bundle.json")
    contents = (material.private_key_pem.reveal(), material.chain_pem, material.bundle.to_bytes())
    for path, content in zip(paths, contents, strict=True):
        temporary = path.with_suffix(".new")
        temporary.write_bytes(content)
        os.replace(temporary, path)
    return paths


async def test_credentials_in_files_are_read_again_when_they_change(tmp_path: Path) -> None:
    ca = TestCa()
    credentials = FileCredentials(*write(tmp_path, ca.material(Role.USER)))
    told: list[bool] = []
    credentials.on_change(lambda: told.append(True))
    first = credentials.current()
    assert credentials.current() is first
    async with (
        evidence_server(ca.credentials(Role.KEYBROKER)) as server,
        evidence_stub(server.endpoint, credentials) as stub,
    ):
        await ask(stub)
        write(tmp_path, ca.material(Role.USER))
        await ask(stub)
    assert credentials.current() is not first
    assert told == [True]


def test_files_that_do_not_fit_together_leave_the_last_good_credentials(tmp_path: Path) -> None:
    ca = TestCa()
    paths = write(tmp_path, ca.material(Role.USER))
    credentials = FileCredentials(*paths)
    first = credentials.current()
    other = ca.material(Role.USER)
    paths[0].write_bytes(other.private_key_pem.reveal())
    assert credentials.current() is first, "the new key is not the old certificate's"
    paths[1].write_bytes(other.chain_pem)
    assert credentials.current() == other
    paths[2].unlink()
    assert credentials.current() == other


def test_missing_files_are_named(tmp_path: Path) -> None:
    paths = write(tmp_path, TestCa().material(Role.USER))
    paths[1].unlink()
    with pytest.raises(CloisterError) as caught:
        FileCredentials(*paths)
    assert caught.value.code is Code.FILE_NOT_FOUND
    assert "chain.pem" in caught.value.what


def test_static_credentials_tell_everyone_who_asked() -> None:
    ca = TestCa()
    source = StaticCredentials(ca.material(Role.USER))
    told: list[str] = []
    source.on_change(lambda: told.append("a"))
    source.on_change(lambda: told.append("b"))
    source.replace(ca.material(Role.USER))
    assert told == ["a", "b"]
