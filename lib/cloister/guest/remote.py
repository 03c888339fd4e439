# SPDX-License-Identifier: Apache-2.0
"""How a TD reaches attest before it has a certificate, and when it has one that nobody believes any more."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any, Final, Protocol

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import SwappingChannel, invoke, open_enrolment_channel, open_public_channel

# A thousand TDs behind one address take half a minute at the rate that attest grants an address. Most of it they wait
# before the handshake.
_CALL_TIMEOUT_S: Final = 75.0
_UPDATE_TIMEOUT_S: Final = 20.0
_BUSY_FOR_S: Final = 60.0
_BUSY_WAIT_S: Final = 0.25
_BUSY_LAST_WAIT_S: Final = 4.0
# TDs that started together must not come together again.
_JITTER: Final = secrets.SystemRandom().random


class EnrolmentTransport(Protocol):
    """How attest is asked: over the network, or, by attest itself, directly."""

    async def challenge(self, request: attest_pb2.ChallengeRequest) -> attest_pb2.ChallengeResponse: ...

    async def attest(self, request: attest_pb2.AttestRequest) -> attest_pb2.AttestResponse: ...

    async def trust_update(self, sequence: int) -> bytes:
        """Return the trust update after `sequence`, from attest or whoever answers; empty when there is none."""

    def follow(self, bundle: TrustBundle) -> None:
        """Reach attest by this bundle from now on."""


class RemoteEnrolment:
    """Attest over TLS that authenticates attest alone; a new connection for each enrolment, since they are rare.

    A call that attest is too busy for is made again: it was turned away before anything was done about it.
    """

    _channel: SwappingChannel | None = None  # from challenge to attest

    def __init__(
        self, endpoint: str, bundle: TrustBundle, *, busy_for_s: float = _BUSY_FOR_S, first_wait_s: float = _BUSY_WAIT_S
    ) -> None:
        """Put up with a busy attest for `busy_for_s` seconds a call, waiting `first_wait_s` and then longer."""
        self._endpoint, self._bundle = endpoint, bundle
        self._busy_for_s, self._first_wait_s = busy_for_s, first_wait_s

    async def challenge(self, request: attest_pb2.ChallengeRequest) -> attest_pb2.ChallengeResponse:
        await self._hang_up()  # what is left of an enrolment that did not get to its end
        response: attest_pb2.ChallengeResponse
        try:
            response = await self._call("Challenge", request, "ask attest for a nonce")
        except BaseException:
            await self._hang_up()
            raise
        return response

    async def attest(self, request: attest_pb2.AttestRequest) -> attest_pb2.AttestResponse:
        response: attest_pb2.AttestResponse
        try:
            response = await self._call("Attest", request, "enrol with attest")
        finally:
            await self._hang_up()
        return response

    async def _call(self, name: str, request: Any, what: str) -> Any:
        end = time.monotonic() + self._busy_for_s
        wait_s = self._first_wait_s
        if self._channel is None:
            self._channel = open_enrolment_channel(self._endpoint, bundle=self._bundle)
        method = getattr(attest_pb2_grpc.EnrolmentServiceStub(self._channel), name)
        while True:
            try:
                return await invoke(method, request, timeout_s=_CALL_TIMEOUT_S, what=what)
            except CloisterError as error:
                pause_s = wait_s * (0.5 + 0.5 * _JITTER())
                if error.code is not Code.RATE_LIMITED or time.monotonic() + pause_s > end:
                    raise
            await asyncio.sleep(pause_s)
            wait_s = min(2 * wait_s, _BUSY_LAST_WAIT_S)

    async def _hang_up(self) -> None:
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def trust_update(self, sequence: int) -> bytes:
        request = attest_pb2.GetTrustUpdateRequest(sequence=sequence)
        try:
            async with open_enrolment_channel(self._endpoint, bundle=self._bundle) as channel:
                return await _update(channel, request)
        except CloisterError as error:
            if error.code is not Code.UNREACHABLE:
                raise
        # Attest may show a certificate of an epoch that is not known here yet. An update is signed: whoever hands it
        # over is not believed, and can hold it back either way. Of another CA, the numbers mean nothing: ask for all.
        request = attest_pb2.GetTrustUpdateRequest()
        async with await open_public_channel(self._endpoint, trust_domain=self._bundle.trust_domain) as channel:
            return await _update(channel, request)

    def follow(self, bundle: TrustBundle) -> None:
        self._bundle = bundle


async def _update(channel: SwappingChannel, request: attest_pb2.GetTrustUpdateRequest) -> bytes:
    method = attest_pb2_grpc.EnrolmentServiceStub(channel).GetTrustUpdate
    response: attest_pb2.GetTrustUpdateResponse = await invoke(
        method, request, timeout_s=_UPDATE_TIMEOUT_S, what="ask attest for a trust update"
    )
    return response.trust_update
