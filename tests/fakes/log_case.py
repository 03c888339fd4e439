# SPDX-License-Identifier: Apache-2.0
"""A log with a decision and its receipt, and everything that is kept of it in files."""

from __future__ import annotations

import io
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.protocol import LeaseTerms, ReleaseBinding
from cloister.tlv import sha384
from cloister.transparency.documents import GrowthDocument, ReceiptDocument, SignedReceipt
from cloister.transparency.logfile import Leaf, write_log
from cloister.transparency.proofs import ProvenEntry
from fakes.keybroker_harness import KEY, TENANT
from fakes.log_material import BROKER, Log, an_entry

BINDING = ReleaseBinding(
    key_uri=str(KEY),
    key_version=3,
    purpose="train",
    policy_digest=sha384(b"policy"),
    evidence_digest=sha384(b"token"),
    client_nonce=b"c" * 32,
    broker_nonce=b"b" * 32,
    broker_id=str(BROKER),
    wrapped_digest=sha384(b"wrapped"),
)


class Case:
    """A log with one decision in the middle, its receipt, and keys to forge with."""

    def __init__(self) -> None:
        self.log = Log.begin(entries=3)
        self.key, self.receipt_key = self.log.begin_life()
        self.log.append(4)
        entry = an_entry(
            key_version=3,
            purpose="train",
            policy_digest=BINDING.policy_digest,
            evidence_digest=BINDING.evidence_digest,
            wrapped_digest=BINDING.wrapped_digest,
        )
        self.place = self.log.log.append(entry, time_ms=5)
        self.before = self.note()
        for number in range(6, 11):
            self.log.append(number)
        self.after = self.note()

    def note(self) -> bytes:
        tree = self.log.proofs.newest()
        return self.key.checkpoint(size=tree.size, root=tree.root)

    def message(self, binding: ReleaseBinding = BINDING, **changes: Any) -> bytes:
        place = {"log_id": self.key.log_id, "index": self.place.index, "root": self.place.root} | changes
        return binding.receipt_message(sealed=b"sealed", terms=LeaseTerms(1, 2, 3), **place)

    def receipt(self, message: bytes = b"", by: Ed25519PrivateKey | None = None) -> SignedReceipt:
        message = message or self.message()
        return SignedReceipt(message, (by or self.receipt_key).sign(message))

    def proven(self, index: int) -> ProvenEntry:
        data, proven = self.log.proofs.entry(index)
        return ProvenEntry(index, data, proven.proof)

    def document(self, **changes: Any) -> ReceiptDocument:
        fields: dict[str, Any] = {
            "log": self.key.note_key,
            "receipt": self.receipt(),
            "decision": self.proven(self.place.index),
            "start": self.proven(self.key.start_index),
            "growth": self.log.proofs.consistency(self.place.index + 1).proof,
            "checkpoint": self.after,
        }
        return ReceiptDocument(**fields | changes)

    def growth(self) -> GrowthDocument:
        old_size = self.place.index + 1
        return GrowthDocument(self.key.note_key, self.before, self.after, self.log.proofs.consistency(old_size).proof)

    def log_file(self) -> bytes:
        file = io.BytesIO()
        tree = self.log.proofs.newest()
        leaves = (Leaf(leaf.index, leaf.entry, leaf.hash) for leaf in self.log.proofs.leaves(TENANT, 0, tree.size))
        write_log(file.write, self.key.note_key, leaves, self.after)
        return file.getvalue()
