# SPDX-License-Identifier: Apache-2.0
"""From evidence to an identity, and keeping it: the one path by which a TD gets its certificate.

An enrolment gives certificate and attestation result together, and the result names that certificate (`cnf`). They are
kept as one value (`Attested`) and never mixed with those of another enrolment: whoever shows the result to a relying
party opens a channel with `attested.material`, so there is no moment at which the two could differ.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn, Protocol, Self

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister import ear
from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.guest import Guest
from cloister.identity import Role, SpiffeId
from cloister.protocol import NONCE_SIZE, combined_nonce
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.channel import SwappingChannel, invoke, open_enrolment_channel
from cloister.runtime.credentials import TlsMaterial
from cloister.runtime.limits import Limits
from cloister.runtime.logging import get_logger
from cloister.runtime.pem import read_leaf
from cloister.secret import SecretBytes
from cloister.tlv import sha384

# A thousand TDs behind one address take half a minute at the rate that attest grants an address. Most of it they wait
# before the handshake: that may take longer here than anywhere else.
_CALL_TIMEOUT_S: Final = 75.0
_LIMITS: Final = Limits(connect_timeout_s=60.0)
_BUSY_FOR_S: Final = 60.0
_BUSY_WAIT_S: Final = 0.25
_BUSY_LAST_WAIT_S: Final = 4.0
_FIRST_RETRY_S: Final = 0.5
_LAST_RETRY_S: Final = 30.0
# A stack that started together must not renew together.
_JITTER: Final = secrets.SystemRandom().random

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the system's time, with its zone."""
    return datetime.now(UTC)


class EnrolmentTransport(Protocol):
    """How attest is asked: over the network, or, by attest itself, directly."""

    async def challenge(self, request: attest_pb2.ChallengeRequest) -> attest_pb2.ChallengeResponse: ...

    async def attest(self, request: attest_pb2.AttestRequest) -> attest_pb2.AttestResponse: ...


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
            self._channel = open_enrolment_channel(self._endpoint, bundle=self._bundle, limits=_LIMITS)
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


@dataclass(frozen=True, slots=True)
class Attested:
    """What one enrolment gave: a certificate, and the attestation result that is bound to it."""

    material: TlsMaterial
    attestation_result: str  # JWT
    ear: ear.Ear
    obtained_at: datetime


