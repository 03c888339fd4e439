# SPDX-License-Identifier: Apache-2.0
"""The SPIFFE Workload API: a foreign SPIFFE client gets this TD's certificate and each renewal; others get nothing."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from cloister.errors import CloisterError, Code
from cloister.guest.peergate import MAX_CONNECTIONS, PeerGate
from cloister.guest.spiffe_messages import (
    X509BundlesRequest,
    X509BundlesResponse,
    X509SVIDRequest,
    X509SVIDResponse,
)
from cloister.guest.workloadapi import SECURITY_HEADER, WorkloadApi
from cloister.identity import Role
from cloister.runtime.credentials import StaticCredentials, TlsMaterial
from cloister.runtime.pem import read_leaf
from fakes.certs import TRUST_DOMAIN, TestCa

TIMEOUT_S = 10.0
PUSHED_S = 3.0  # below the time after which the API would look by itself


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="wl-") as directory:  # a socket's path is short
        yield Path(directory) / "agent.sock"


@pytest.fixture
def ca() -> TestCa:
    return TestCa()


@pytest.fixture
def credentials(ca: TestCa) -> StaticCredentials:
    return ca.credentials(Role.RANK)


@pytest.fixture
async def api(credentials: StaticCredentials, path: Path) -> AsyncIterator[WorkloadApi]:
    served = WorkloadApi(credentials, path)
    await served.start()
    yield served
    await served.stop()


@pytest.fixture
async def channel(api: WorkloadApi) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(api.endpoint) as opened:
        yield opened


def svids(channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...] = (SECURITY_HEADER,)) -> grpc.aio.Call:
    method = channel.unary_stream(
        "/SpiffeWorkloadAPI/FetchX509SVID",
        request_serializer=X509SVIDRequest.SerializeToString,
        response_deserializer=X509SVIDResponse.FromString,
    )
    return method(X509SVIDRequest(), metadata=metadata, timeout=TIMEOUT_S)


class TestForeignClient:
    """PyPI `spiffe`, as somebody's program uses it."""

    async def test_it_reads_the_svid_its_key_and_the_bundle(
        self, api: WorkloadApi, credentials: StaticCredentials, ca: TestCa
    ) -> None:
        spiffe = pytest.importorskip("spiffe")

        def read() -> tuple[str, bytes, list[bytes], bool]:
            with spiffe.WorkloadApiClient(api.endpoint) as client:
                context = client.fetch_x509_context(timeout=TIMEOUT_S)
                svid = context.default_svid
                bundle = context.x509_bundle_set.get_bundle_for_trust_domain(spiffe.TrustDomain(TRUST_DOMAIN))
                fits = svid.private_key.public_key() == svid.leaf.public_key()
                roots = [root.public_bytes(Encoding.DER) for root in bundle.x509_authorities]
                assert len(svid.cert_chain) == 2
                return str(svid.spiffe_id), svid.leaf.public_bytes(Encoding.DER), roots, fits

        material = credentials.current()
        spiffe_id, leaf, roots, fits = await asyncio.to_thread(read)
        assert spiffe_id == str(material.spiffe_id)
        assert leaf == read_leaf(material.chain_pem).der
        assert roots == [ca.root.public_bytes(Encoding.DER)]
        assert fits

    async def test_a_renewed_svid_is_pushed_to_it(
        self, api: WorkloadApi, credentials: StaticCredentials, ca: TestCa
    ) -> None:
        spiffe = pytest.importorskip("spiffe")
        loop, seen = asyncio.get_running_loop(), asyncio.Queue[object]()
        with spiffe.WorkloadApiClient(api.endpoint) as client:
            stream = await asyncio.to_thread(
                client.stream_x509_contexts,
                on_success=lambda context: loop.call_soon_threadsafe(
                    seen.put_nowait, context.default_svid.leaf.serial_number
                ),
                on_error=lambda error: loop.call_soon_threadsafe(seen.put_nowait, error),
            )
            first = await asyncio.wait_for(seen.get(), TIMEOUT_S)
            assert first == read_leaf(credentials.current().chain_pem).certificate.serial_number
            credentials.replace(ca.material(Role.RANK))
            second = await asyncio.wait_for(seen.get(), TIMEOUT_S)
            assert second == read_leaf(credentials.current().chain_pem).certificate.serial_number
            assert first != second
            await asyncio.to_thread(stream.cancel)

    async def test_it_is_told_that_there_are_no_jwts(self, api: WorkloadApi) -> None:
        spiffe = pytest.importorskip("spiffe")

        def fetch() -> None:
            with spiffe.WorkloadApiClient(api.endpoint) as client:
                client.fetch_jwt_svid(audience={"somebody"}, timeout=TIMEOUT_S)

        with pytest.raises(Exception, match="no JWT-SVIDs are issued here"):
            await asyncio.to_thread(fetch)

    @pytest.mark.parametrize("first", ["spiffe", "cloister.guest.workloadapi"])
    def test_its_generated_code_and_ours_live_in_one_process(self, first: str) -> None:
        pytest.importorskip("spiffe")
        command = f"import {first}, spiffe, cloister.guest.workloadapi; from spiffe._proto import workload_pb2"
        subprocess.run([sys.executable, "-c", command], check=True, timeout=60)


