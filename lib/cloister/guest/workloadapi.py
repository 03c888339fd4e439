# SPDX-License-Identifier: Apache-2.0
"""The SPIFFE Workload API on a Unix socket: this TD's certificate for any SPIFFE-aware program in it.

Whoever may connect gets the private key: the socket belongs to one user and lies inside the TD. There is no other
authentication, because there is nothing finer to be had: the TD as a whole is what was attested. The certificate is
the one that attest issued for this TD, and a renewed one is pushed to everyone who listens.

Served: FetchX509SVID, FetchX509Bundles. Not served: the JWT methods (UNIMPLEMENTED).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import grpc
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cloister.errors import CloisterError
from cloister.guest.peergate import PeerGate, unusable
from cloister.guest.spiffe_messages import (
    SERVICE,
    X509BundlesRequest,
    X509SVIDRequest,
    x509_bundles_response,
    x509_svid_response,
)
from cloister.runtime.credentials import CredentialSource, TlsMaterial
from cloister.runtime.logging import get_logger
from cloister.runtime.pem import read_certificates

# SPIFFE Workload Endpoint, 5.2: a browser or another protocol's client cannot be made to send it by accident.
SECURITY_HEADER: Final = ("workload.spiffe.io", "true")
# Sources that watch files notice a change only when they are asked.
_LOOK_AGAIN_S: Final = 5.0
_MAX_STREAMS: Final = 128
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 64 * 1024),  # requests carry next to nothing
    ("grpc.max_metadata_size", 8 * 1024),
    ("grpc.max_concurrent_streams", _MAX_STREAMS),
)
_JWT_METHODS: Final = (("FetchJWTSVID", False), ("FetchJWTBundles", True), ("ValidateJWTSVID", False))

Context = grpc.aio.ServicerContext


class WorkloadApi:
    """The API of one credential source. Belongs to one event loop.

    `uid` is the one user whose processes may connect, this process's own unless given; serving another user needs
    root. Programs find it by SPIFFE_ENDPOINT_SOCKET=`endpoint`.
    """

    def __init__(self, credentials: CredentialSource, path: Path, *, uid: int | None = None) -> None:
        self._credentials, self._path = credentials, path
        self._uid = os.geteuid() if uid is None else uid
        self._gate: PeerGate | None = None
        self._server: grpc.aio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._changed = asyncio.Event()
        credentials.on_change(self._on_change)

    @property
    def endpoint(self) -> str:
        """The value of SPIFFE_ENDPOINT_SOCKET."""
        return f"unix:{self._path}"

    async def start(self) -> None:
        """Serve; raise CloisterError when the socket cannot be had."""
        gate = self._gate = PeerGate(self._path, self._uid)
        server = grpc.aio.server(options=_OPTIONS, maximum_concurrent_rpcs=_MAX_STREAMS)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, self._methods())])
        self._loop = asyncio.get_running_loop()
        self._server = server
        try:
            # Without TLS as SPIFFE requires: this API is where certificates come from, and it never leaves the TD. The
            # socket is in the gate's private directory.
            server.add_insecure_port(f"unix:{gate.inner}")
            await server.start()
            await gate.start()
        except RuntimeError:
            await self.stop()
            raise unusable(self._path, "gRPC cannot listen behind it") from None
        except CloisterError:
            await self.stop()
            raise
        get_logger().info("SPIFFE Workload API ready", socket=str(self._path), uid=self._uid)

    async def stop(self) -> None:
        """End all streams and take the socket away."""
        self._loop = None
        if self._server is not None:
            await self._server.stop(None)  # at once: streams here never end by themselves
            self._server = None
        if self._gate is not None:
            await self._gate.stop()
            self._gate = None

    def _methods(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "FetchX509SVID": grpc.unary_stream_rpc_method_handler(
                self._fetch_svid, request_deserializer=X509SVIDRequest.FromString
            ),
            "FetchX509Bundles": grpc.unary_stream_rpc_method_handler(
                self._fetch_bundles, request_deserializer=X509BundlesRequest.FromString
            ),
        }
        for name, streams in _JWT_METHODS:
            kind = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
            methods[name] = kind(_no_jwt)
        return methods

    # gRPC wants generator functions, not functions that return a generator.
    async def _fetch_svid(self, _request: Any, context: Context[Any, bytes]) -> AsyncIterator[bytes]:
        async for response in self._push(context, _svid_of):
            yield response

    async def _fetch_bundles(self, _request: Any, context: Context[Any, bytes]) -> AsyncIterator[bytes]:
        async for response in self._push(context, _bundles_of):
            yield response

    async def _push(
        self, context: Context[Any, bytes], response_of: Callable[[TlsMaterial], bytes]
    ) -> AsyncIterator[bytes]:
        """Yield the response of now, and of each later generation that gives another one."""
        await _require_header(context)
        sent, seen = b"", None
        while True:
            changed = self._changed
            try:
                material = self._credentials.current()
            except CloisterError as error:
                # Programs try again on this status; on others they give up for good.
                await _abort(context, grpc.StatusCode.UNAVAILABLE, str(error).replace("\n", "; "))
            if material is not seen:
                seen, response = material, response_of(material)
                if response != sent:
                    sent = response
                    yield response
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), _LOOK_AGAIN_S)

    def _on_change(self) -> None:
        """Wake every stream; called from any thread, at any time."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has just been closed: there are no streams
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _svid_of(material: TlsMaterial) -> bytes:
    key = load_pem_private_key(material.private_key_pem.reveal(), password=None)
    return x509_svid_response(
        spiffe_id=str(material.spiffe_id),
        chain_der=_der(material.chain_pem),
        key_pkcs8_der=key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
        bundle_der=_der(material.bundle.root_pem),
    )


def _bundles_of(material: TlsMaterial) -> bytes:
    return x509_bundles_response({f"spiffe://{material.bundle.trust_domain}": _der(material.bundle.root_pem)})


def _der(pem: bytes) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.DER) for certificate in read_certificates(pem))


async def _require_header(context: Context[Any, Any]) -> None:
    metadata = context.invocation_metadata() or ()
    if [value for name, value in metadata if name == SECURITY_HEADER[0]] != [SECURITY_HEADER[1]]:
        await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, f"the metadata {': '.join(SECURITY_HEADER)} is missing")


async def _no_jwt(_request: bytes, context: Context[Any, Any]) -> bytes:
    await _require_header(context)
    await _abort(
        context, grpc.StatusCode.UNIMPLEMENTED, "no JWT-SVIDs are issued here; FetchX509SVID gives a certificate"
    )


async def _abort(context: Context[Any, Any], code: grpc.StatusCode, details: str) -> NoReturn:
    await context.abort(code, details)
    raise AssertionError("abort returned")
