# SPDX-License-Identifier: Apache-2.0
"""The manifest of a sealed directory: which files, of which content, in which version of the dataset.

Canonical JSON (sorted keys, no spaces, ASCII), so that one manifest has one digest. The MAC is under a key derived
from the directory's DEK: only who holds the DEK can make or change a manifest. Key version and wrapped DEK are not
in it, so that a re-wrap does not change the digest that job descriptions and measurements name.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.atomicfile import file_error
from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.sealed.format import (
    FILE_ID_SIZE,
    MAX_SEGMENT_SIZE,
    MIN_SEGMENT_SIZE,
    check_dataset,
    check_path,
)
from cloister.sealed.segments import STREAM_HEADER_SIZE, Layout
from cloister.sealed.stream import SealedReader, SealedWriter
from cloister.secret import SecretBytes
from cloister.tlv import sha384

MANIFEST_NAME: Final = "cloister-manifest.json"
MANIFEST_FORMAT: Final = "cloister-manifest-v1"
# 100,000 files make about 35 MB.
MAX_MANIFEST_SIZE: Final = 128 * 1024 * 1024
_MAX_VERSION: Final = 2**53 - 1  # the integers that every JSON reader keeps
_DIGEST_SIZE: Final = 48


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One sealed file: what its header and stream must be. Lengths in bytes."""

    path: str
    length: int  # of the plaintext
    stream_length: int  # of the stream behind the header, which a re-wrap may change
    segment_size: int
    schema_version: int
    file_id: str  # hex of 16 bytes
    # Hex of 40 bytes. The salt in it makes the file's key, so it stands for the content: an older file under the same
    # name has another one.
    stream_header: str

    @classmethod
    def of(cls, file: SealedWriter | SealedReader) -> FileEntry:
        """Return the entry of a file that was written, or opened."""
        header = file.header
        return cls(
            path=header.associated.path,
            length=file.size if isinstance(file, SealedReader) else file.plaintext_length,
            stream_length=file.stream_length,
            segment_size=header.segment_size,
            schema_version=header.associated.schema_version,
            file_id=header.associated.file_id.hex(),
            stream_header=file.stream_header.hex(),
        )

    @classmethod
    def _parse(cls, value: Any) -> FileEntry:
        if not isinstance(value, dict) or value.keys() != _ENTRY_TYPES.keys():
            raise ValueError("an entry of a file has other fields than expected")
        for key, kind in _ENTRY_TYPES.items():
            if type(value[key]) is not kind:
                raise ValueError(f"{key} of a file is not of type {kind.__name__}")
        entry = cls(**value)
        check_path(entry.path)
        _hex(entry.file_id, FILE_ID_SIZE)
        _hex(entry.stream_header, STREAM_HEADER_SIZE)
        if not (MIN_SEGMENT_SIZE <= entry.segment_size <= MAX_SEGMENT_SIZE and entry.schema_version > 0):
            raise ValueError(f"a number of {entry.path} is out of bounds")
        if not 0 <= entry.length <= _MAX_VERSION or entry.stream_length != Layout(entry.segment_size).stream_length(
            entry.length
        ):
            raise ValueError(f"the lengths of {entry.path} do not fit together")
        return entry