class TestProtocol:
    @pytest.mark.parametrize(
        "metadata",
        [
            (),
            (("workload.spiffe.io", "false"),),
            (("workload.spiffe.io", ""),),
            (("workload.spiffe.io", "True"),),
            (("workload.spiffe.io", "true"), ("workload.spiffe.io", "true")),
            (("workload-spiffe-io", "true"),),
        ],
    )
    @pytest.mark.parametrize(
        "method", ["FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"]
    )
    async def test_without_the_security_header_there_is_nothing(
        self, channel: grpc.aio.Channel, method: str, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/SpiffeWorkloadAPI/{method}")(b"", metadata=metadata, timeout=TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT

    @pytest.mark.parametrize("method", ["FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"])
    async def test_jwt_methods_say_what_there_is_instead(self, channel: grpc.aio.Channel, method: str) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"/SpiffeWorkloadAPI/{method}")(
                b"", metadata=[SECURITY_HEADER], timeout=TIMEOUT_S
            )
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "FetchX509SVID" in (caught.value.details() or "")

    async def test_a_request_that_is_no_message_ends_that_call_alone(self, channel: grpc.aio.Channel) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await channel.unary_unary("/SpiffeWorkloadAPI/FetchX509SVID")(
                b"\xff" * 100, metadata=[SECURITY_HEADER], timeout=TIMEOUT_S
            )
        assert await svids(channel).read()

    async def test_every_listener_gets_every_renewal(
        self, channel: grpc.aio.Channel, credentials: StaticCredentials, ca: TestCa
    ) -> None:
        asyncio.get_running_loop().set_debug(True)  # the loop then refuses calls from threads that are not its own
        calls = [svids(channel) for _ in range(8)]
        first = [await call.read() for call in calls]
        # From another thread, as it may be, and one whose end wakes nobody.
        thread = threading.Thread(target=credentials.replace, args=[ca.material(Role.RANK)])
        thread.start()
        async with asyncio.timeout(PUSHED_S):
            second = [await call.read() for call in calls]
        thread.join()
        assert len({response.SerializeToString() for response in first}) == 1
        assert len({response.SerializeToString() for response in second}) == 1
        assert first[0] != second[0]

    async def test_bundles_are_pushed_when_they_change_and_only_then(
        self, channel: grpc.aio.Channel, credentials: StaticCredentials, ca: TestCa
    ) -> None:
        call = channel.unary_stream(
            "/SpiffeWorkloadAPI/FetchX509Bundles",
            request_serializer=X509BundlesRequest.SerializeToString,
            response_deserializer=X509BundlesResponse.FromString,
        )(X509BundlesRequest(), metadata=(SECURITY_HEADER,), timeout=TIMEOUT_S)
        domain, root = f"spiffe://{TRUST_DOMAIN}", ca.root.public_bytes(Encoding.DER)
        assert dict((await call.read()).bundles) == {domain: root}
        listener = svids(channel)
        await listener.read()
        credentials.replace(ca.material(Role.RANK))  # another certificate, the same bundle
        async with asyncio.timeout(PUSHED_S):
            await listener.read()
        other = TestCa(epoch="test-2")
        credentials.replace(ca.material(Role.RANK, bundle=ca.bundle_with(other)))
        assert dict((await call.read()).bundles) == {domain: root + other.root.public_bytes(Encoding.DER)}

    async def test_an_identity_that_has_expired_is_for_now_unavailable(self, path: Path, ca: TestCa) -> None:
        source = Expiring(ca.material(Role.RANK, life=timedelta(hours=1)))
        api = WorkloadApi(source, path)
        await api.start()
        try:
            async with grpc.aio.insecure_channel(api.endpoint) as channel:
                source.expired = True
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in svids(channel):
                        pass
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "CLO-1107" in (caught.value.details() or "")
                source.expired = False
                assert await svids(channel).read()
        finally:
            await api.stop()

    async def test_a_change_after_the_end_disturbs_nobody(
        self, api: WorkloadApi, credentials: StaticCredentials, ca: TestCa
    ) -> None:
        await api.stop()
        credentials.replace(ca.material(Role.RANK))


