# SPDX-License-Identifier: Apache-2.0
"""The one way to open a channel: mutual TLS to one role, rebuilt when credentials change, errors as CloisterError."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import grpc

from cloister.errors import CloisterError, Code
from cloister.identity import Role, dns_name
from cloister.runtime.address import split_address
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.caller import REQUEST_ID_KEY, current_request_id, new_request_id
from cloister.runtime.credentials import CredentialSource, TlsMaterial
from cloister.runtime.diagnose import explain_tls
from cloister.runtime.limits import Limits
from cloister.runtime.options import channel_options
from cloister.runtime.status import from_rpc_error

_Response = TypeVar("_Response")
_EXPLAIN_WITHIN_S: Final = 2.0
# Callers without identity wait in line before the handshake (cloister.runtime.door), and pings pass through Python: a
# crowd is no dead peer.
_IN_LINE: Final = Limits(connect_timeout_s=60.0, keepalive_s=5.0, ping_timeout_s=20.0)
_REFUSED: Final = ("failed to connect", "Socket closed", "andshake")


class _Connector(Protocol):
    """What a channel connects with."""

    def generation(self) -> object:
        """Return something that is the same object until the channel must be rebuilt."""

    def connect(self) -> grpc.aio.Channel: ...

    def explain(self) -> str:
        """Say why a connection fails, by trying; may block for a few seconds."""


class SwappingChannel(grpc.aio.Channel):
    """A channel that outlives its certificate.

    When credentials change, the next call goes over a new connection; calls in flight keep the old one, which closes
    when the last of them ends.
    """

    def __init__(self, connector: _Connector, limits: Limits) -> None:
        self._connector = connector
        self._limits = limits
        self._live: _Generation | None = None
        self._retired: set[_Generation] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def current(self) -> _Generation:
        """Return the generation for a new call."""
        if self._closed:
            raise grpc.aio.UsageError("the channel is closed")
        key = self._connector.generation()
        if self._live is None or self._live.key is not key:
            if self._live is not None:
                self._retire(self._live)
            self._live = _Generation(key, self._connector.connect(), self._close_when_idle)
        return self._live

    @property
    def default_deadline_s(self) -> float:
        """Return the deadline of a unary call that names none."""
        return self._limits.default_deadline_s

    def explain(self) -> str:
        """Say why a connection fails; may block for a few seconds."""
        return self._connector.explain()

    def unary_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, "unary_unary", method, args, kwargs)

    def unary_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, "unary_stream", method, args, kwargs)

    def stream_unary(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, "stream_unary", method, args, kwargs)

    def stream_stream(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return _MultiCallable(self, "stream_stream", method, args, kwargs)

    async def close(self, grace: float | None = None) -> None:
        """Close every connection; calls in flight get `grace` seconds, or none."""
        self._closed = True
        generations = [*self._retired, *([self._live] if self._live else [])]
        self._live = None
        self._retired.clear()
        for generation in generations:
            await generation.channel.close(grace)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self.current().channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self.current().channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self.current().channel.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        await self.close()

    def _retire(self, generation: _Generation) -> None:
        self._retired.add(generation)
        generation.retired = True
        self._close_when_idle(generation)

    def _close_when_idle(self, generation: _Generation) -> None:
        if generation.calls or generation not in self._retired:
            return
        self._retired.discard(generation)
        task = asyncio.get_running_loop().create_task(generation.channel.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


class _Generation:
    """One connection and the calls on it."""

    def __init__(self, key: object, channel: grpc.aio.Channel, on_idle: Callable[[_Generation], None]) -> None:
        self.key = key
        self.channel = channel
        self.calls = 0
        self.retired = False
        self._on_idle = on_idle

    def track(self, call: grpc.aio.Call) -> None:
        """Count a call until it is done."""
        self.calls += 1
        call.add_done_callback(self._done)

    def _done(self, _call: Any) -> None:
        self.calls -= 1
        if self.retired and not self.calls:
            self._on_idle(self)


class _MultiCallable:
    """A method of a stub: picks the connection, a deadline and the request id for each call."""

    def __init__(
        self, channel: SwappingChannel, kind: str, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.channel = channel
        self.path = method
        self._kind, self._args, self._kwargs = kind, args, kwargs

    def __call__(self, *request: Any, timeout: float | None = None, metadata: Any = None, **options: Any) -> Any:
        generation = self.channel.current()
        if timeout is None and self._kind == "unary_unary":
            timeout = self.channel.default_deadline_s
        make = getattr(generation.channel, self._kind)
        call = make(self.path, *self._args, **self._kwargs)(
            *request, timeout=timeout, metadata=_with_request_id(metadata), **options
        )
        generation.track(call)
        return call


def open_channel(
    endpoint: str, *, role: Role, credentials: CredentialSource, limits: Limits | None = None
) -> SwappingChannel:
    """Return a channel to the service that plays `role` at `endpoint`; nothing is sent before the first call.

    The server must show a certificate that this role's CA issued, naming `dns_name(role, trust_domain)`: a client in
    Python can match a DNS name only, and trusting one role's CA keeps every other role from standing in.
    """
    bounds = limits or Limits()
    return SwappingChannel(_MutualTls(endpoint, role, credentials, bounds), bounds)


def open_enrolment_channel(endpoint: str, *, bundle: TrustBundle, limits: Limits | None = None) -> SwappingChannel:
    """Return a channel to attest for a caller that has no certificate yet: TLS authenticates attest alone."""
    bounds = limits or _IN_LINE
    return SwappingChannel(_ServerTls(endpoint, bundle, bounds), bounds)


async def open_public_channel(endpoint: str, *, trust_domain: str, limits: Limits | None = None) -> SwappingChannel:
    """Return a channel to whoever answers as attest at `endpoint`, for what proves itself: signed, or sealed to a key.

    Nothing is believed of the certificate that is shown. Raises CloisterError(UNREACHABLE).
    """
    bounds = limits or _IN_LINE
    try:
        address = split_address(endpoint)
        pem = await asyncio.to_thread(ssl.get_server_certificate, address, timeout=bounds.connect_timeout_s)
    except OSError as error:  # ssl.SSLError is one
        raise CloisterError(
            Code.UNREACHABLE,
            what=f"nobody can be reached at {endpoint}",
            why=str(error),
            todo="check the address, and that attest runs",
        ) from None
    return SwappingChannel(_Whoever(endpoint, pem.encode("ascii"), trust_domain, bounds), bounds)


class _MutualTls:
    def __init__(self, endpoint: str, role: Role, credentials: CredentialSource, limits: Limits) -> None:
        self._endpoint, self._role, self._credentials, self._limits = endpoint, role, credentials, limits

    def generation(self) -> TlsMaterial:
        return self._credentials.current()

    def connect(self) -> grpc.aio.Channel:
        material = self._credentials.current()
        tls = grpc.ssl_channel_credentials(
            root_certificates=material.bundle.intermediate(self._role),
            private_key=material.private_key_pem.reveal(),
            certificate_chain=material.chain_pem,
        )
        name = dns_name(self._role, material.bundle.trust_domain)
        return grpc.aio.secure_channel(self._endpoint, tls, options=channel_options(self._limits, name))

    def explain(self) -> str:
        return explain_tls(self._endpoint, self._credentials, self._role, timeout_s=_EXPLAIN_WITHIN_S)


class _ServerTls:
    def __init__(self, endpoint: str, bundle: TrustBundle, limits: Limits) -> None:
        self._endpoint, self._bundle, self._limits = endpoint, bundle, limits

    def generation(self) -> TrustBundle:
        return self._bundle

    def connect(self) -> grpc.aio.Channel:
        tls = grpc.ssl_channel_credentials(root_certificates=self._bundle.intermediate(Role.ATTEST))
        name = dns_name(Role.ATTEST, self._bundle.trust_domain)
        return grpc.aio.secure_channel(self._endpoint, tls, options=channel_options(self._limits, name))

    def explain(self) -> str:
        return explain_tls(self._endpoint, None, Role.ATTEST, bundle=self._bundle, timeout_s=_EXPLAIN_WITHIN_S)


class _Whoever:
    def __init__(self, endpoint: str, leaf_pem: bytes, trust_domain: str, limits: Limits) -> None:
        self._endpoint, self._leaf_pem, self._trust_domain, self._limits = endpoint, leaf_pem, trust_domain, limits

    def generation(self) -> bytes:
        return self._leaf_pem

    def connect(self) -> grpc.aio.Channel:
        tls = grpc.ssl_channel_credentials(root_certificates=self._leaf_pem)
        name = dns_name(Role.ATTEST, self._trust_domain)
        return grpc.aio.secure_channel(self._endpoint, tls, options=channel_options(self._limits, name))

    def explain(self) -> str:
        return "it shows another certificate each time, or one of another trust domain"


async def invoke(method: Any, request: Any, *, timeout_s: float, what: str) -> Any:
    """Call a unary method of a stub; raise CloisterError, the service's own or one that says why it is out of reach.

    `what` says what is being done, such as "release the key of the training data".
    """
    try:
        return await method(request, timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        raise await _explained(method, error, what) from None


async def stream(method: Any, request: Any, *, what: str, timeout_s: float | None = None) -> AsyncIterator[Any]:
    """Iterate over the answers of a server-streaming method; raise CloisterError like `invoke`."""
    call = method(request, timeout=timeout_s)
    try:
        async for response in call:
            yield response
    except grpc.aio.AioRpcError as error:
        raise await _explained(method, error, what) from None
    finally:
        call.cancel()  # whoever stops iterating early must not leave the server working


async def _explained(method: Any, error: grpc.aio.AioRpcError, what: str) -> CloisterError:
    found = from_rpc_error(error, what=what)
    refused = found.code is Code.UNREACHABLE and any(sign in (error.details() or "") for sign in _REFUSED)
    if not refused or not isinstance(method, _MultiCallable):
        return found
    # gRPC says "Socket closed" for every refused handshake; a second one of our own has the reason. A peer that went
    # silent is not asked again: that would only take longer.
    why = await asyncio.to_thread(method.channel.explain)
    return CloisterError(found.code, what=found.what, why=why or found.why, todo=found.todo)


def _with_request_id(metadata: Any) -> tuple[tuple[str, str | bytes], ...]:
    given = tuple(metadata or ())
    if any(key == REQUEST_ID_KEY for key, _ in given):
        return given
    return (*given, (REQUEST_ID_KEY, current_request_id() or new_request_id()))
