# SPDX-License-Identifier: Apache-2.0
"""The self-describing header in front of the encrypted stream: bytes <-> values, and what it binds.

    file       = "CLOISTER" | version u16 | length u32 | body | stream
    body       = TLV("cloister-header-v1", binding, commitment, key version, wrapped DEK, padding)
    binding    = TLV("cloister-sealed-v1", key URI, dataset, path, schema version, file id, segment size)
    commitment = HMAC-SHA256(DEK, TLV("cloister-commit-v1", binding))

The binding is the associated data of the stream, so nothing in it can change after sealing. Key version and wrapped
DEK stand outside of it: a re-wrap under a newer key version replaces them and leaves the stream alone. The broker
authenticates the wrapped DEK when it opens it; the commitment then says whether it is the DEK of this file.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, field, replace
from typing import BinaryIO, Final

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.sealed.datakey import MAX_KEY_VERSION, MAX_WRAPPED_SIZE, DataKey
from cloister.secret import SecretBytes
from cloister.tlv import parse_tlv, tlv

MAGIC: Final = b"CLOISTER"
FORMAT_VERSION: Final = 1
PREFIX_SIZE: Final = 14  # magic, version, length

DATA_SEGMENT_SIZE: Final = 64 * 1024  # random reads decrypt one segment: small for data
MODEL_SEGMENT_SIZE: Final = 1024 * 1024  # models and checkpoints are read from end to end
MIN_SEGMENT_SIZE: Final = 64  # the first segment holds 40 bytes of stream header and a tag of 16
MAX_SEGMENT_SIZE: Final = 16 * 1024 * 1024  # what a reader must be ready to hold

FILE_ID_SIZE: Final = 16
COMMITMENT_SIZE: Final = 32
MAX_HEADER_SIZE: Final = 16 * 1024
MAX_PATH_SIZE: Final = 1024  # bytes of UTF-8
MAX_PATH_SEGMENT_SIZE: Final = 240  # file systems take 255, of which the suffix needs 7
MAX_DATASET_SIZE: Final = 255
# The header ends on a multiple of this, so that most re-wraps fit in place.
_ALIGNMENT: Final = 512
_SPARE: Final = 128
_MAX_NUMBER: Final = 2**32 - 1

SUFFIX: Final = ".sealed"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def invalid(name: str, why: str) -> CloisterError:
    """Return the one error of this format; `name` is the file as the caller knows it."""
    return CloisterError(
        Code.SEALED_FILE_INVALID,
        what=f"{name} is not a valid sealed file",
        why=why,
        todo="fetch the file again from where it was sealed, or seal it anew; do not use what was read from it",
    )


def check_path(path: str) -> None:
    """Raise ValueError unless this is a relative path that stays below its directory on every platform."""
    segments = path.split("/")
    if not path or _size(path) > MAX_PATH_SIZE or path.startswith("/"):
        raise ValueError(f"a path is relative and has 1 to {MAX_PATH_SIZE} bytes")
    for segment in segments:
        if segment in {"", ".", ".."} or "\\" in segment or _CONTROL.search(segment):
            raise ValueError("a path has no empty, '.' or '..' part, no backslash and no control character")
        if _size(segment) > MAX_PATH_SEGMENT_SIZE:
            raise ValueError(f"a part of a path has at most {MAX_PATH_SEGMENT_SIZE} bytes")
        if segment.endswith(SUFFIX):
            raise ValueError(f"no part of a path ends in {SUFFIX}: what is sealed is not sealed again")


def _size(text: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise ValueError("a name is not valid UTF-8") from None


def check_dataset(name: str) -> None:
    """Raise ValueError unless this may name a dataset: 1 to 255 bytes, no control characters."""
    if not 0 < _size(name) <= MAX_DATASET_SIZE or _CONTROL.search(name):
        raise ValueError(f"a dataset's name has 1 to {MAX_DATASET_SIZE} bytes and no control characters")


@dataclass(frozen=True, slots=True)
class AssociatedData:
    """What a sealed file is: bound to its content, readable without a key."""

    dataset: str
    path: str  # relative, '/' between parts
    schema_version: int = 1
    file_id: bytes = field(default_factory=lambda: secrets.token_bytes(FILE_ID_SIZE))

    def __post_init__(self) -> None:
        """Raise ValueError for what cannot be in a header."""
        check_dataset(self.dataset)
        check_path(self.path)
        if len(self.file_id) != FILE_ID_SIZE or not 0 < self.schema_version <= _MAX_NUMBER:
            raise ValueError(f"a file id has {FILE_ID_SIZE} bytes, and schema versions count from 1")


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: claims, until `verify` and the stream have been checked with the key."""

    key_uri: str
    associated: AssociatedData
    segment_size: int  # bytes of ciphertext, tag included
    commitment: bytes  # 32 bytes
    key_version: int
    wrapped: bytes
    padding: int = 0  # zero bytes at the end

    @classmethod
    def make(cls, data_key: DataKey, associated: AssociatedData, *, segment_size: int) -> Header:
        """Return the header of a new file; raise ValueError for a segment size out of bounds."""
        if not MIN_SEGMENT_SIZE <= segment_size <= MAX_SEGMENT_SIZE:
            raise ValueError(f"a segment has {MIN_SEGMENT_SIZE} to {MAX_SEGMENT_SIZE} bytes")
        header = cls(data_key.key_uri, associated, segment_size, b"", data_key.key_version, data_key.wrapped)
        header = replace(header, commitment=header._committed(data_key.secret))
        return header.padded()

    def padded(self) -> Header:
        """Return the header with room for another wrapped DEK, ending on a multiple of 512 bytes."""
        spare = _SPARE + -(len(replace(self, padding=0).to_bytes()) + _SPARE) % _ALIGNMENT
        return replace(self, padding=spare)

    @property
    def binding(self) -> bytes:
        """The associated data of the stream: what a stock Tink reader passes as `associated_data`."""
        bound = self.associated
        return tlv(
            "cloister-sealed-v1",
            self.key_uri,
            bound.dataset,
            bound.path,
            bound.schema_version,
            bound.file_id,
            self.segment_size,
        )

    @property
    def size(self) -> int:
        """Bytes before the stream."""
        return len(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Encode; `parse` gives the same value back."""
        body = tlv(
            "cloister-header-v1",
            self.binding,
            self.commitment,
            self.key_version,
            self.wrapped,
            bytes(self.padding),
        )
        return MAGIC + FORMAT_VERSION.to_bytes(2, "big") + len(body).to_bytes(4, "big") + body

    def rewrapped(self, key_version: int, wrapped: bytes) -> Header | None:
        """Return the header with another wrapped DEK and of the same size, or None when that does not fit."""
        bare = replace(self, key_version=key_version, wrapped=wrapped, padding=0)
        room = self.size - bare.size
        return replace(bare, padding=room) if room >= 0 else None

    def verify(self, secret: SecretBytes, *, name: str) -> None:
        """Refuse a key that is not the one this file was sealed under, before anything is decrypted with it."""
        if not hmac.compare_digest(self._committed(secret), self.commitment):
            raise invalid(name, "its header was changed, or the key is not the one it was sealed under")

    def _committed(self, secret: SecretBytes) -> bytes:
        return hmac.digest(secret.reveal(), tlv("cloister-commit-v1", self.binding), hashlib.sha256)

    @classmethod
    def read(cls, file: BinaryIO, *, name: str = "") -> Header:
        """Read and parse the header at the file's position and leave the position behind it; no key is needed.

        Raises CloisterError(SEALED_FILE_INVALID) that names the file.
        """
        name = name or str(getattr(file, "name", "the file"))
        prefix = read_exactly(file, PREFIX_SIZE, name=name)
        if prefix[:8] != MAGIC:
            raise invalid(name, "it does not begin like a sealed file")
        version, length = int.from_bytes(prefix[8:10], "big"), int.from_bytes(prefix[10:14], "big")
        if version != FORMAT_VERSION:
            raise invalid(name, f"it is of format version {version}, and this release reads version {FORMAT_VERSION}")
        if length > MAX_HEADER_SIZE:
            raise invalid(name, f"its header claims {length} bytes; at most {MAX_HEADER_SIZE} are allowed")
        return cls._parse(read_exactly(file, length, name=name), name=name)

    @classmethod
    def recover(cls, file: BinaryIO, *, key_version: int, wrapped: bytes, name: str = "") -> Header:
        """Read a header whose re-wrap was interrupted by a loss of power, for the wrapped DEK that was being put in.

        Only what stands behind the commitment was being written; all before it is as it was. Needs no key; raises
        CloisterError(SEALED_FILE_INVALID) when more than that is damaged.
        """
        name = name or str(getattr(file, "name", "the file"))
        prefix = read_exactly(file, PREFIX_SIZE, name=name)
        length = int.from_bytes(prefix[10:14], "big")
        if prefix[:8] != MAGIC or int.from_bytes(prefix[8:10], "big") != FORMAT_VERSION or length > MAX_HEADER_SIZE:
            raise invalid(name, "it does not begin like a sealed file")
        body = read_exactly(file, length, name=name)
        fields, at = [], 0
        for _ in range(3):  # label, binding, commitment
            size = int.from_bytes(body[at : at + 4], "big")
            fields.append(body[at + 4 : at + 4 + size])
            at += 4 + size
        rest = b"".join(len(part).to_bytes(4, "big") + part for part in (key_version.to_bytes(8, "big"), wrapped))
        padding = length - at - len(rest) - 4
        if padding < 0:
            raise invalid(name, "its header is damaged: another wrapped key does not fit into it")
        return cls._parse(body[:at] + rest + padding.to_bytes(4, "big") + bytes(padding), name=name)

    @classmethod
    def _parse(cls, body: bytes, *, name: str) -> Header:
        try:
            binding, commitment, key_version, wrapped, padding = parse_tlv(body, label="cloister-header-v1", fields=5)
            key_uri, dataset, path, schema, file_id, segment = parse_tlv(binding, label="cloister-sealed-v1", fields=6)
            KeyUri.parse(key_uri.decode())
            header = cls(
                key_uri=key_uri.decode(),
                associated=AssociatedData(dataset.decode(), path.decode(), _number(schema), file_id),
                segment_size=_number(segment),
                commitment=commitment,
                key_version=_number(key_version),
                wrapped=wrapped,
                padding=len(padding),
            )
        except (ValueError, CloisterError) as error:
            why = error.what if isinstance(error, CloisterError) else str(error)
            raise invalid(name, f"its header is damaged: {why}") from None
        fits = (
            len(commitment) == COMMITMENT_SIZE
            and MIN_SEGMENT_SIZE <= header.segment_size <= MAX_SEGMENT_SIZE
            and 0 < header.key_version <= MAX_KEY_VERSION
            and 0 < len(wrapped) <= MAX_WRAPPED_SIZE
            and not any(padding)
        )
        if not fits:
            raise invalid(name, "its header is damaged: a field is out of bounds")
        return header


def _number(value: bytes) -> int:
    if len(value) != 8:
        raise ValueError("a number has 8 bytes")
    return int.from_bytes(value, "big")


def read_exactly(file: BinaryIO, size: int, *, name: str) -> bytes:
    """Read so many bytes at the file's position; a file that ends before is refused as cut."""
    parts = bytearray()
    while len(parts) < size:
        part = file.read(size - len(parts))
        if not part:
            raise invalid(name, "it is cut: it ends inside its header")
        parts += part
    return bytes(parts)