class Identity:
    """A TD's credentials: a CredentialSource that renews itself. Belongs to one event loop."""

    def __init__(self, guest: Guest, transport: EnrolmentTransport, bundle: TrustBundle, clock: Clock) -> None:
        """Use `enrol` or `enrol_through`: before the first enrolment there is no identity."""
        self._guest = guest
        self._transport = transport
        self._bundle = bundle
        self._clock = clock
        key_pem = guest.keys.tls.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self._key_pem = SecretBytes(key_pem)
        self._csr_der = (
            x509.CertificateSigningRequestBuilder()
            .subject_name(x509.Name([]))  # attest takes the name from its registry, never from here
            .sign(guest.keys.tls, SHA256())
            .public_bytes(Encoding.DER)
        )
        self._one_at_a_time = asyncio.Lock()
        self._attested: Attested | None = None
        self._callbacks: list[Callable[[], None]] = []
        self._renewal: asyncio.Task[None] | None = None
        self._last_failure = ""

    @classmethod
    async def enrol(cls, guest: Guest, *, attest_endpoint: str, bundle: TrustBundle, clock: Clock = utc_now) -> Self:
        """Enrol a sealed TD; raise CloisterError, attest's own when it refuses."""
        return await cls.enrol_through(RemoteEnrolment(attest_endpoint, bundle), guest, bundle=bundle, clock=clock)

    @classmethod
    async def enrol_through(
        cls, transport: EnrolmentTransport, guest: Guest, *, bundle: TrustBundle, clock: Clock = utc_now
    ) -> Self:
        """Enrol by another way than the network."""
        identity = cls(guest, transport, bundle, clock)
        await identity.refresh()
        return identity

    @property
    def guest(self) -> Guest:
        return self._guest

    @property
    def spiffe_id(self) -> SpiffeId:
        return self._held().material.spiffe_id

    @property
    def bundle(self) -> TrustBundle:
        return self._bundle

    def current(self) -> TlsMaterial:
        """Return the newest credentials; raise CloisterError(CERTIFICATE_EXPIRED) when renewal failed for too long."""
        material = self._held().material
        if material.not_after <= self._clock():
            raise CloisterError(
                Code.CERTIFICATE_EXPIRED,
                what=f"the certificate of {material.spiffe_id} has expired and could not be renewed",
                why=self._last_failure or f"it was valid until {material.not_after.isoformat()}",
                todo="check that attest runs and can be reached; this process keeps trying",
            )
        return material

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    async def refresh(self, relying_party_nonce: bytes = b"") -> Attested:
        """Enrol anew under the same keys, over the nonce of a relying party if there is one; that becomes current."""
        if len(relying_party_nonce) not in (0, NONCE_SIZE):
            raise CloisterError(Code.ARGUMENT_INVALID, what=f"a relying party's nonce has {NONCE_SIZE} bytes")
        async with self._one_at_a_time:
            attested = await self._enrol_once(relying_party_nonce)
            self._attested = attested
            self._last_failure = ""
        for callback in tuple(self._callbacks):
            callback()
        return attested

    async def attested(self, relying_party_nonce: bytes | None = None) -> Attested:
        """Return certificate and attestation result that belong together: over this nonce, or current ones.

        Without a nonce the held ones are good while half of the result's life, and a quarter of the certificate's, is
        left.
        """
        if relying_party_nonce:
            return await self.refresh(relying_party_nonce)
        held, now = self._held(), self._clock()
        result_due = held.ear.issued_at + (held.ear.expires_at - held.ear.issued_at) / 2
        certificate_due = held.obtained_at + (held.material.not_after - held.obtained_at) * 0.75
        return held if now < min(result_due, certificate_due) else await self.refresh()

    async def attestation_result(self, relying_party_nonce: bytes | None = None) -> str:
        """Return a fresh attestation result (JWT). It is bound to the certificate that is current from now on."""
        return (await self.attested(relying_party_nonce)).attestation_result

    def start_renewal(self, jitter: Callable[[], float] = _JITTER) -> None:
        """Renew in the background from now on, at half of each certificate's life; `jitter` gives 0.0 to 1.0."""
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew_forever(jitter), name="certificate renewal")
            self._renewal.add_done_callback(_log_end)

    async def aclose(self) -> None:
        """Stop renewing, and end the TD's use of its platform."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)
            self._renewal = None
        self._guest.close()

    async def _enrol_once(self, relying_party_nonce: bytes) -> Attested:
        guest, role = self._guest, self._guest.role
        challenge = await self._transport.challenge(attest_pb2.ChallengeRequest(role=role))
        evidence = await asyncio.to_thread(
            guest.evidence,
            nonce=combined_nonce(challenge.nonce, relying_party_nonce),
            audience=challenge.audience,
            trust_domain=self._bundle.trust_domain,
        )
        response = await self._transport.attest(
            attest_pb2.AttestRequest(
                evidence=evidence,
                challenge_nonce=challenge.nonce,
                relying_party_nonce=relying_party_nonce,
                csr_der=self._csr_der,
            )
        )
        nonces = tuple(nonce.hex() for nonce in (challenge.nonce, relying_party_nonce) if nonce)
        return self._accepted(response, role, nonces)

    def _accepted(self, response: attest_pb2.AttestResponse, role: Role, nonces: tuple[str, ...]) -> Attested:
        """Take nothing from the answer that is not about these keys and this request."""
        if response.trust_bundle != self._bundle.to_bytes():
            raise CloisterError(
                Code.BUNDLE_INVALID,
                what="attest uses another trust bundle than this TD measured",
                why="its certificate authority has changed since this TD started",
                todo="start this workload again with the present bundle",
            )
        material = TlsMaterial.from_pem(self._key_pem, response.certificate_chain_pem, self._bundle)
        domain = self._bundle.trust_domain
        try:
            result = ear.verify(
                response.attestation_result,
                keys=self._bundle.token_keys,
                issuer=str(SpiffeId.service(domain, Role.ATTEST)),
                audience=f"spiffe://{domain}",
                now=self._clock(),
            )
        except ear.TokenRejected as error:
            _unusable(str(error))
        if material.spiffe_id.role is not role or result.spiffe_id != str(material.spiffe_id):
            _unusable("certificate, attestation result and role do not name one identity")
        leaf = read_leaf(material.chain_pem)
        if not secrets.compare_digest(result.certificate_sha256, hashlib.sha256(leaf.der).digest()):
            _unusable("the attestation result is bound to another certificate")
        if not secrets.compare_digest(result.hpke_key_digest, sha384(self._guest.keys.hpke.public_bytes)):
            _unusable("the attestation result is about another HPKE key")
        if result.nonces != nonces:
            _unusable("the attestation result is over other nonces")
        return Attested(material, response.attestation_result, result, self._clock())

    def _held(self) -> Attested:
        if self._attested is None:
            raise RuntimeError("no enrolment has succeeded: use Identity.enrol")
        return self._attested

    async def _renew_forever(self, jitter: Callable[[], float]) -> None:
        failures = 0
        while True:
            held = self._held()
            life = held.material.not_after - held.obtained_at
            due = held.obtained_at + life * (0.45 + 0.1 * jitter())
            wait_s = (due - self._clock()).total_seconds()
            if failures:
                left_s = max(0.0, (held.material.not_after - self._clock()).total_seconds())
                ceiling_s = max(_FIRST_RETRY_S, min(_LAST_RETRY_S, left_s / 4 if left_s else _LAST_RETRY_S))
                wait_s = min(ceiling_s, _FIRST_RETRY_S * 2.0 ** min(failures - 1, 10)) * (0.5 + 0.5 * jitter())
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                if not failures and self._held() is not held:
                    continue  # somebody asked for fresh evidence meanwhile: its certificate is new as well
            try:
                await self.refresh()
            except CloisterError as error:
                failures += 1
                self._last_failure = str(error).replace("\n", "; ")
                get_logger().warning(
                    "certificate renewal failed",
                    spiffe_id=str(held.material.spiffe_id),
                    error=error.code.text,
                    why=self._last_failure,
                    failures=failures,
                    expires_in_s=round((held.material.not_after - self._clock()) / timedelta(seconds=1)),
                )
            else:
                failures = 0


def _log_end(task: asyncio.Task[None]) -> None:
    """Log a renewal that ended by an error nobody expected: the certificate will run out."""
    if not task.cancelled() and (error := task.exception()) is not None:
        get_logger().critical("certificate renewal has ended", exc_info=error)


def _unusable(why: str) -> NoReturn:
    raise CloisterError(
        Code.TOKEN_INVALID,
        what="attest's answer cannot be used",
        why=why,
        todo="check clock and trust bundle of this machine; if they are right, look at attest's log",
    )
