# SPDX-License-Identifier: Apache-2.0
"""The root key: 32 bytes under which the embedded store keeps its key-encryption keys.

A file (0600, hexadecimal) is the development form: whoever reads the file and the store reads every key. In a real TD
the root key is sealed or recovered from shares and never lies on a disk. From it come separate keys by HKDF, so that
wrapping keys, authenticating records and recognising the store never share one.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes

ROOT_KEY_SIZE: Final = 32
_FILE_SIZE_LIMIT: Final = 128  # 64 hexadecimal digits and a line end; more is some other file


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


def create_root_key(path: Path) -> None:
    """Write a new root key, readable by this user only; never over a file that is there.

    The file appears whole or not at all: it is written under another name, synced, then linked to its own.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_hex(ROOT_KEY_SIZE).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike rename, link refuses an existing name
        finally:
            temporary.unlink()
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except FileExistsError:
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{path} is already there",
            why="another root key would make every key of the store unreadable",
            todo="use the one that is there, or name another file for another store",
        ) from None
    except OSError as error:
        raise CloisterError(
            Code.IO_FAILED,
            what=f"the root key could not be written to {path}",
            why=error.strerror or "input/output error",
            todo="name a file in a directory that exists and that you may write to",
        ) from None


def read_root_key(path: Path) -> RootKey:
    """Read a root key file; raise CloisterError when it is not there, others may read it, or it is no root key."""
    try:
        # NONBLOCK: a pipe in the file's place must not hold the broker up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there is no root key at {path}",
            why="the store cannot be opened without it",
            todo=f"for a new store: python -m cloister_keybroker init --root-key-file {path}",
        ) from None
    except OSError as error:
        raise _refused(path, error.strerror or "input/output error", "name a regular file of your own") from None
    try:
        # Looked at through the descriptor: the file that is checked is the file that is read.
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise _refused(path, "it is not a regular file of this user", "name a regular file of your own")
        if status.st_mode & 0o077:
            raise _refused(path, f"others may read it (mode {status.st_mode & 0o777:04o})", f"chmod 600 {path}")
        data = os.read(descriptor, _FILE_SIZE_LIMIT + 1)
    finally:
        os.close(descriptor)
    if not re.fullmatch(rb"[0-9a-f]{64}\n?", data):
        raise _refused(path, "it is not 64 hexadecimal digits", "restore the file from your backup")
    return RootKey(SecretBytes(bytes.fromhex(data.decode("ascii"))))


def _refused(path: Path, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.CONFIG_INVALID, what=f"the root key {path} is refused", why=why, todo=todo)
