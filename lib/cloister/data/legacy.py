# SPDX-License-Identifier: Apache-2.0
"""Read files that BigDL PPML and BigDL-Nano encrypted, so that they can be sealed: Fernet over the whole content.

A file is one Fernet token (https://github.com/fernet/spec): base64url of version 0x80, time, IV, AES-128-CBC, HMAC.
The key is base64url of 32 bytes, and those programs keep it in a file. Fernet authenticates content, but not the
file's name, and holds all of it in memory twice: that is why these files should not stay what they are.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Final

from cryptography.fernet import Fernet, InvalidToken

from cloister.atomicfile import file_error
from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes

_BEGINNING: Final = b"gAAAA"  # base64url of 0x80 and the high bytes of a time before the year 2106
_KEY_SIZE: Final = 32
_KEY_FILE_SIZE: Final = 4096  # bytes; more is some other file
MAX_SIZE: Final = 8 << 30  # bytes of a token; all of it is held in memory


def is_legacy(beginning: bytes) -> bool:
    """Say whether a file that begins like this may be a Fernet token; five bytes are enough."""
    return beginning[: len(_BEGINNING)] == _BEGINNING


def read_key(path: Path) -> SecretBytes:
    """Read a Fernet key, as text or as 32 raw bytes; raise CloisterError(DATA_INVALID) for anything else."""
    try:
        if path.stat().st_size > _KEY_FILE_SIZE:
            raise _bad_key(path)
        data = path.read_bytes()
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error
    if len(data) == _KEY_SIZE:
        return SecretBytes(base64.urlsafe_b64encode(data))
    text = data.strip().replace(b"+", b"-").replace(b"/", b"_")
    try:
        if len(base64.urlsafe_b64decode(text)) != _KEY_SIZE:
            raise _bad_key(path)
    except binascii.Error:
        raise _bad_key(path) from None
    return SecretBytes(text)


def open_legacy(token: bytes, key: SecretBytes, *, name: str) -> bytes:
    """Return the content of a Fernet file; raise CloisterError(DATA_INVALID) when it does not authenticate."""
    try:
        return Fernet(key.reveal()).decrypt(token.strip())
    except (InvalidToken, ValueError):
        raise CloisterError(
            Code.DATA_INVALID,
            what=f"{name} does not open",
            why="it is not a Fernet file, it was changed, or it is under another key",
            todo="give the key file that it was encrypted with; nothing was read from it",
        ) from None


def read_legacy(path: Path, key: SecretBytes) -> bytes:
    """Read and open a Fernet file; raise CloisterError."""
    try:
        size = path.stat().st_size
        if size > MAX_SIZE:
            raise CloisterError(
                Code.DATA_INVALID,
                what=f"{path} is too large",
                why=f"a Fernet file is opened as a whole, in memory, and this one has {size} bytes",
                todo="split it with the program that made it",
            )
        return open_legacy(path.read_bytes(), key, name=str(path))
    except OSError as error:
        raise file_error(error, what=f"cannot read {path}") from error


def _bad_key(path: Path) -> CloisterError:
    return CloisterError(
        Code.DATA_INVALID,
        what=f"{path} holds no Fernet key",
        why=f"such a key is {_KEY_SIZE} bytes, raw or in base64",
        todo="name the file with the plaintext data key that the other program wrote",
    )
