# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N802  (RPCs keep the names that the protocol gives them)
"""Waiting for recovery shares: holders look at this attest first, and then give theirs, sealed to its own key.

The certificate on this port is nobody's: what a holder checks is the evidence (code, configuration with the share set,
trust bundle, keys), over a nonce of its own. It is addressed to "cloister-recovery", which is no SPIFFE id, so it
cannot be shown to anybody else. A share is HPKE-sealed to the quoted key, and that key is of this process alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cloister.api.attest.v1 import attest_pb2, attest_pb2_grpc
from cloister.errors import CloisterError, Code
from cloister.guest.guest import Guest
from cloister.hpke import HpkeError
from cloister.identity import Role, SpiffeId
from cloister.protocol import NONCE_SIZE, RECOVERY_AUDIENCE, recovery_share_info
from cloister.recovery import ShareCollector, ShareSet
from cloister.runtime.bundle import TrustBundle
from cloister.runtime.credentials import StaticCredentials, TlsMaterial
from cloister.runtime.guard import CallerTable
from cloister.runtime.limits import Limits
from cloister.runtime.logging import get_logger
from cloister.runtime.server import GrpcServer, Mounted
from cloister.secret import SecretBytes
from cloister_attest.castate import SealedState
from cloister_attest.ratelimit import RateLimit

_SERVICE: Final = "cloister.api.attest.v1.RecoveryService"
RECOVERY_CALLERS: Final[CallerTable] = {f"/{_SERVICE}/{name}": frozenset() for name in ("GetRecovery", "GiveShare")}
_LIMITS: Final = Limits(max_concurrent_rpcs=16, max_message_bytes=1024 * 1024)
_CERTIFICATE_LIFE: Final = timedelta(days=30)  # of a certificate that proves nothing
_CALLS_PER_S, _CALLS_BURST = 2.0, 64  # of one address; a quote costs a few milliseconds
_DRAIN_S: Final = 1.0


class RecoveryServicer(attest_pb2_grpc.RecoveryServiceServicer):
    """Collects shares until there are enough."""

    def __init__(self, guest: Guest, sealed: SealedState, shares: ShareSet, rate_limit: RateLimit) -> None:
        self._guest = guest
        self._sealed = sealed
        self._collector = ShareCollector(shares)
        self._rate_limit = rate_limit
        self._info = recovery_share_info(shares.name, sealed.bundle.digest)
        self.complete = asyncio.Event()

    @property
    def key(self) -> SecretBytes:
        """The recovery key; CloisterError(SHARES_MISSING) while there are too few."""
        return self._collector.secret()

    def clear(self) -> None:
        """Forget the shares."""
        self._collector.clear()

    async def GetRecovery(self, request: attest_pb2.GetRecoveryRequest, context: Any) -> attest_pb2.GetRecoveryResponse:
        self._admit(context)
        if len(request.nonce) != NONCE_SIZE:
            raise CloisterError(Code.ARGUMENT_INVALID, what=f"a nonce has {NONCE_SIZE} bytes", todo="draw a random one")
        shares = self._collector.public
        evidence = await asyncio.to_thread(
            self._guest.evidence,
            nonce=request.nonce,
            audience=RECOVERY_AUDIENCE,
            trust_domain=self._sealed.bundle.trust_domain,
        )
        return attest_pb2.GetRecoveryResponse(
            evidence=evidence,
            share_set=shares.name,
            threshold=shares.threshold,
            count=len(shares.fingerprints),
            given=self._collector.given,
            generation=self._sealed.generation,
            sealed_unix_s=int(self._sealed.sealed_at.timestamp()),
            sealed_config=self._sealed.context.config,
            trust_bundle=self._sealed.bundle.to_bytes(),
        )

    async def GiveShare(self, request: attest_pb2.GiveShareRequest, context: Any) -> attest_pb2.GiveShareResponse:
        self._admit(context)
        try:
            share = self._guest.keys.hpke.open(request.sealed_share, info=self._info)
        except HpkeError:
            raise CloisterError(
                Code.SHARE_INVALID,
                what="this is no share that was sealed to this attest",
                why="it does not open with the key of this process, for this share set and trust bundle",
                todo="verify attest again, and seal the share to the key of its evidence",
            ) from None
        number = self._collector.add(share)
        get_logger().warning("a recovery share was given", number=number, missing=self._collector.missing)
        if not self._collector.missing:
            self.complete.set()
        return attest_pb2.GiveShareResponse(number=number, missing=self._collector.missing)

    def _admit(self, context: Any) -> None:
        self._rate_limit.spend(context.peer().rpartition(":")[0])


async def recover(
    guest: Guest,
    sealed: SealedState,
    shares: ShareSet,
    *,
    listen: str,
    stop: asyncio.Event,
    clock_s: Callable[[], float],
    told: Callable[[str], None],
) -> SecretBytes:
    """Serve on `listen` until enough shares were given; return the key, or raise INTERRUPTED on `stop`.

    `told` gets the endpoint when it can be reached.
    """
    rate_limit = RateLimit(per_s=_CALLS_PER_S, burst=_CALLS_BURST, clock_s=clock_s)
    servicer = RecoveryServicer(guest, sealed, shares, rate_limit)
    server = GrpcServer(
        section=listen,
        credentials=StaticCredentials(_nobodys(guest, sealed.bundle)),
        services=[Mounted(_SERVICE, attest_pb2_grpc.add_RecoveryServiceServicer_to_server, servicer)],
        callers=RECOVERY_CALLERS,
        limits=_LIMITS,
        reflection=False,
        anonymous=True,
    )
    stopped = asyncio.ensure_future(stop.wait())
    complete = asyncio.ensure_future(servicer.complete.wait())
    try:
        await server.start(serving=False)
        told(server.endpoint)
        get_logger().warning(
            "the CA is sealed: waiting for recovery shares",
            endpoint=server.endpoint,
            share_set=shares.name,
            threshold=shares.threshold,
            generation=sealed.generation,
        )
        await asyncio.wait({stopped, complete}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopped, complete):
            task.cancel()
        # The answer to the last holder goes out before the port closes.
        await server.drain(_DRAIN_S)
    if not servicer.complete.is_set():
        raise CloisterError(Code.INTERRUPTED, what="attest was stopped while its CA was sealed")
    key = servicer.key
    servicer.clear()
    return key


def _nobodys(guest: Guest, bundle: TrustBundle) -> TlsMaterial:
    """Return a certificate that the TD gives itself, so that TLS has something to show."""
    key, now = guest.keys.tls, datetime.now(UTC)
    who = SpiffeId.service(bundle.trust_domain, Role.ATTEST)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "attest, before its CA")])
    leaf = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _CERTIFICATE_LIFE)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(who.dns_name)]), critical=False)
        .sign(key, SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return TlsMaterial(SecretBytes(pem), leaf.public_bytes(Encoding.PEM), bundle, who, leaf.not_valid_after_utc)
