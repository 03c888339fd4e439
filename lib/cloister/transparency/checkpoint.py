# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: the log's size and root, signed by the log's key (C2SP tlog-checkpoint, as a signed note).

    <origin>
    <size, decimal>
    <root, base64>

The origin is the key's name. Lines behind the third are refused: this log writes none.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.merkle import HASH_SIZE
from cloister.transparency.note import NoteInvalid, NoteKey, open_note, sign_note

MAX_SIZE: Final = 2**63 - 1  # entries; what SQLite counts


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log was at one moment."""

    origin: str
    size: int
    root: bytes  # 32 bytes

    def to_text(self) -> str:
        """Return the note's text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def sign(self, private: Ed25519PrivateKey) -> bytes:
        """Return the signed note."""
        return sign_note(self.to_text(), name=self.origin, private=private)

    @classmethod
    def open(cls, note: bytes, key: NoteKey) -> Checkpoint:
        """Return what this log's key signed; raise NoteInvalid for anything else."""
        checkpoint = cls.parse(open_note(note, key))
        if checkpoint.origin != key.name:
            raise NoteInvalid(f"a checkpoint of {checkpoint.origin}, not of {key.name}")
        return checkpoint

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """Read a note's text; raise NoteInvalid for anything that `to_text` does not write."""
        lines = text.split("\n")
        if len(lines) != 4 or not re.fullmatch(r"0|[1-9][0-9]{0,18}", lines[1], re.ASCII):
            raise NoteInvalid("a checkpoint is three lines: origin, size, root")
        try:
            checkpoint = cls(lines[0], int(lines[1]), base64.b64decode(lines[2], validate=True))
        except ValueError:
            raise NoteInvalid("the root of a checkpoint is base64") from None
        if checkpoint.to_text() != text or len(checkpoint.root) != HASH_SIZE or checkpoint.size > MAX_SIZE:
            raise NoteInvalid("a checkpoint is three lines: origin, size, root")
        return checkpoint
