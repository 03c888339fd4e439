# SPDX-License-Identifier: Apache-2.0
"""The whole way of a TD with real interfaces: provider, measurements, attest, certificate, Workload API, restart."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from cloister.guest.guest import Guest
from cloister.guest.provider import open_provider
from cloister.guest.spiffe_messages import X509SVIDRequest, X509SVIDResponse
from cloister.guest.workloadapi import SECURITY_HEADER, WorkloadApi
from cloister.identity import Role
from fakes.attest_harness import IMAGE, LocalAttest, local_attest, measure
from fakes.fake_qgs import fake_qgs
from fakes.tdx_guest_device import FakeTdxGuest
from fakes.tsm_configfs import FakeKernel

TIMEOUT_S = 10.0


@pytest.fixture
def attest() -> Iterator[LocalAttest]:
    with local_attest() as served:
        yield served


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="td-") as name:
        yield Path(name)


@pytest.fixture(params=["configfs", "tdx-guest"])
def boot(request: pytest.FixtureRequest, attest: LocalAttest, directory: Path) -> Iterator[Callable[[], Guest]]:
    """A TD that has booted; each call is another process that starts in it."""
    (directory / "tdx_guest").touch()
    td = attest.platform.launch(IMAGE)
    kernel = FakeKernel(td).kernel(device=directory / "tdx_guest", ioctl=FakeTdxGuest(td))
    with ExitStack() as stack:
        uri = f"{request.param}:?journal={directory}/extensions"
        if request.param == "tdx-guest":
            uri += f"&qgs={stack.enter_context(fake_qgs(attest.platform)).address}"

        def process() -> Guest:
            guest = Guest(open_provider(uri, bytes(48), kernel=kernel))
            measure(guest, Role.KEYBROKER, bundle=attest.bundle.digest)
            return guest

        yield process


async def test_a_td_enrols_and_its_renewed_svid_reaches_programs_in_it(
    attest: LocalAttest, boot: Callable[[], Guest], directory: Path
) -> None:
    identity = await attest.enrol(await asyncio.to_thread(boot))
    assert identity.spiffe_id.role is Role.KEYBROKER
    api = WorkloadApi(identity, directory / "agent.sock")
    await api.start()
    try:
        async with grpc.aio.insecure_channel(api.endpoint) as channel:
            call = channel.unary_stream(
                "/SpiffeWorkloadAPI/FetchX509SVID",
                request_serializer=X509SVIDRequest.SerializeToString,
                response_deserializer=X509SVIDResponse.FromString,
            )(X509SVIDRequest(), metadata=[SECURITY_HEADER], timeout=TIMEOUT_S)
            first = (await call.read()).svids[0]
            await identity.refresh()
            second = (await call.read()).svids[0]
        assert first.spiffe_id == second.spiffe_id == str(identity.spiffe_id)
        assert first.x509_svid != second.x509_svid
        assert first.x509_svid_key == second.x509_svid_key
    finally:
        await api.stop()
        await identity.aclose()


async def test_a_service_that_starts_again_in_its_td_enrols_again_under_new_keys(
    attest: LocalAttest, boot: Callable[[], Guest]
) -> None:
    first = await attest.enrol(await asyncio.to_thread(boot))
    await first.aclose()
    second = await attest.enrol(await asyncio.to_thread(boot))
    assert first.spiffe_id == second.spiffe_id
    assert first.guest.keys.tls_spki_der != second.guest.keys.tls_spki_der
    assert first.guest.event_log == second.guest.event_log
    await second.aclose()
