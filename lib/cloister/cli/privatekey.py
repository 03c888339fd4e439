# SPDX-License-Identifier: Apache-2.0
"""Private keys in files of their user's: PEM, PKCS #8, 0600, never a link, made whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from cloister.errors import CloisterError, Code

_MAX_SIZE = 1 << 16  # bytes


def write_private_key(path: Path, key: PrivateKeyTypes) -> None:
    """Write a new private key; raise CloisterError(FILE_EXISTS) rather than replace one."""
    from cloister.atomicfile import write_new

    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    write_new(path, pem, mode=0o600)


def read_private_key(path: Path, *, what: str, todo: str) -> PrivateKeyTypes:
    """Read a private key; raise CloisterError when it is missing, readable by others, or none.

    `what` names the key for errors, as in "the user's key"; `todo` says how one is made.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as handle:
            mode = os.fstat(descriptor).st_mode & 0o777
            pem = handle.read(_MAX_SIZE)
    except OSError as error:
        raise CloisterError(
            Code.FILE_NOT_FOUND, what=f"{what} {path} cannot be read", why=error.strerror or str(error), todo=todo
        ) from error
    if mode & 0o077:
        why = f"its mode is {mode:o}; a private key is readable by its owner only"
        raise unusable_key(path, why, what=what, todo=f"chmod 600 {path}")
    try:
        return serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError):
        raise unusable_key(path, "it is not an unencrypted PEM private key", what=what) from None


def unusable_key(path: Path, why: str, *, what: str, todo: str = "put the right file there") -> CloisterError:
    """Say why a key file cannot be used."""
    return CloisterError(Code.CONFIG_INVALID, what=f"{what} {path} cannot be used", why=why, todo=todo)
