# SPDX-License-Identifier: Apache-2.0
"""Segments of the stream: sizes, keys, nonces. Byte-compatible with Tink's AES-GCM-HKDF streaming AEAD.

Source: https://developers.google.com/tink/streaming-aead/aes_gcm_hkdf_streaming
    stream header = 40 | salt (32 bytes) | nonce prefix (7 bytes)
    K             = HKDF-SHA256(DEK, salt = salt, info = associated data), 32 bytes
    segment i     = AES-256-GCM(K, nonce = prefix | i as u32 | 1 if last else 0, no associated data), tag behind it
Every segment fills `segment_size` bytes of ciphertext except the last; the first shares its room with the header.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.secret import SecretBytes

TAG_SIZE: Final = 16
SALT_SIZE: Final = 32
NONCE_PREFIX_SIZE: Final = 7
STREAM_HEADER_SIZE: Final = 1 + SALT_SIZE + NONCE_PREFIX_SIZE
MAX_SEGMENTS: Final = 2**32


class SegmentRejected(Exception):
    """A segment does not authenticate: changed, moved, of another stream, or under another key."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where plaintext lies in a stream of one segment size. All sizes and offsets in bytes."""

    segment_size: int

    @property
    def first_capacity(self) -> int:
        """Plaintext bytes of the first segment."""
        return self.segment_size - STREAM_HEADER_SIZE - TAG_SIZE

    @property
    def capacity(self) -> int:
        """Plaintext bytes of every further segment."""
        return self.segment_size - TAG_SIZE

    def capacity_of(self, index: int) -> int:
        return self.capacity if index else self.first_capacity

    def segments(self, stream_length: int) -> int:
        """Return how many segments a stream has; raise ValueError for a length that no writer makes."""
        count = -(-stream_length // self.segment_size)
        last = stream_length - (count - 1) * self.segment_size
        # The last of several segments is never empty; a lone one may be.
        shortest = STREAM_HEADER_SIZE + TAG_SIZE if count == 1 else TAG_SIZE + 1
        if count < 1 or last < shortest or count > MAX_SEGMENTS:
            raise ValueError("no stream has this length")
        return count

    def plaintext_length(self, stream_length: int) -> int:
        """Return the plaintext's length; raise ValueError for a length that no writer makes."""
        return stream_length - STREAM_HEADER_SIZE - TAG_SIZE * self.segments(stream_length)

    def stream_length(self, plaintext_length: int) -> int:
        """Return the length of the stream, its 40-byte header included."""
        rest = max(0, plaintext_length - self.first_capacity)
        return plaintext_length + STREAM_HEADER_SIZE + TAG_SIZE * (1 + -(-rest // self.capacity))

    def place_of(self, offset: int) -> tuple[int, int]:
        """Return the segment that a plaintext offset lies in, and where in it."""
        if offset < self.first_capacity:
            return 0, offset
        index, within = divmod(offset - self.first_capacity, self.capacity)
        return index + 1, within

    def offset_of(self, index: int) -> int:
        """Return where a segment's plaintext starts in the whole plaintext."""
        return self.first_capacity + (index - 1) * self.capacity if index else 0

    def start_of(self, index: int) -> int:
        """Return where a segment's ciphertext starts in the stream."""
        return index * self.segment_size if index else STREAM_HEADER_SIZE


class StreamCipher:
    """Seal and open single segments of one stream. Safe for several threads."""

    __slots__ = ("_aead", "_prefix")

    def __init__(self, secret: SecretBytes, *, stream_header: bytes, binding: bytes) -> None:
        if len(stream_header) != STREAM_HEADER_SIZE or stream_header[0] != STREAM_HEADER_SIZE:
            raise ValueError("not a stream header")
        salt = stream_header[1 : 1 + SALT_SIZE]
        self._prefix = stream_header[1 + SALT_SIZE :]
        self._aead = AESGCM(HKDF(SHA256(), length=32, salt=salt, info=binding).derive(secret.reveal()))

    def _nonce(self, index: int, *, last: bool) -> bytes:
        return self._prefix + index.to_bytes(4, "big") + (b"\1" if last else b"\0")

    def seal(self, index: int, plain: memoryview, out: memoryview, *, last: bool) -> None:
        """Encrypt into `out`, which has 16 bytes more than `plain`."""
        self._aead.encrypt_into(self._nonce(index, last=last), plain, None, out)

    def open(self, index: int, sealed: memoryview, out: memoryview, *, last: bool) -> None:
        """Decrypt into `out`, which has 16 bytes less than `sealed`; raise SegmentRejected and leave `out` zero."""
        try:
            self._aead.decrypt_into(self._nonce(index, last=last), sealed, None, out)
        except InvalidTag:
            # The library decrypts before it compares the tag: what it left there is not authentic.
            out[:] = bytes(len(out))
            raise SegmentRejected from None
