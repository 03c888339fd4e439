# SPDX-License-Identifier: Apache-2.0
"""The manifest of a sealed directory: which files, of which content, in which version of the dataset.

Canonical JSON (sorted keys, no spaces, ASCII), so that one manifest has one digest. The MAC is under a key derived
from the directory's DEK: only who holds the DEK can make or change a manifest. The signature says which of them did:
it is made with the owner's signing key, or with the key of the TD that wrote the files, and anybody can check it.
Key version and wrapped DEK are not in it, so that a re-wrap does not change the digest that job descriptions and
measurements name.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.atomicfile import file_error
from cloister.didkey import did_key, parse_did_key
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
from cloister.tlv import tlv

MANIFEST_NAME: Final = "cloister-manifest.json"
MANIFEST_FORMAT: Final = "cloister-manifest-v1"
# 100,000 files make about 35 MB.
MAX_MANIFEST_SIZE: Final = 128 * 1024 * 1024
_MAX_VERSION: Final = 2**53 - 1  # the integers that every JSON reader keeps
_DIGEST_SIZE: Final = 48
_SIGNATURE_SIZE: Final = 64
_PIECE: Final = 1000  # files in a piece of the canonical form


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

    def to_json(self) -> str:
        """Return the entry in canonical form; keys stand in their order, and only a path needs escaping."""
        return (
            f'{{"file_id":"{self.file_id}","length":{self.length},"path":{_json(self.path)},'
            f'"schema_version":{self.schema_version},"segment_size":{self.segment_size},'
            f'"stream_header":"{self.stream_header}","stream_length":{self.stream_length}}}'
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
    signer: str = ""  # did:key, or empty
    signature: bytes = b""  # Ed25519, 64 bytes, or empty
    mac: bytes = b""  # 32 bytes

    @property
    def digest(self) -> bytes:
        """SHA-384 of the manifest file (48 bytes): the name of exactly this data."""
        return hashlib.sha384(self.to_bytes()).digest()

    @property
    def size(self) -> int:
        """Bytes of plaintext in all files."""
        return sum(entry.length for entry in self.files)

    def to_bytes(self) -> bytes:
        """Return the file's bytes."""
        return b"".join(self._canonical(signature=self.signature.hex(), mac=self.mac.hex()))

    def signed(self, secret: SecretBytes, signing_key: Ed25519PrivateKey | None = None) -> Manifest:
        """Return the same manifest with its files sorted, a signature when there is a key for it, and the DEK's MAC."""
        files = tuple(sorted(self.files, key=lambda entry: entry.path))
        signer = did_key(signing_key) if signing_key else ""
        bare = replace(self, files=files, signer=signer, signature=b"", mac=b"")
        if signing_key:
            bare = replace(bare, signature=signing_key.sign(bare._statement()))
        return replace(bare, mac=bare._mac(secret))

    def verify(self, secret: SecretBytes, *, name: str) -> None:
        """Refuse a manifest that was not made with this DEK, or whose signature is not its signer's."""
        if not hmac.compare_digest(self._mac(secret), self.mac):
            raise manifest_invalid(name, "it was changed, or made under another key")
        if self.signer:
            self.verify_signature(name=name)

    def verify_signature(self, *, name: str) -> None:
        """Refuse a manifest that its signer did not sign; needs no key. Unsigned ones are refused too."""
        if not self.signer:
            raise manifest_invalid(name, "nobody signed it")
        try:
            parse_did_key(self.signer).verify(self.signature, self._statement())
        except InvalidSignature:
            raise manifest_invalid(name, f"its signature is not one of {self.signer}") from None

    def _statement(self) -> bytes:
        """Return what the signer signs."""
        digest = hashlib.sha384()
        for piece in self._canonical():
            digest.update(piece)
        return tlv("cloister-manifest-signature-v1", digest.digest())

    def _mac(self, secret: SecretBytes) -> bytes:
        key = HKDF(SHA256(), length=32, salt=None, info=b"cloister-manifest-v1").derive(secret.reveal())
        mac = hmac.new(key, digestmod=hashlib.sha256)
        for piece in self._canonical(signature=self.signature.hex()):
            mac.update(piece)
        return mac.digest()

    def _canonical(self, **more: str) -> Iterator[bytes]:
        """Yield the canonical form in pieces: sorted keys, no spaces, ASCII. `more` are the fields behind the rest."""
        fields: dict[str, Any] = {
            "format": MANIFEST_FORMAT,
            "dataset": self.dataset,
            "version": self.version,
            "parent": self.parent.hex(),
            "key_uri": self.key_uri,
            "signer": self.signer,
            **more,
        }
        before = {name: value for name, value in fields.items() if name < "files"}
        behind = {name: value for name, value in fields.items() if name > "files"}
        yield _json(before)[:-1].encode("ascii") + b',"files":['
        for at in range(0, len(self.files), _PIECE):
            text = ",".join(entry.to_json() for entry in self.files[at : at + _PIECE])
            yield (("," if at else "") + text).encode("ascii")
        yield b"]," + _json(behind)[1:].encode("ascii")

    @classmethod
    def parse(cls, data: bytes, *, name: str = MANIFEST_NAME) -> Manifest:
        """Parse strictly: these fields, this spelling, sorted unique paths that stay inside the directory.

        Raises CloisterError(MANIFEST_INVALID).
        """
        if len(data) > MAX_MANIFEST_SIZE:
            raise manifest_invalid(name, f"it has more than {MAX_MANIFEST_SIZE} bytes")
        try:
            if not data.isascii():
                raise ValueError("it is not ASCII")
            manifest = cls._parse(json.loads(data))
        except (ValueError, CloisterError) as error:
            raise manifest_invalid(name, error.what if isinstance(error, CloisterError) else str(error)) from None
        except RecursionError:
            raise manifest_invalid(name, "it is nested too deeply") from None
        # One content, one spelling: also refuses doubled keys, which json takes the last of.
        if not manifest._is_spelled(data):
            raise manifest_invalid(name, "it is not in canonical form")
        return manifest

    def _is_spelled(self, data: bytes) -> bool:
        at = 0
        for piece in self._canonical(signature=self.signature.hex(), mac=self.mac.hex()):
            if not data.startswith(piece, at):
                return False
            at += len(piece)
        return at == len(data)

    @classmethod
    def _parse(cls, document: Any) -> Manifest:
        fields = {"format", "dataset", "version", "parent", "key_uri", "files", "signer", "signature", "mac"}
        if not isinstance(document, dict) or document.keys() != fields:
            raise ValueError("it has other fields than expected")
        texts = [document[key] for key in ("format", "dataset", "parent", "key_uri", "signer", "signature", "mac")]
        version, files = document["version"], document["files"]
        if not all(isinstance(text, str) for text in texts) or type(version) is not int or not isinstance(files, list):
            raise ValueError("a field is of another type than expected")
        form, dataset, parent, key_uri, signer, signature, mac = texts
        if form != MANIFEST_FORMAT:
            raise ValueError(f"its format is {form[:40]!r}, and this release reads {MANIFEST_FORMAT!r}")
        check_dataset(dataset)
        KeyUri.parse(key_uri)
        if signer:
            parse_did_key(signer)
        if bool(signer) != bool(signature):
            raise ValueError("a signature comes with its signer")
        if not 0 < version <= _MAX_VERSION or not files:
            raise ValueError("versions count from 1, and there is at least one file")
        # In place, so that of 100,000 files there is never both the raw and the parsed form.
        for index, value in enumerate(files):
            files[index] = FileEntry._parse(value)
        if any(one.path >= other.path for one, other in itertools.pairwise(files)):
            raise ValueError("its files are not sorted, or one is there twice")
        return cls(
            dataset=dataset,
            version=version,
            parent=_hex(parent, _DIGEST_SIZE) if parent else b"",
            key_uri=key_uri,
            files=tuple(files),
            signer=signer,
            signature=_hex(signature, _SIGNATURE_SIZE) if signature else b"",
            mac=_hex(mac, 32),
        )


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


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _hex(text: str, size: int) -> bytes:
    # bytes.fromhex takes spaces and capitals, which do not come back the same.
    value = bytes.fromhex(text)
    if len(value) != size or value.hex() != text:
        raise ValueError(f"a value is not {size} bytes in small hexadecimal digits")
    return value
