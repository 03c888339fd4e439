# SPDX-License-Identifier: Apache-2.0
"""A recovery key in a file (0600, 64 hexadecimal digits): the development form.

Whoever reads the file reads everything sealed under it. It is for machines where that is said loudly and meant; in a
real TD the key comes from shares (`cloister.recovery`) and never lies on a disk.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path
from typing import Final

from cloister.atomicfile import sync_directory
from cloister.errors import CloisterError, Code
from cloister.recovery import RECOVERY_KEY_SIZE, new_recovery_key
from cloister.secret import SecretBytes

_MAX_BYTES: Final = 128  # 64 hexadecimal digits and a line end; more is some other file
_CONTENT: Final = re.compile(rb"[0-9a-f]{%d}\n?" % (2 * RECOVERY_KEY_SIZE))


def create_root_file(path: Path) -> SecretBytes:
    """Write a new key, readable by this user only, and return it; never over a file that is there.

    The file appears whole or not at all: it is written under another name, synced, then linked to its own.
    """
    key = new_recovery_key()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(key.reveal().hex().encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, path)  # unlike rename, link refuses an existing name
        finally:
            temporary.unlink()
        sync_directory(path.parent)
    except FileExistsError:
        raise CloisterError(
            Code.FILE_EXISTS,
            what=f"{path} is already there",
            why="another root key would make everything sealed under this one unreadable",
            todo="use the one that is there, or name another file",
        ) from None
    except OSError as error:
        raise CloisterError(
            Code.IO_FAILED,
            what=f"the root key could not be written to {path}",
            why=error.strerror or "input/output error",
            todo="name a file in a directory that exists and that you may write to",
        ) from None
    return key


def read_root_file(path: Path) -> SecretBytes:
    """Read a root key file; raise CloisterError when it is not there, others may read it, or it is no root key."""
    try:
        # NONBLOCK: a pipe in the file's place must not hold the service up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there is no root key at {path}",
            why="what is sealed under it cannot be opened without it",
            todo="restore the file from your backup, or make one for a new installation",
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
        content = os.read(descriptor, _MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if not _CONTENT.fullmatch(content):
        raise _refused(path, "it is not 64 hexadecimal digits", "restore the file from your backup")
    return SecretBytes(bytes.fromhex(content.decode("ascii")))


def _refused(path: Path, why: str, todo: str) -> CloisterError:
    return CloisterError(Code.CONFIG_INVALID, what=f"the root key {path} is refused", why=why, todo=todo)
