# SPDX-License-Identifier: Apache-2.0
"""Byte strings that both ends of the protocol compute: nonces, HPKE infos, receipts, workload digests.

One function each, used by the side that makes the value and the side that checks it, so that they cannot drift
apart. docs/architecture.md, "From quote to key", says which attack each field stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from cloister.tlv import parse_tlv, sha384, tlv

NONCE_SIZE: Final = 32
# To whom attest's evidence is addressed before its CA is there. No SPIFFE id, so nobody else takes it.
RECOVERY_AUDIENCE: Final = "cloister-recovery"


def combined_nonce(challenge_nonce: bytes, relying_party_nonce: bytes) -> bytes:
    """Return the nonce for report_data: the challenge, or a digest over it and a relying party's (48 bytes)."""
    if not relying_party_nonce:
        return challenge_nonce
    return sha384(tlv("cloister-nonce-v1", challenge_nonce, relying_party_nonce))


def recovery_share_info(share_set: str, bundle_digest: bytes) -> bytes:
    """Return the HPKE info of a recovery share on its way to attest: for one set of shares, and one CA."""
    return tlv("cloister-recovery-share-v1", share_set, bundle_digest)


@dataclass(frozen=True, slots=True)
class LeaseTerms:
    """For how long a workload may hold a data key; all zero for the owner's own calls.

    The two times are one clock's, the broker's: their difference needs no other clock to be believed.
    """

    policy_version: int = 0
    decided_ms: int = 0  # Unix milliseconds
    lease_until_ms: int = 0  # Unix milliseconds


@dataclass(frozen=True, slots=True)
class ReleaseBinding:
    """What a released data key is bound to; goes into the HPKE info and into the receipt."""

    key_uri: str
    key_version: int
    purpose: str  # "train", "serve", "evaluate"; "seal", "export", "import" for the owner's own machine
    policy_digest: bytes  # 48 bytes, empty for the owner's own calls
    evidence_digest: bytes  # SHA-384 of the EAR; of the caller's certificate (DER) for the owner's own calls
    client_nonce: bytes  # 32 bytes, empty for an import
    broker_nonce: bytes  # 32 bytes, empty for the owner's own calls other than an import
    broker_id: str  # SPIFFE id
    wrapped_digest: bytes  # SHA-384 of the wrapped data key: an operator cannot swap one data key for another

    def _fields(self) -> tuple[bytes | str | int, ...]:
        return (
            self.key_uri,
            self.key_version,
            self.purpose,
            self.policy_digest,
            self.evidence_digest,
            self.client_nonce,
            self.broker_nonce,
            self.broker_id,
            self.wrapped_digest,
        )

    def hpke_info(self) -> bytes:
        """Return the info of the HPKE seal."""
        return tlv("cloister-release-v1", *self._fields())

    def receipt_message(self, *, sealed: bytes, terms: LeaseTerms, log_id: bytes, index: int, root: bytes) -> bytes:
        """Return what the broker signs: the binding, the lease, the answer's digest and the place in the log."""
        lease = (terms.policy_version, terms.decided_ms, terms.lease_until_ms)
        return tlv("cloister-receipt-v2", *self._fields(), *lease, sha384(sealed), log_id, index, root)


def import_info(*, key_uri: str, key_version: int, policy_digest: bytes, nonce: bytes) -> bytes:
    """Return the info of the HPKE seal over key material that its owner brings to the broker."""
    return tlv("cloister-prov-v1", key_uri, key_version, policy_digest, nonce)


@dataclass(frozen=True, slots=True)
class ReceiptClaims:
    """What a receipt message says, for whoever reads it later."""

    binding: ReleaseBinding
    terms: LeaseTerms
    sealed_digest: bytes  # SHA-384 of the answer
    log_id: bytes  # SHA-384 of the log's key (SubjectPublicKeyInfo, DER)
    index: int  # of the decision in the log
    root: bytes  # 32 bytes, of the log that ends with it

    @classmethod
    def parse(cls, message: bytes) -> ReceiptClaims:
        """Read what `ReleaseBinding.receipt_message` made; raise ValueError for anything else."""
        fields = parse_tlv(message, label="cloister-receipt-v2", fields=16)
        binding = ReleaseBinding(
            key_uri=fields[0].decode(),
            key_version=_number(fields[1]),
            purpose=fields[2].decode(),
            policy_digest=fields[3],
            evidence_digest=fields[4],
            client_nonce=fields[5],
            broker_nonce=fields[6],
            broker_id=fields[7].decode(),
            wrapped_digest=fields[8],
        )
        terms = LeaseTerms(*(_number(field) for field in fields[9:12]))
        return cls(binding, terms, fields[12], fields[13], _number(fields[14]), fields[15])


def _number(field: bytes) -> int:
    if len(field) != 8:
        raise ValueError("a number has 8 bytes")
    return int.from_bytes(field, "big")


@dataclass(frozen=True, slots=True)
class JobInput:
    """A sealed directory that a job reads."""

    name: str
    key_uri: str
    manifest_digest: bytes  # 48 bytes


def job_config_digest(
    *, args: Sequence[str], nodes: int, seed: int, inputs: Sequence[JobInput], output_key_uri: str
) -> bytes:
    """Return SHA-384 of what a job does apart from its script: the same on every rank (48 bytes).

    Where files lie is left out: storage is not trusted, and the manifest digests say what must lie there.
    """
    args_tlv = tlv("args", *args)
    inputs_tlv = tlv("inputs", *(tlv("input", i.name, i.key_uri, i.manifest_digest) for i in inputs))
    return sha384(tlv("cloister-job-config-v1", args_tlv, nodes, seed, inputs_tlv, output_key_uri))


def unseal_info(*, action: str, broker_id: str, nonce: bytes) -> bytes:
    """Return the info of a share or passphrase that is sealed to the broker.

    `action` is "unseal", "initialize", "rekey" (what the next root key is) or "replace" (the present root key, shown
    to let the next one take its place): what was meant for one is of no use for another. The nonce is of GetSealStatus,
    and another one each time the broker is sealed or a replacement begins: a recorded share cannot be handed in again.
    """
    return tlv("cloister-unseal-v1", action, broker_id, nonce)


def share_info(*, broker_id: str, number: int, count: int, threshold: int) -> bytes:
    """Return the info of a recovery share that is sealed to its holder; `number` is from 1."""
    return tlv("cloister-share-v1", broker_id, number, count, threshold)
