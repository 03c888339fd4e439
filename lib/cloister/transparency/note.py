# SPDX-License-Identifier: Apache-2.0
"""Signed notes (C2SP signed-note, v1): a text that ends in a newline, an empty line, then one signature a line.

    — <key name> base64(key id, 4 bytes || Ed25519 signature over the text)

Only Ed25519 keys (signature type 0x01). Signatures by other keys are passed over, so that witnesses may add theirs; one
that claims to be by the given key and does not verify makes the whole note invalid.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

MAX_NOTE: Final = 64 * 1024  # bytes: room for a hundred witnesses
_MAX_SIGNATURES: Final = 100
_ED25519: Final = b"\x01"
_ID_SIZE: Final = 4
_PREFIX: Final = "\N{EM DASH} "


class NoteInvalid(Exception):
    """Text that is not a note, a key that is not one, or a note that the key did not sign."""


@dataclass(frozen=True, slots=True)
class NoteKey:
    """A public key with the name it signs under."""

    name: str  # no spaces, no plus sign
    public: bytes  # 32 bytes

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= 255 or not self.name.isprintable() or " " in self.name or "+" in self.name:
            raise NoteInvalid("a key name is text without spaces and plus signs")
        if len(self.public) != 32:
            raise NoteInvalid("an Ed25519 key has 32 bytes")

    @property
    def id(self) -> bytes:
        """Four bytes of a hash: tell keys of one name apart, prove nothing."""
        return hashlib.sha256(self.name.encode() + b"\n" + _ED25519 + self.public).digest()[:_ID_SIZE]

    def __str__(self) -> str:
        """Return the one-line form that people pass around: name+id+key."""
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(_ED25519 + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> NoteKey:
        """Read the one-line form; raise NoteInvalid for anything else."""
        name, _, rest = text.strip().partition("+")
        key_id, _, encoded = rest.partition("+")
        data = _unbase64(encoded)
        if data[:1] != _ED25519:
            raise NoteInvalid("not a key of the form name+id+key, or not an Ed25519 key")
        key = cls(name, data[1:])
        if key.id.hex() != key_id:
            raise NoteInvalid("the key's id does not belong to its name and bytes")
        return key

    @classmethod
    def of(cls, name: str, private: Ed25519PrivateKey) -> NoteKey:
        return cls(name, private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))


def sign_note(text: str, *, name: str, private: Ed25519PrivateKey) -> bytes:
    """Return the text with one signature under it; raise NoteInvalid for a text that cannot be signed."""
    if not text.endswith("\n") or _controls(text):
        raise NoteInvalid("a note's text ends in a newline and has no control characters")
    signature = NoteKey.of(name, private).id + private.sign(text.encode())
    return f"{text}\n{_PREFIX}{name} {base64.b64encode(signature).decode()}\n".encode()


def open_note(data: bytes, key: NoteKey) -> str:
    """Return the text of a note that this key signed; raise NoteInvalid for anything else."""
    if len(data) > MAX_NOTE:
        raise NoteInvalid(f"a note of more than {MAX_NOTE} bytes")
    try:
        note = data.decode()
    except UnicodeDecodeError:
        raise NoteInvalid("not UTF-8") from None
    if _controls(note) or not note.endswith("\n"):
        raise NoteInvalid("a note has whole lines and no control characters")
    text, separator, signatures = note.rpartition("\n\n")
    lines = signatures.removesuffix("\n").split("\n")
    if not separator or len(lines) > _MAX_SIGNATURES:
        raise NoteInvalid("a note is text, an empty line, and up to a hundred signatures")
    text += "\n"
    verified = False
    for line in lines:
        name, signature = _signature(line)
        if name == key.name and hmac.compare_digest(signature[:_ID_SIZE], key.id):
            try:
                Ed25519PublicKey.from_public_bytes(key.public).verify(signature[_ID_SIZE:], text.encode())
            except (InvalidSignature, ValueError):
                raise NoteInvalid(f"the signature of {key.name} does not verify") from None
            verified = True
    if not verified:
        raise NoteInvalid(f"not signed by {key.name} ({key.id.hex()})")
    return text


def _signature(line: str) -> tuple[str, bytes]:
    name, _, encoded = line.removeprefix(_PREFIX).partition(" ")
    signature = _unbase64(encoded)
    if not line.startswith(_PREFIX) or not name or "+" in name or len(signature) <= _ID_SIZE:
        raise NoteInvalid("a line behind the text is no signature")
    return name, signature


def _controls(text: str) -> bool:
    return any(c < " " and c != "\n" for c in text)


def _unbase64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise NoteInvalid("not base64") from None
    if base64.b64encode(data).decode() != text:
        raise NoteInvalid("not canonical base64")
    return data
