# SPDX-License-Identifier: Apache-2.0
"""Parquet modular encryption with keys of the process's keyring: any Parquet reader that has the keys can read it.

    write_table(table, "rows.parquet", key="cloister-key://hospital-a/rows")      all columns and the footer
    read_table("rows.parquet", columns=["id"])                                    keys are found by themselves

https://github.com/apache/parquet-format/blob/master/Encryption.md (AES_GCM_V1). Parquet's own key tools make a random
key for each column and wrap it; what they call the master key is a data key of ours:

    wrapped    = base64(TLV("cloister-parquet-key-v1", key URI, key version, wrapped DEK, nonce (12), box))
    box        = AES-256-GCM(K, nonce, Parquet's key; associated data = TLV(label, key URI, key version, wrapped DEK))
    K          = HKDF-SHA256(DEK, no salt, info = "cloister-parquet-v1"), 32 bytes

Parquet binds pages to their column and file, but no file to its name: a whole file can be exchanged for another under
the same key. Where that matters, seal plain Parquet into a sealed directory instead.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.data import keyring
from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.sealed.datakey import MAX_KEY_VERSION, MAX_WRAPPED_SIZE, DataKey
from cloister.secret import SecretBytes
from cloister.tlv import parse_tlv, tlv

_LABEL: Final = "cloister-parquet-key-v1"
_NONCE_SIZE: Final = 12
_KEY_BITS: Final = 256
_SCHEME: Final = "cloister-key://"  # Parquet's list of column keys has no room for colons
_RESERVED: Final = frozenset(",;: ")  # of that list


def encryption_properties(key: str, *, columns: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Return what `pyarrow.parquet.ParquetWriter` takes as `encryption_properties`; one object for each file.

    All columns and the footer are under `key` (cloister-key://...). With `columns`, key URIs and the columns under
    them, only these columns are encrypted, and the footer is under `key`. Raises CloisterError: ARGUMENT_INVALID,
    KEYRING_MISSING, and what the keyring raises.
    """
    keyring.current()  # better here than from inside of pyarrow
    return crypto_factory().file_encryption_properties(pe.KmsConnectionConfig(), configuration(key, columns=columns))


def decryption_properties() -> Any:
    """Return what pyarrow's Parquet readers take as `decryption_properties`; the keys come from the keyring."""
    return crypto_factory().file_decryption_properties(pe.KmsConnectionConfig(), _at_once())


def write_table(
    table: Any, where: Any, *, key: str, columns: Mapping[str, Sequence[str]] | None = None, **options: Any
) -> None:
    """Write a table as an encrypted Parquet file; `options` are those of pyarrow.parquet.write_table."""
    pq.write_table(table, where, encryption_properties=encryption_properties(key, columns=columns), **options)


def read_table(source: Any, **options: Any) -> Any:
    """Read an encrypted Parquet file; `options` are those of pyarrow.parquet.read_table.

    Raises CloisterError: SEALED_FILE_INVALID for a file that was changed, and what the keyring raises.
    """
    try:
        return pq.read_table(source, decryption_properties=decryption_properties(), **options)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise _refused(str(source), str(error)[:300]) from None


def crypto_factory() -> Any:
    """Return a pyarrow CryptoFactory whose keys come from the keyring, for pyarrow.dataset and others."""
    return pe.CryptoFactory(lambda _config: _Client())


def configuration(key: str, *, columns: Mapping[str, Sequence[str]] | None = None) -> Any:
    """Return a pyarrow EncryptionConfiguration: AES-256-GCM for pages and metadata, encrypted footer."""
    common: dict[str, Any] = {
        "encryption_algorithm": "AES_GCM_V1",
        "data_key_length_bits": _KEY_BITS,
        "cache_lifetime": timedelta(seconds=0),
    }
    if columns is None:
        return pe.EncryptionConfiguration(_master(key), uniform_encryption=True, **common)
    for name in (name for names in columns.values() for name in names):
        if not name or _RESERVED & set(name):
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"column {name!r} cannot be named",
                why="Parquet's list of encrypted columns is separated by commas, colons, semicolons and spaces",
                todo="rename the column, or encrypt all columns",
            )
    keys = {_master(uri): list(names) for uri, names in columns.items()}
    return pe.EncryptionConfiguration(_master(key), column_keys=keys, **common)