class Expiring:
    """A source whose certificate can run out and come back."""

    def __init__(self, material: TlsMaterial) -> None:
        self._material = material
        self.expired = False

    def current(self) -> TlsMaterial:
        if self.expired:
            raise CloisterError(Code.CERTIFICATE_EXPIRED, what="the certificate has expired")
        return self._material

    def on_change(self, callback: object) -> None:
        pass


class TestSocket:
    async def test_only_its_user_can_open_it_and_it_goes_away(self, api: WorkloadApi, path: Path) -> None:
        assert path.stat().st_mode & 0o777 == 0o600
        (private,) = (entry for entry in path.parent.iterdir() if entry != path)
        assert private.stat().st_mode & 0o777 == 0o700
        await api.stop()
        assert list(path.parent.iterdir()) == []

    async def test_a_dead_socket_is_replaced_and_a_live_one_is_not(
        self, credentials: StaticCredentials, path: Path
    ) -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        first, second = WorkloadApi(credentials, path), WorkloadApi(credentials, path)
        await first.start()
        with pytest.raises(CloisterError, match="cannot listen") as caught:
            await second.start()
        assert caught.value.code is Code.IO_FAILED
        async with grpc.aio.insecure_channel(first.endpoint) as channel:
            assert await svids(channel).read()
        await first.stop()
        assert list(path.parent.iterdir()) == []

    async def test_nothing_but_a_socket_is_replaced(self, credentials: StaticCredentials, path: Path) -> None:
        path.write_text("somebody's file")
        api = WorkloadApi(credentials, path)
        with pytest.raises(CloisterError, match="cannot listen"):
            await api.start()
        assert path.read_text() == "somebody's file"

    @pytest.mark.parametrize("name", ["none/agent.sock", "x" * 90 + "/agent.sock"])
    async def test_a_path_that_cannot_be_is_an_error(
        self, credentials: StaticCredentials, path: Path, name: str
    ) -> None:
        if not name.startswith("none"):
            (path.parent / name).parent.mkdir()
        with pytest.raises(CloisterError, match="cannot listen"):
            await WorkloadApi(credentials, path.parent / name).start()

    async def test_another_users_process_is_turned_away(self, credentials: StaticCredentials, path: Path) -> None:
        """Root can open any socket: what stops it here is the gate's question to the kernel."""
        if os.geteuid() != 0:
            pytest.skip("giving the socket to another user needs root")
        api = WorkloadApi(credentials, path, uid=65534)
        await api.start()
        try:
            assert path.stat().st_uid == 65534
            async with grpc.aio.insecure_channel(api.endpoint) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await svids(channel).read()
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            await api.stop()

    async def test_the_user_it_is_for_is_let_in(self, credentials: StaticCredentials, path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("giving the socket to another user needs root")
        path.parent.chmod(0o755)
        api = WorkloadApi(credentials, path, uid=65534)
        await api.start()
        command = (
            "import os, socket, sys; os.setuid(int(sys.argv[2]))\n"
            "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
            "s.sendall(b'PRI * HTTP/2.0\\r\\n\\r\\nSM\\r\\n\\r\\n\\0\\0\\0\\4\\0\\0\\0\\0\\0')\n"
            "print(len(s.recv(9)))"
        )
        try:
            for uid, wanted in ((65534, (b"9",)), (0, (b"0", b""))):  # nothing, or an error in writing to nobody
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-c",
                    command,
                    str(path),
                    str(uid),
                    stdout=asyncio.subprocess.PIPE,
                    stderr=asyncio.subprocess.DEVNULL,
                )
                output, _ = await asyncio.wait_for(process.communicate(), 30)
                assert output.strip() in wanted
        finally:
            await api.stop()

    async def test_connections_are_bounded(self, path: Path) -> None:
        gate = PeerGate(path, os.geteuid())
        inner = await asyncio.start_unix_server(lambda reader, writer: writer.write(b"x"), gate.inner)
        await gate.start()
        writers = []
        try:
            for _ in range(MAX_CONNECTIONS):
                reader, writer = await asyncio.open_unix_connection(path)
                writers.append(writer)
                assert await reader.readexactly(1) == b"x"
            reader, writer = await asyncio.open_unix_connection(path)
            writers.append(writer)
            assert await reader.read() == b""
        finally:
            for writer in writers:
                writer.close()
            await gate.stop()
            inner.close()