_ENTRY_TYPES: Final[dict[str, type]] = {
    "path": str,
    "length": int,
    "stream_length": int,
    "segment_size": int,
    "schema_version": int,
    "file_id": str,
    "stream_header": str,
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """A version of a dataset. `parse` gives claims; `verify` says whether the holder of the DEK made them."""

    dataset: str
    version: int  # from 1; each version has a DEK of its own
    parent: bytes  # digest of the manifest of the version before (48 bytes), or empty
    key_uri: str
    files: tuple[FileEntry, ...]  # sorted by path
    mac: bytes = b""

    @property
    def digest(self) -> bytes:
        """SHA-384 of the manifest file (48 bytes): the name of exactly this data."""
        return sha384(self.to_bytes())

    @property
    def size(self) -> int:
        """Bytes of plaintext in all files."""
        return sum(entry.length for entry in self.files)

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        return _canonical(self._document() | {"mac": self.mac.hex()})

    def signed(self, secret: SecretBytes) -> Manifest:
        """Return the same manifest with the MAC of this DEK, its files sorted."""
        files = tuple(sorted(self.files, key=lambda entry: entry.path))
        bare = Manifest(self.dataset, self.version, self.parent, self.key_uri, files)
        return Manifest(self.dataset, self.version, self.parent, self.key_uri, files, mac=bare._mac(secret))

    def verify(self, secret: SecretBytes, *, name: str) -> None:
        """Refuse a manifest that was not made with this DEK."""
        if not hmac.compare_digest(self._mac(secret), self.mac):
            raise manifest_invalid(name, "it was changed, or made under another key")

    def _document(self) -> dict[str, Any]:
        return {
            "format": MANIFEST_FORMAT,
            "dataset": self.dataset,
            "version": self.version,
            "parent": self.parent.hex(),
            "key_uri": self.key_uri,
            "files": [{name: getattr(entry, name) for name in _ENTRY_TYPES} for entry in self.files],
        }

    def _mac(self, secret: SecretBytes) -> bytes:
        key = HKDF(SHA256(), length=32, salt=None, info=b"cloister-manifest-v1").derive(secret.reveal())
        return hmac.digest(key, _canonical(self._document()), hashlib.sha256)

    @classmethod
    def parse(cls, data: bytes, *, name: str = MANIFEST_NAME) -> Manifest:
        """Parse strictly: these fields, this spelling, sorted unique paths that stay inside the directory.

        Raises CloisterError(MANIFEST_INVALID).
        """
        if len(data) > MAX_MANIFEST_SIZE:
            raise manifest_invalid(name, f"it has more than {MAX_MANIFEST_SIZE} bytes")
        try:
            manifest = cls._parse(json.loads(data.decode("ascii")))
        except (ValueError, CloisterError) as error:
            raise manifest_invalid(name, error.what if isinstance(error, CloisterError) else str(error)) from None
        except RecursionError:
            raise manifest_invalid(name, "it is nested too deeply") from None
        # One content, one spelling: also refuses doubled keys, which json takes the last of.
        if manifest.to_bytes() != data:
            raise manifest_invalid(name, "it is not in canonical form")
        return manifest

    @classmethod
    def _parse(cls, document: Any) -> Manifest:
        fields = {"format", "dataset", "version", "parent", "key_uri", "files", "mac"}
        if not isinstance(document, dict) or document.keys() != fields:
            raise ValueError("it has other fields than expected")
        texts = [document[key] for key in ("format", "dataset", "parent", "key_uri", "mac")]
        version, files = document["version"], document["files"]
        if not all(isinstance(text, str) for text in texts) or type(version) is not int or not isinstance(files, list):
            raise ValueError("a field is of another type than expected")
        form, dataset, parent, key_uri, mac = texts
        if form != MANIFEST_FORMAT:
            raise ValueError(f"its format is {form[:40]!r}, and this release reads {MANIFEST_FORMAT!r}")
        check_dataset(dataset)
        KeyUri.parse(key_uri)
        if not 0 < version <= _MAX_VERSION or not files:
            raise ValueError("versions count from 1, and there is at least one file")
        entries = tuple(FileEntry._parse(value) for value in files)
        paths = [entry.path for entry in entries]
        if any(one >= other for one, other in itertools.pairwise(paths)):
            raise ValueError("its files are not sorted, or one is there twice")
        return cls(dataset, version, _hex(parent, _DIGEST_SIZE) if parent else b"", key_uri, entries, mac=_hex(mac, 32))


def read_manifest(path: Path) -> bytes:
    """Return the bytes of a directory's manifest file, not verified; raise NOT_SEALED when there is none."""
    file = path / MANIFEST_NAME
    try:
        if not file.is_file():
            raise CloisterError(
                Code.NOT_SEALED,
                what=f"{path} is not a sealed directory",
                why=f"there is no {MANIFEST_NAME} in it: it was never sealed, or sealing did not end",
                todo="seal the data with `cloister seal`, and name the directory it wrote",
            )
        if file.stat().st_size > MAX_MANIFEST_SIZE:
            raise manifest_invalid(str(file), f"it has more than {MAX_MANIFEST_SIZE} bytes")
        return file.read_bytes()
    except OSError as error:
        raise file_error(error, what=f"cannot read {file}") from error


def manifest_invalid(name: str, why: str) -> CloisterError:
    """Return the one error of this format."""
    return CloisterError(
        Code.MANIFEST_INVALID,
        what=f"{name} is not a valid manifest",
        why=why,
        todo="fetch the directory again from where it was sealed, or seal the data anew",
    )


def _canonical(document: dict[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _hex(text: str, size: int) -> bytes:
    # bytes.fromhex takes spaces and capitals.
    if len(text) != 2 * size or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"a value is not {size} bytes in small hexadecimal digits")
    return bytes.fromhex(text)
