# SPDX-License-Identifier: Apache-2.0
"""Keys and contents for tests of sealed files, and Tink's own implementation of the stream as the oracle."""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path
from typing import BinaryIO

from cloister.sealed.datakey import DataKey
from cloister.sealed.format import AssociatedData
from cloister.sealed.stream import SealedReader, SealedWriter
from cloister.secret import SecretBytes

KEY_URI = "cloister-key://hospital-a/datasets/reviews"
ROOT = Path(__file__).resolve().parents[2]


def data_key(name: str = "one", *, uri: str = KEY_URI) -> DataKey:
    """Return the data key of this name: always the same one."""
    secret = hashlib.sha256(b"data key " + name.encode()).digest()
    return DataKey(SecretBytes(secret), b"wrapped " + name.encode() * 10, uri, 3)


def content(size: int, *, salt: str = "") -> bytes:
    """Return bytes that repeat nowhere, the same for the same arguments."""
    return hashlib.shake_256(f"content {salt}".encode()).digest(size)


def sealed_bytes(
    plain: bytes, *, key: DataKey | None = None, segment_size: int = 256, path: str = "train.tsv"
) -> bytes:
    """Seal in memory."""
    out = io.BytesIO()
    with SealedWriter(
        out, data_key=key or data_key(), associated=AssociatedData("reviews", path), segment_size=segment_size
    ) as writer:
        writer.write(plain)
    return out.getvalue()


def opened(sealed: bytes, *, key: DataKey | None = None) -> bytes:
    """Open in memory, to the end."""
    with SealedReader(io.BytesIO(sealed), data_key=key or data_key(), name="train.tsv") as reader:
        return reader.readall()


def boundary_lengths(segment_size: int) -> list[int]:
    """Return the plaintext lengths around which a segmented format goes wrong."""
    first, further = segment_size - 56, segment_size - 16
    edges = [first, first + further, first + 2 * further, first + 5 * further]
    return sorted({0, 1, *(edge + step for edge in edges for step in (-1, 0, 1))})


def recipe() -> dict[str, object]:
    """Run the recipe of docs/sealed-format.md and return its names."""
    text = (ROOT / "docs" / "sealed-format.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    names: dict[str, object] = {}
    exec(compile(code[1], "docs/sealed-format.md", "exec"), names)
    return names


def tink_primitive(dek: bytes, segment_size: int):  # type: ignore[no-untyped-def]  # tink is untyped
    """Return Tink's streaming AEAD over a key of ours."""
    from tink import proto_keyset_format, secret_key_access, streaming_aead
    from tink.proto import aes_gcm_hkdf_streaming_pb2, common_pb2, tink_pb2

    streaming_aead.register()
    key = aes_gcm_hkdf_streaming_pb2.AesGcmHkdfStreamingKey(key_value=dek)
    key.params.ciphertext_segment_size = segment_size
    key.params.derived_key_size = 32
    key.params.hkdf_hash_type = common_pb2.SHA256
    keyset = tink_pb2.Keyset(primary_key_id=1)
    entry = keyset.key.add(key_id=1, status=tink_pb2.ENABLED, output_prefix_type=tink_pb2.RAW)
    entry.key_data.type_url = "type.googleapis.com/google.crypto.tink.AesGcmHkdfStreamingKey"
    entry.key_data.value = key.SerializeToString()
    entry.key_data.key_material_type = tink_pb2.KeyData.SYMMETRIC
    handle = proto_keyset_format.parse(keyset.SerializeToString(), secret_key_access.TOKEN)
    return handle.primitive(streaming_aead.StreamingAead)


class KeepOpen(io.BytesIO):
    """A buffer whose content outlives close(): Tink closes what it writes to."""

    def close(self) -> None:
        self.content = self.getvalue()
        super().close()


def tink_encrypt(plain: bytes, *, dek: bytes, segment_size: int, associated_data: bytes) -> bytes:
    """Return the stream that Tink makes."""
    out = KeepOpen()
    with tink_primitive(dek, segment_size).new_encrypting_stream(out, associated_data) as stream:
        stream.write(plain)
    return out.content


def tink_decrypt(stream: BinaryIO, *, dek: bytes, segment_size: int, associated_data: bytes) -> bytes:
    """Return what Tink reads from a stream."""
    with tink_primitive(dek, segment_size).new_decrypting_stream(stream, associated_data) as opened_stream:
        return bytes(opened_stream.read())
