# SPDX-License-Identifier: Apache-2.0
"""A service whose configuration names a socket serves its certificate there, for as long as it has its identity."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloister.errors import CloisterError, Code
from cloister.guest.enrol import Identity
from cloister.guest.measure import digest_of_package
from cloister.guest.service import enrol_service
from cloister.guest.spiffe_messages import X509SVIDRequest, X509SVIDResponse
from cloister.guest.workloadapi import SECURITY_HEADER
from cloister.identity import Role
from cloister.runtime.config import GuestSection, ServiceSection
from fakes.attest_harness import AttestProcess, attest_process
from fakes.certs import TRUST_DOMAIN


@pytest.fixture
async def attest() -> AsyncIterator[AttestProcess]:
    async with attest_process() as process:
        await process.stop()
        process.write_config(keybroker=digest_of_package("cloister_keybroker").hex())
        await process.start()
        yield process


async def enrol(attest: AttestProcess, workload_api: Path | None) -> Identity:
    guest = GuestSection(
        provider=f"simulated:{attest.socket}",
        attest_endpoint=attest.endpoints["enrolment"],
        trust_bundle=attest.bundle_file,
        workload_api=workload_api,
    )
    service = ServiceSection(
        trust_domain=TRUST_DOMAIN, state_dir=attest.directory / "k", endpoints_file=attest.directory / "k.json"
    )
    return await enrol_service(
        guest, service, role=Role.KEYBROKER, package="cloister_keybroker", config_bytes=b"[service]\n"
    )


async def first_svid(path: Path) -> str:
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        method = channel.unary_stream(
            "/SpiffeWorkloadAPI/FetchX509SVID",
            request_serializer=X509SVIDRequest.SerializeToString,
            response_deserializer=X509SVIDResponse.FromString,
        )
        response: Any = await method(X509SVIDRequest(), metadata=(SECURITY_HEADER,), timeout=10).read()
        return str(response.svids[0].spiffe_id)


async def test_the_socket_gives_the_services_certificate_and_ends_with_its_identity(attest: AttestProcess) -> None:
    path = attest.directory / "spiffe.sock"
    identity = await enrol(attest, path)
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        assert await first_svid(path) == str(identity.spiffe_id)
    finally:
        await identity.aclose()
    assert not path.exists()
    await identity.aclose()


async def test_without_the_line_nothing_is_served(attest: AttestProcess) -> None:
    before = set(attest.directory.iterdir())
    identity = await enrol(attest, None)
    await identity.aclose()
    assert {path for path in attest.directory.iterdir() if path.is_socket()} == {p for p in before if p.is_socket()}


async def test_a_socket_that_cannot_be_had_ends_the_start(attest: AttestProcess) -> None:
    occupied = attest.directory / "occupied"
    occupied.write_bytes(b"somebody's file")
    for path in (occupied, attest.directory / "nowhere" / "spiffe.sock"):
        with pytest.raises(CloisterError) as caught:
            await enrol(attest, path)
        assert caught.value.code is not Code.INTERNAL
        assert str(path) in str(caught.value)
    assert occupied.read_bytes() == b"somebody's file"
