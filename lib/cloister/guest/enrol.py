# SPDX-License-Identifier: Apache-2.0
"""From evidence to an identity, and keeping it: the one path by which a TD gets its certificate.

An enrolment gives certificate and attestation result together, and the result names that certificate (`cnf`). They are
kept as one value (`Attested`) and never mixed with those of another enrolment: whoever shows the result to a relying
party opens a channel with `attested.material`, so there is no moment at which the two could differ.

What is trusted changes while a TD runs (cloister.runtime.trust). It is asked for every few seconds, and comes with each
enrolment; when it does not cover the TD's own certificate any more, that is renewed at once. Evidence says which bundle
is held, so that attest issues to nobody who trusts somebody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final, NoReturn, Self

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister import ear
from cloister.api.attest.v1 import attest_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.guest import Guest
from cloister.guest.remote import EnrolmentTransport, RemoteEnrolment
from cloister.identity import Role, SpiffeId
from cloister.protocol import NONCE_SIZE, combined_nonce
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import TlsMaterial
from cloister.runtime.logging import get_logger
from cloister.runtime.pem import read_leaf
from cloister.runtime.trust import Trust, adopt
from cloister.secret import SecretBytes
from cloister.tlv import sha384

_FIRST_RETRY_S: Final = 0.5
_LAST_RETRY_S: Final = 30.0
# How often attest is asked for trust updates: services decide about callers; ranks and backends are many.
SERVICES_LOOK_S: Final = 10.0
OTHERS_LOOK_S: Final = 60.0
# A stack that started together must not renew together.
_JITTER: Final = secrets.SystemRandom().random

# What an enrolment fails with when attest's CA is another than the one that is known here.
_TRUST_MAY_HELP: Final = frozenset({Code.UNREACHABLE, Code.BUNDLE_STALE, Code.TLS_FAILED})

Clock = Callable[[], datetime]


def utc_now() -> datetime:
    """Return the system's time, with its zone."""
    return datetime.now(UTC)


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
        self._trust = Trust.of(bundle)
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
        self._tasks: list[asyncio.Task[None]] = []
        self._renew_now = asyncio.Event()
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
        return self._trust.bundle

    @property
    def trust(self) -> Trust:
        """What this TD trusts now."""
        return self._trust

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
            try:
                attested = await self._enrol_once(relying_party_nonce)
            except CloisterError as error:
                # Attest may have changed its CA since this TD last asked.
                if error.code not in _TRUST_MAY_HELP or not await self._trust_has_changed():
                    raise
                attested = await self._enrol_once(relying_party_nonce)
            self._attested = attested
            self._last_failure = ""
            if attested.material.is_trusted:
                self._renew_now.clear()
        self._tell()
        return attested

    def learn(self, update: bytes) -> bool:
        """Take up a trust update and say whether anything changed; raise CloisterError(BUNDLE_INVALID).

        From the next call on, callers that are not in force any more are refused, and running calls of theirs end.
        """
        trust = adopt(self._trust, update)
        if trust == self._trust:
            return False
        changed = trust.bundle.digest != self._trust.bundle.digest
        self._trust = trust
        self._transport.follow(trust.bundle)
        self._guest.hold_trust(trust.bundle.digest)
        if changed:
            get_logger().warning("another trust bundle is held", epoch=trust.bundle.epoch, sequence=trust.sequence)
        if self._attested is not None:
            material = replace(self._attested.material, bundle=trust.bundle, revoked=trust.revoked)
            self._attested = replace(self._attested, material=material)
            if not material.is_trusted:
                self._renew_now.set()
            self._tell()
        return True

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

    def start_renewal(self, jitter: Callable[[], float] = _JITTER, *, look_s: float | None = None) -> None:
        """Renew in the background from now on, at half of each certificate's life, and follow trust updates.

        `jitter` gives 0.0 to 1.0. Updates are asked for every `look_s` seconds, or at half of it.
        """
        if not self._tasks:
            usual_s = SERVICES_LOOK_S if self._guest.role.is_service else OTHERS_LOOK_S
            following = self._follow_forever(jitter, usual_s if look_s is None else look_s)
            for work, name in ((self._renew_forever(jitter), "certificate renewal"), (following, "trust updates")):
                task = asyncio.create_task(work, name=name)
                task.add_done_callback(_log_end)
                self._tasks.append(task)

    async def aclose(self) -> None:
        """Stop renewing, and end the TD's use of its platform."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._guest.close()

    async def _enrol_once(self, relying_party_nonce: bytes) -> Attested:
        guest, role = self._guest, self._guest.role
        challenge = await self._transport.challenge(attest_pb2.ChallengeRequest(role=role))
        evidence = await asyncio.to_thread(
            guest.evidence,
            nonce=combined_nonce(challenge.nonce, relying_party_nonce),
            audience=challenge.audience,
            trust_domain=self._trust.bundle.trust_domain,
        )
        response = await self._transport.attest(
            attest_pb2.AttestRequest(
                evidence=evidence,
                challenge_nonce=challenge.nonce,
                relying_party_nonce=relying_party_nonce,
                csr_der=self._csr_der,
                trust_sequence=self._trust.sequence,
            )
        )
        nonces = tuple(nonce.hex() for nonce in (challenge.nonce, relying_party_nonce) if nonce)
        return self._accepted(response, role, nonces)

    def _accepted(self, response: attest_pb2.AttestResponse, role: Role, nonces: tuple[str, ...]) -> Attested:
        """Take nothing from the answer that is not about these keys and this request."""
        if response.trust_update:
            self.learn(response.trust_update)
        bundle = self._trust.bundle
        if response.trust_bundle != bundle.to_bytes():
            raise CloisterError(
                Code.BUNDLE_INVALID,
                what="attest uses another trust bundle than this TD holds",
                why="and did not say how the one became of the other",
                todo="start this workload again with the present bundle",
            )
        material = TlsMaterial.from_pem(self._key_pem, response.certificate_chain_pem, bundle)
        material = replace(material, revoked=self._trust.revoked)
        domain = bundle.trust_domain
        try:
            result = ear.verify(
                response.attestation_result,
                keys=bundle.token_keys,
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

    async def _ask_for_trust(self) -> bool:
        """Ask for a trust update; say whether anything changed. Errors are the transport's, or `learn`'s."""
        update = await self._transport.trust_update(self._trust.sequence)
        return bool(update) and self.learn(update)

    async def _trust_has_changed(self) -> bool:
        """Ask for a trust update after something failed; raise what `learn` says of it, and no error of the way."""
        try:
            return await self._ask_for_trust()
        except CloisterError as error:
            if error.code is Code.BUNDLE_INVALID:
                raise
            return False

    async def _follow_forever(self, jitter: Callable[[], float], look_s: float) -> None:
        """Ask for trust updates; what cannot be had or believed is asked for again."""
        last_failure = ""
        while True:
            await asyncio.sleep(look_s * (0.5 + 0.5 * jitter()))
            try:
                await self._ask_for_trust()
                last_failure = ""
            except CloisterError as error:
                if str(error) != last_failure:
                    why = error.why.replace("\n", "; ")
                    get_logger().warning("no trust update can be had", error=error.code.text, what=error.what, why=why)
                last_failure = str(error)

    def _tell(self) -> None:
        for callback in tuple(self._callbacks):
            callback()

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
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._renew_now.wait(), wait_s)
                if not failures and not self._renew_now.is_set() and self._held().obtained_at != held.obtained_at:
                    continue  # somebody asked for fresh evidence meanwhile: its certificate is new as well
            self._renew_now.clear()
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