class _Client(pe.KmsClient):  # type: ignore[misc]  # pyarrow is not typed
    """Wraps Parquet's keys with data keys of the keyring; lives for one file."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[str, DataKey] = {}  # one new data key for each key of a file

    def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
        uri = _SCHEME + master_key_identifier
        if uri not in self._made:
            self._made[uri] = keyring.current().new(uri)
        return wrap(self._made[uri], key_bytes)

    def unwrap_key(self, wrapped_key: str, master_key_identifier: str) -> bytes:
        ring = keyring.current()

        def find(uri: str, version: int, wrapped: bytes) -> SecretBytes:
            if uri != _SCHEME + master_key_identifier:
                raise _refused("an encrypted Parquet file", "one of its keys is under another key than it says")
            return ring.open(uri, key_version=version, wrapped=wrapped).secret

        return unwrap(wrapped_key, find)


def wrap(data_key: DataKey, key: bytes) -> str:
    """Return a key of Parquet's, wrapped with a data key, and how to get that data key again."""
    about = tlv(_LABEL, data_key.key_uri, data_key.key_version, data_key.wrapped)
    nonce = os.urandom(_NONCE_SIZE)
    box = AESGCM(_derived(data_key.secret)).encrypt(nonce, key, about)
    return base64.b64encode(tlv(_LABEL, data_key.key_uri, data_key.key_version, data_key.wrapped, nonce, box)).decode(
        "ascii"
    )


def unwrap(text: str, find: Callable[[str, int, bytes], SecretBytes]) -> bytes:
    """Undo `wrap`; `find` gets the data key by key URI, version and wrapped form, which nobody has authenticated yet.

    Raises CloisterError(SEALED_FILE_INVALID) for what is not a wrapped key, or is one under another data key.
    """
    try:
        data = base64.b64decode(text, validate=True)
        uri, version, wrapped, nonce, box = parse_tlv(data, label=_LABEL, fields=5)
        number = int.from_bytes(version, "big")
        KeyUri.parse(uri.decode())
        if len(version) != 8 or not 0 < number <= MAX_KEY_VERSION or len(nonce) != _NONCE_SIZE:
            raise ValueError("a field is out of bounds")
        if not 0 < len(wrapped) <= MAX_WRAPPED_SIZE:
            raise ValueError("a field is out of bounds")
    except (ValueError, binascii.Error, CloisterError):
        raise _refused("an encrypted Parquet file", "one of its wrapped keys does not parse") from None
    secret = find(uri.decode(), number, wrapped)
    try:
        return AESGCM(_derived(secret)).decrypt(nonce, box, tlv(_LABEL, uri, number, wrapped))
    except (InvalidTag, ValueError):
        raise _refused("an encrypted Parquet file", "one of its keys was changed, or is under another key") from None


def _derived(secret: SecretBytes) -> bytes:
    return HKDF(SHA256(), length=32, salt=None, info=b"cloister-parquet-v1").derive(secret.reveal())


def _master(uri: str) -> str:
    """Return what stands for a key URI where Parquet names a key."""
    KeyUri.parse(uri)
    return uri.removeprefix(_SCHEME)


def _at_once() -> Any:
    """Nothing is kept for later readers: the keyring decides each time what is given out."""
    return pe.DecryptionConfiguration(cache_lifetime=timedelta(seconds=0))


def _refused(name: str, why: str) -> CloisterError:
    return CloisterError(
        Code.SEALED_FILE_INVALID,
        what=f"{name} does not open",
        why=why,
        todo="fetch the file again from where it was written; do not use what was read from it",
    )
