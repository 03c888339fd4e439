# SPDX-License-Identifier: Apache-2.0
"""The entry a broker begins each of its lives with: its receipt key, and that key's word for the log.

A broker makes a receipt key when it starts; its evidence (the quote) names it. The log's own key outlives restarts. So
that each leads to the other, the entry names both, and the receipt key signs that it continues this log at this size
and root: from verified evidence to the log's key, and from a checkpoint of the log to the receipt key of any life.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from cloister.merkle import HASH_SIZE
from cloister.tlv import parse_tlv, sha384, tlv
from cloister.transparency.entry import Entry, EntryInvalid, LoggedEntry
from cloister.transparency.note import NoteInvalid, NoteKey

ACTION: Final = "start"
_LABEL: Final = "cloister-log-start-v1"
_FIELDS: Final = 7
# SubjectPublicKeyInfo of Ed25519 (RFC 8410) has one form: this, then the 32 bytes of the key.
_SPKI_PREFIX: Final = bytes.fromhex("302a300506032b6570032100")


def spki_of(public: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo (DER, 44 bytes) of an Ed25519 key of 32 bytes."""
    return _SPKI_PREFIX + public


def log_id_of(key: NoteKey) -> bytes:
    """Return how receipts name the log: SHA-384 of its key's SubjectPublicKeyInfo (48 bytes)."""
    return sha384(spki_of(key.public))


@dataclass(frozen=True, slots=True)
class Start:
    """What a life of the broker begins with."""

    log: NoteKey
    broker_id: str  # SPIFFE id
    receipt_public: bytes  # 32 bytes, Ed25519
    size: int  # of the log before this entry
    root: bytes
    endorsement: bytes  # by the receipt key, 64 bytes

    @property
    def receipt_spki_der(self) -> bytes:
        return spki_of(self.receipt_public)

    @classmethod
    def make(cls, *, log: NoteKey, broker_id: str, receipt: Ed25519PrivateKey, size: int, root: bytes) -> Start:
        """Sign for a log that stands at this size and root."""
        public = receipt.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        unsigned = cls(log, broker_id, public, size, root, b"")
        return cls(log, broker_id, public, size, root, receipt.sign(unsigned._message()))

    def entry(self) -> Entry:
        """Return the entry that tells it; it belongs to no tenant, and every tenant may read it."""
        return Entry(
            action=ACTION,
            tenant="",
            key_uri="",
            caller=self.broker_id,
            granted=True,
            blocks=(),
            detail=tlv(_LABEL, *self._fields(), self.endorsement),
        )

    @classmethod
    def of(cls, logged: LoggedEntry) -> Start:
        """Return what a start entry tells, its endorsement verified; raise EntryInvalid for anything else."""
        entry = logged.entry
        try:
            name, public, broker_id, receipt, size, root, endorsement = parse_tlv(
                entry.detail, label=_LABEL, fields=_FIELDS
            )
            start = cls(
                NoteKey(name.decode(), public), broker_id.decode(), receipt, int.from_bytes(size), root, endorsement
            )
            if len(root) != HASH_SIZE or start.entry() != entry or start.size != logged.index:
                raise EntryInvalid("not the start of a broker's life")
            Ed25519PublicKey.from_public_bytes(receipt).verify(endorsement, start._message())
        except (ValueError, OverflowError, NoteInvalid):
            raise EntryInvalid("not the start of a broker's life") from None
        except InvalidSignature:
            raise EntryInvalid("the receipt key did not sign for this log") from None
        return start

    def _fields(self) -> tuple[bytes | str | int, ...]:
        return (self.log.name, self.log.public, self.broker_id, self.receipt_public, self.size, self.root)

    def _message(self) -> bytes:
        return tlv("cloister-log-endorsement-v1", *self._fields())
