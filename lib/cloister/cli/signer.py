# SPDX-License-Identifier: Apache-2.0
"""The owner's signing key (Ed25519): made once on this machine, signs new keys and policies, never leaves its file.

The first key that is created with it is bound to it for good, so it is worth a backup: without it no policy of that
key changes any more.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.cli.privatekey import read_private_key, unusable_key, write_private_key
from cloister.errors import CloisterError, Code

if TYPE_CHECKING:
    from cloister.cli.state import StateDirectory

_WHAT: Final = "the signing key"


def signing_key(state: StateDirectory) -> Ed25519PrivateKey:
    """Return the owner's signing key; make it, readable by its owner only, when there is none yet."""
    path = state.signing_key
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            write_private_key(path, Ed25519PrivateKey.generate())
        except CloisterError as error:
            if error.code is not Code.FILE_EXISTS:  # another command made it meanwhile
                raise
    return read_signing_key(path)


def read_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key; raise CloisterError when it is missing, readable by others, or not an Ed25519 key."""
    key = read_private_key(
        path, what=_WHAT, todo="`cloister key signer` makes one; name the right state directory with --state"
    )
    if not isinstance(key, Ed25519PrivateKey):
        raise unusable_key(path, "it is not an Ed25519 key", what=_WHAT)
    return key
