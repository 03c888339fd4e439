# SPDX-License-Identifier: Apache-2.0
"""One TD from inside: measure, seal, then hold keys and prove them.

Order is the point. Keys are made after the last measurement, so a key can never be older than what the registers say;
evidence is built here from the TD's own keys, and there is no call that quotes bytes of somebody's choice.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister import hpke
from cloister.api.common.v1 import evidence_pb2
from cloister.errors import CloisterError, Code
from cloister.guest.evidence import report_data_of
from cloister.guest.measure import image_digest
from cloister.guest.provider import QuoteProvider, open_provider
from cloister.hpke import KEM_MLKEM768_X25519, HpkeKeyPair
from cloister.identity import Role
from cloister.tdx.eventlog import Event, EventLog, EventLogRejected
from cloister.tdx.workload import KEY, SEALED, TRUST_BUNDLE, KeyClaim, WorkloadPlan

_RTMR: Final = 3
_SIGNS_RECEIPTS: Final = frozenset({Role.KEYBROKER})


@dataclass(frozen=True, slots=True)
class TdKeys:
    """The keys of one TD, for the life of its process; private halves never leave its memory."""

    tls: ec.EllipticCurvePrivateKey  # P-256
    hpke: HpkeKeyPair
    receipt: ed25519.Ed25519PrivateKey

    @classmethod
    def generate(cls) -> TdKeys:
        """Make a set from the system's randomness, after HPKE's known-answer test."""
        hpke.self_test()
        return cls(
            ec.generate_private_key(ec.SECP256R1()), HpkeKeyPair.generate(), ed25519.Ed25519PrivateKey.generate()
        )

    @property
    def tls_spki_der(self) -> bytes:
        return self.tls.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def receipt_spki_der(self) -> bytes:
        return self.receipt.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class Guest:
    """This process's TD. Safe from several threads; calls to the platform block for milliseconds."""

    def __init__(self, provider: QuoteProvider) -> None:
        self._provider = provider
        # Register and log change together, and a quote is taken between two changes, not within one.
        self._lock = threading.Lock()
        self._log = self._boot_log(provider)
        self._role: Role | None = None
        self._keys: TdKeys | None = None
        self._trust_bundle = b""

    @classmethod
    def open(cls, provider_uri: str) -> Guest:
        """Open the platform that the configuration names; raise CloisterError when there is none."""
        return cls(open_provider(provider_uri, image_digest()))

    @property
    def sealed(self) -> bool:
        return self._keys is not None

    @property
    def role(self) -> Role:
        """The role it was sealed as; CloisterError before that."""
        if self._role is None:
            raise _not_sealed()
        return self._role

    @property
    def keys(self) -> TdKeys:
        """Its keys; CloisterError before it is sealed."""
        if self._keys is None:
            raise _not_sealed()
        return self._keys

    @property
    def event_log(self) -> EventLog:
        return self._log

    def measure(self, name: str, payload: bytes) -> None:
        """Record an event (names and order: cloister.tdx.workload) in RTMR3; refused once the TD is sealed."""
        with self._lock:
            if self._keys is not None:
                raise CloisterError(
                    Code.ARGUMENT_INVALID,
                    what=f"{name} cannot be measured any more",
                    why="the TD is sealed and has keys; what it is cannot change under them",
                    todo="measure before seal()",
                )
            self._extend(name, payload)

    def seal(self, role: Role) -> TdKeys:
        """End measuring, as `role`, and make the TD's keys."""
        with self._lock:
            if self._keys is not None:
                raise CloisterError(Code.ARGUMENT_INVALID, what="the TD is sealed", why="a TD is sealed once")
            self._extend(SEALED, role.encode("ascii"))
            self._role, self._keys = role, TdKeys.generate()
            return self._keys

    def hold_trust(self, digest: bytes) -> None:
        """Say in all evidence from now on which trust bundle (SHA-384, 48 bytes) is held in place of the measured one.

        A register cannot take back what it was extended with: the measured bundle is what this TD began with.
        """
        with self._lock:
            measured = next((event.payload for event in self._log.of(_RTMR) if event.name == TRUST_BUNDLE), b"")
            self._trust_bundle = b"" if digest == measured else digest

    def run_as(self, plan: WorkloadPlan) -> TdKeys:
        """Measure a whole workload, seal, and make the TD's keys.

        Raises CloisterError(ARGUMENT_INVALID) for a plan that no verifier would take, before anything is measured.
        """
        try:
            events = plan.events
        except EventLogRejected as rejected:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="this workload cannot be measured",
                why=str(rejected),
                todo="start it as its job or model says",
            ) from None
        for event in events[:-1]:
            self.measure(event.name, event.payload)
        return self.seal(plan.role)

    def evidence(self, *, nonce: bytes, audience: str, trust_domain: str) -> evidence_pb2.Evidence:
        """Return fresh evidence over the TD's own keys, for one audience and nonce (32 or 48 bytes)."""
        keys, role = self.keys, self.role
        evidence = evidence_pb2.Evidence(
            role=role,
            trust_domain=trust_domain,
            audience=audience,
            nonce=nonce,
            tls_spki_der=keys.tls_spki_der,
            hpke_kem_id=KEM_MLKEM768_X25519,
            hpke_public_key=keys.hpke.public_bytes,
            receipt_spki_der=keys.receipt_spki_der if role in _SIGNS_RECEIPTS else b"",
        )
        with self._lock:
            evidence.trust_bundle = self._trust_bundle
            evidence.quote = self._provider.quote(report_data_of(evidence))
            evidence.event_log = self._log.to_json()
        return evidence

    def record_key(self, uri: str, version: int, receipt_digest: bytes) -> None:
        """Record a key that was released to this TD: later quotes show which keys it ever held."""
        claim = KeyClaim(uri, version, receipt_digest)
        with self._lock:
            if self._keys is None:
                raise _not_sealed()
            self._extend(KEY, claim.to_payload())

    def close(self) -> None:
        """Let go of the platform; a simulated TD ends."""
        self._provider.close()

    def _extend(self, name: str, payload: bytes) -> None:
        event = Event.runtime(name, payload)
        # The log can refuse (its size is limited), the platform can too: in both cases nothing has changed here.
        log = self._log.appended(event)
        self._provider.extend(_RTMR, event.digest)
        self._log = log

    @staticmethod
    def _boot_log(provider: QuoteProvider) -> EventLog:
        try:
            log = EventLog.parse(provider.boot_log)
        except EventLogRejected as error:
            raise CloisterError(
                Code.QUOTE_PROVIDER_FAILED,
                what="the platform's boot event log cannot be read",
                why=error.reason,
                todo="use a platform of this release",
            ) from None
        if log.of(_RTMR):
            raise CloisterError(
                Code.QUOTE_PROVIDER_FAILED,
                what="RTMR3 was extended before this process started",
                why="another workload was measured into this TD",
                todo="start one workload per TD",
            )
        return log


def _not_sealed() -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID,
        what="the TD has no keys yet",
        why="keys are made when it is sealed, after the last measurement",
        todo="call seal() first",
    )
