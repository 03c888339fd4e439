# SPDX-License-Identifier: Apache-2.0
"""The root key: 32 bytes under which the store keeps its wrapping keys.

A file (0600, hexadecimal) is the development form: whoever reads the file and the store reads every key. In a real TD
the root key comes from shares or a passphrase (unsealing.py) and never lies on a disk. From it come separate keys by
HKDF, so that wrapping keys, authenticating records and recognising the store never share one.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.atomicfile import file_error, sync_directory
from cloister.errors import CloisterError, Code
from cloister.rootfile import create_root_file, read_root_file
from cloister.secret import SecretBytes

ROOT_KEY_SIZE: Final = 32


class RootKey:
    """Derive the keys of the store; the root itself wraps nothing."""

    def __init__(self, root: SecretBytes) -> None:
        if len(root) != ROOT_KEY_SIZE:
            raise ValueError(f"a root key has {ROOT_KEY_SIZE} bytes")
        self._kek_wrap = _derive(root, b"cloister-kek-wrap-v1")
        self._record_mac = _derive(root, b"cloister-record-mac-v1")
        self._canary = _derive(root, b"cloister-canary-v1")
        self._custodian_salt = _derive(root, b"cloister-custodian-salt-v1")

    @property
    def kek_wrap(self) -> SecretBytes:
        """The AES-256-GCM key over key-encryption keys."""
        return self._kek_wrap

    @property
    def custodian_salt(self) -> SecretBytes:
        """The root key's half of what protects a wrapping key whose other half a custodian keeps (32 bytes)."""
        return self._custodian_salt

    def mac(self, message: bytes) -> bytes:
        """Return HMAC-SHA-384 over a record of the store (48 bytes)."""
        return hmac.digest(self._record_mac.reveal(), message, "sha384")

    def canary(self) -> bytes:
        """Return the value by which a store recognises its root key (32 bytes, reveals nothing of it)."""
        return hmac.digest(self._canary.reveal(), b"cloister-store", "sha256")


def _derive(root: SecretBytes, label: bytes) -> SecretBytes:
    return SecretBytes(HKDF(hashes.SHA256(), ROOT_KEY_SIZE, salt=None, info=label).derive(root.reveal()))


def stage_root_key(path: Path) -> RootKey:
    """Write the root key that is to replace the one in the file, beside it; return it."""
    staged = _staged(path)
    staged.unlink(missing_ok=True)  # of an attempt that did not get as far as the store
    create_root_key(staged)
    return read_root_key(staged)


def staged_root_key(path: Path) -> RootKey | None:
    """Return the root key that was to replace the one in the file, if there is one."""
    return read_root_key(_staged(path)) if _staged(path).exists() else None


def adopt_root_key(path: Path) -> None:
    """Put the staged root key into the file's place; the one that was there is gone."""
    try:
        _staged(path).replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise file_error(error, what=f"the new root key could not take the name {path}") from None


def _staged(path: Path) -> Path:
    return path.with_name(f"{path.name}.next")


def create_root_key(path: Path) -> None:
    """Write a new root key, readable by this user only; never over a file that is there."""
    create_root_file(path)


def read_root_key(path: Path) -> RootKey:
    """Read a root key file; raise CloisterError when it is not there, others may read it, or it is no root key."""
    try:
        return RootKey(read_root_file(path))
    except CloisterError as error:
        if error.code is not Code.FILE_NOT_FOUND:
            raise
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=error.what,
            why="the store cannot be opened without it",
            todo=f"for a new store: python -m cloister_keybroker init --root-key-file {path} --state-dir DIRECTORY",
        ) from None
