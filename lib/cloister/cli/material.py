# SPDX-License-Identifier: Apache-2.0
"""Key material that an owner brings, from a file that only its owner reads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes

_SIZE: Final = 32
_HEX: Final = re.compile(rb"[0-9a-fA-F]{64}\r?\n?")


def read_key_material(path: Path) -> SecretBytes:
    """Read 32 bytes, raw or as 64 hexadecimal digits; raise CloisterError for anything else, or when others read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as handle:
            mode = os.fstat(descriptor).st_mode & 0o777
            data = handle.read(2 * _SIZE + 3)
    except OSError as error:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"the key material {path} cannot be read",
            why=error.strerror or str(error),
            todo="name a file of your own",
        ) from error
    if mode & 0o077:
        raise _unusable(path, f"its mode is {mode:o}: others may read it", f"chmod 600 {path}")
    if len(data) == _SIZE:
        return SecretBytes(data)
    if _HEX.fullmatch(data):
        return SecretBytes(bytes.fromhex(data.decode("ascii")))
    raise _unusable(path, "it is neither 32 bytes nor 64 hexadecimal digits", "make some with: openssl rand -hex 32")


def _unusable(path: Path, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.ARGUMENT_INVALID, what=f"the key material {path} cannot be used", why=why, todo=todo)
