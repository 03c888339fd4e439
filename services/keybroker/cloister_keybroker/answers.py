# SPDX-License-Identifier: Apache-2.0
"""Answers that carry a data key: sealed to one HPKE key, with a signed receipt of the logged decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister import hpke
from cloister.errors import CloisterError, Code
from cloister.protocol import NONCE_SIZE, LeaseTerms, ReleaseBinding
from cloister.secret import SecretBytes
from cloister_keybroker.log import LogPlace

MAX_WRAPPED_SIZE: Final = 4096  # bytes; ours are 61, back ends in front of other stores may need more

_NO_LEASE: Final = LeaseTerms()  # the owner's own calls


@dataclass(frozen=True, slots=True)
class Recipient:
    """The HPKE key an answer is sealed to, and the nonce that ties it to the question."""

    client_nonce: bytes  # 32 bytes
    kem_id: int
    public_key: bytes

    def check(self) -> None:
        """Raise ARGUMENT_INVALID unless an answer could be sealed to this key."""
        if len(self.client_nonce) != NONCE_SIZE:
            raise argument_error("client_nonce", f"{len(self.client_nonce)} bytes", f"{NONCE_SIZE} random bytes")
        if self.kem_id != hpke.KEM_MLKEM768_X25519:
            raise argument_error("hpke_kem_id", f"{self.kem_id:#x}", f"{hpke.KEM_MLKEM768_X25519:#x}")
        if len(self.public_key) != hpke.PUBLIC_KEY_SIZE:
            raise argument_error("hpke_public_key", f"{len(self.public_key)} bytes", f"{hpke.PUBLIC_KEY_SIZE} bytes")

    def seal(self, secret: SecretBytes, binding: ReleaseBinding) -> bytes:
        """Return the data key for this recipient only; raise ARGUMENT_INVALID when the public key is unusable."""
        try:
            return hpke.seal(self.public_key, secret, info=binding.hpke_info())
        except hpke.HpkeError:
            raise argument_error("hpke_public_key", "no key of this KEM", "the key that the TD made") from None


@dataclass(frozen=True, slots=True)
class Receipt:
    """A signed statement that a decision stands in the log."""

    signature: bytes
    log_id: bytes
    place: LogPlace
    receipt_spki_der: bytes


@dataclass(frozen=True, slots=True)
class DataKeyAnswer:
    """A data key on its way."""

    sealed: bytes
    wrapped: bytes
    binding: ReleaseBinding
    receipt: Receipt


class ReceiptSigner:
    """Sign with the receipt key of this broker process: the one in its evidence."""

    def __init__(self, key: Ed25519PrivateKey, *, log_id: bytes) -> None:
        self._key = key
        self._spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self._log_id = log_id

    def sign(
        self, binding: ReleaseBinding, *, sealed: bytes, place: LogPlace, terms: LeaseTerms = _NO_LEASE
    ) -> Receipt:
        """Return the receipt of an answer; only for a decision that is durable in the log."""
        message = binding.receipt_message(
            sealed=sealed, terms=terms, log_id=self._log_id, index=place.index, root=place.root
        )
        return Receipt(self._key.sign(message), self._log_id, place, self._spki)


def check_wrapped(wrapped: bytes) -> None:
    """Raise ARGUMENT_INVALID for a wrapped key that no back end made."""
    if not 0 < len(wrapped) <= MAX_WRAPPED_SIZE:
        raise argument_error(
            "wrapped", f"{len(wrapped)} bytes", f"1 to {MAX_WRAPPED_SIZE} bytes from a sealed object's header"
        )


def argument_error(name: str, got: str, wanted: str) -> CloisterError:
    """Say which field of a request cannot be right."""
    return CloisterError(
        Code.ARGUMENT_INVALID, what=f"{name} is not allowed", why=f"got {got}", todo=f"{name} has to be {wanted}"
    )


def key_not_found(uri: str) -> CloisterError:
    """Say that there is no such key for this caller: absent and foreign keys give the very same error."""
    return CloisterError(
        Code.KEY_NOT_FOUND,
        what=f"there is no key {uri} for you",
        why="no key of this name exists in your tenant",
        todo="check the name with: cloister key list",
    )
