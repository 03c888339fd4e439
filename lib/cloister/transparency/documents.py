# SPDX-License-Identifier: Apache-2.0
"""Files that prove something about the log to whoever has the log's key: JSON, whole in themselves, checked offline.

`cloister-receipt/v1`  a receipt of one decision, with the entry, and with what makes its key and its place believable
`cloister-growth/v1`   two checkpoints, and the proof that the newer log continues the older one
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister.errors import CloisterError, Code
from cloister.merkle import HASH_SIZE
from cloister.protocol import ReceiptClaims, ReleaseBinding
from cloister.strictjson import Members, StrictJsonError, dump, load
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.entry import Entry, LoggedEntry
from cloister.transparency.note import MAX_NOTE, NoteInvalid, NoteKey
from cloister.transparency.proofs import ProvenEntry, check_continues, check_entry, check_start, open_checkpoint
from cloister.transparency.start import Start, log_id_of

RECEIPT_FORMAT: Final = "cloister-receipt/v1"
GROWTH_FORMAT: Final = "cloister-growth/v1"
MAX_DOCUMENT: Final = 1024 * 1024  # bytes; an entry has some thousands
_MAX_PROOF: Final = 130


@dataclass(frozen=True, slots=True)
class SignedReceipt:
    """A receipt as the broker signed it."""

    message: bytes  # TLV "cloister-receipt-v2"
    signature: bytes


@dataclass(frozen=True, slots=True)
class CheckedReceipt:
    """What a receipt proves: this broker decided this, and it stands in the log."""

    claims: ReceiptClaims
    logged: LoggedEntry
    start: Start
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class ReceiptDocument:
    """A receipt with everything its verification takes, except the log's key."""

    log: NoteKey  # a hint for who looks for the key: never trusted
    receipt: SignedReceipt
    decision: ProvenEntry
    start: ProvenEntry
    growth: tuple[bytes, ...]  # from the receipt's root to the checkpoint's
    checkpoint: bytes

    def check(self, key: NoteKey) -> CheckedReceipt:
        """Verify it under the log's key; raise CloisterError(LOG_INVALID).

        1. the checkpoint is the log's  2. the receipt's key began a life of the broker in this log, and endorses it
        3. the receipt is signed by that key and names this log  4. the decision stands in the log, behind that start
        5. the root of the receipt is the log's as it was then  6. decision and receipt say the same
        """
        checkpoint = open_checkpoint(self.checkpoint, key)
        start = check_start(self.start, checkpoint, key)
        try:
            public = Ed25519PublicKey.from_public_bytes(start.receipt_public)
            public.verify(self.receipt.signature, self.receipt.message)
            claims = ReceiptClaims.parse(self.receipt.message)
        except (InvalidSignature, ValueError) as error:
            raise _invalid("the receipt", str(error) or "its signature does not verify") from None
        if claims.log_id != log_id_of(key):
            raise _invalid("the receipt", "it is about another log")
        logged = check_entry(self.decision, checkpoint)
        if not self.start.index < logged.index == claims.index:
            raise _invalid("the receipt", "it is about another entry, or one from before its key's life")
        try:
            check_continues(Checkpoint(key.name, claims.index + 1, claims.root), checkpoint, self.growth)
        except CloisterError as error:
            raise _invalid("the receipt", f"its root is not the log's: {error.why}") from None
        if not _agree(claims.binding, logged.entry):
            raise _invalid("the receipt", "the entry at its place is about something else")
        return CheckedReceipt(claims, logged, start, checkpoint)

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return _file(
            {
                "format": RECEIPT_FORMAT,
                "log": str(self.log),
                "message": self.receipt.message.hex(),
                "signature": self.receipt.signature.hex(),
                "decision": _entry_object(self.decision),
                "start": _entry_object(self.start),
                "growth": [node.hex() for node in self.growth],
                "checkpoint": self.checkpoint.decode(),
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> ReceiptDocument:
        """Read a file's content; raise CloisterError(LOG_INVALID) for anything that is not one."""
        try:
            members = _members(data, RECEIPT_FORMAT)
            document = cls(
                log=NoteKey.parse(members.text("log")),
                receipt=SignedReceipt(_octets(members, "message"), _octets(members, "signature")),
                decision=_entry(members, "decision"),
                start=_entry(members, "start"),
                growth=_proof(members, "growth"),
                checkpoint=members.text("checkpoint", longest=MAX_NOTE).encode(),
            )
            members.end()
        except (StrictJsonError, NoteInvalid) as error:
            raise _invalid("the receipt file", str(error)) from None
        return document


@dataclass(frozen=True, slots=True)
class GrowthDocument:
    """Two checkpoints of one log and the proof that it only grew between them."""

    log: NoteKey  # a hint: never trusted
    old: bytes
    new: bytes
    proof: tuple[bytes, ...]

    def check(self, key: NoteKey) -> tuple[Checkpoint, Checkpoint]:
        """Verify it under the log's key; raise CloisterError: LOG_INVALID, or LOG_CONTRADICTED."""
        old, new = open_checkpoint(self.old, key), open_checkpoint(self.new, key)
        check_continues(old, new, self.proof)
        return old, new

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        return _file(
            {
                "format": GROWTH_FORMAT,
                "log": str(self.log),
                "old": self.old.decode(),
                "new": self.new.decode(),
                "proof": [node.hex() for node in self.proof],
            }
        )

    @classmethod
    def parse(cls, data: bytes) -> GrowthDocument:
        """Read a file's content; raise CloisterError(LOG_INVALID) for anything that is not one."""
        try:
            members = _members(data, GROWTH_FORMAT)
            document = cls(
                log=NoteKey.parse(members.text("log")),
                old=members.text("old", longest=MAX_NOTE).encode(),
                new=members.text("new", longest=MAX_NOTE).encode(),
                proof=_proof(members, "proof"),
            )
            members.end()
        except (StrictJsonError, NoteInvalid) as error:
            raise _invalid("the proof file", str(error)) from None
        return document


def _agree(binding: ReleaseBinding, entry: Entry) -> bool:
    """Say whether an entry is about what a receipt is about; it leaves out what its action has no use for."""
    digests = (
        (entry.policy_digest, binding.policy_digest),
        (entry.evidence_digest, binding.evidence_digest),
        (entry.wrapped_digest, binding.wrapped_digest),
    )
    return (
        entry.granted
        and (entry.key_uri, entry.key_version) == (binding.key_uri, binding.key_version)
        and entry.purpose in ("", binding.purpose)
        and all(not logged or not bound or hmac.compare_digest(logged, bound) for logged, bound in digests)
    )


def format_of(data: bytes) -> str:
    """Return what a JSON document says it is, or nothing: only to choose the reader."""
    try:
        return Members(load(data, max_size=MAX_DOCUMENT), "document").text("format", longest=64)
    except StrictJsonError:
        return ""


def _members(data: bytes, wanted: str) -> Members:
    members = Members(load(data, max_size=MAX_DOCUMENT), "document")
    if members.text("format") != wanted:
        raise StrictJsonError(f"not a {wanted} document")
    return members


def _entry_object(entry: ProvenEntry) -> dict[str, Any]:
    return {"index": entry.index, "entry": entry.data.hex(), "proof": [node.hex() for node in entry.proof]}


def _entry(members: Members, name: str) -> ProvenEntry:
    inner = members.inner(name)
    entry = ProvenEntry(inner.integer("index"), _octets(inner, "entry"), _proof(inner, "proof"))
    inner.end()
    return entry


def _octets(members: Members, name: str) -> bytes:
    text = members.text(name, longest=MAX_DOCUMENT)
    return _unhex(text, name)


def _proof(members: Members, name: str) -> tuple[bytes, ...]:
    return tuple(_unhex(text, name) for text in members.texts(name, most=_MAX_PROOF, longest=2 * HASH_SIZE))


def _unhex(text: str, name: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        data = b""
    if data.hex() != text:
        raise StrictJsonError(f"{name} is not lower-case hexadecimal")
    return data


def _file(document: dict[str, Any]) -> bytes:
    return dump(document) + b"\n"


def _invalid(what: str, why: str) -> CloisterError:
    return CloisterError(
        Code.LOG_INVALID,
        what=f"{what} does not verify",
        why=why,
        todo="compare it with another copy; the broker's log shows what was decided: cloister audit tail",
    )
