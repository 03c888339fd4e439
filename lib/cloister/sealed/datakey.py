# SPDX-License-Identifier: Apache-2.0
"""The key that a sealed file or directory is under, as its holder has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.secret import SecretBytes

DATA_KEY_SIZE: Final = 32
MAX_WRAPPED_SIZE: Final = 8192  # bytes; back ends wrap 32 bytes into 60 to about 600
MAX_KEY_VERSION: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class DataKey:
    """A data-encryption key (DEK) in the clear, and how to get it again.

    `wrapped` is the key broker's: it goes into the header of whatever is sealed, and whoever reads that later asks
    the broker to open it. One data key seals one version of one directory.
    """

    secret: SecretBytes  # 32 bytes
    wrapped: bytes
    key_uri: str
    key_version: int  # of the key that wrapped it

    def __post_init__(self) -> None:
        KeyUri.parse(self.key_uri)
        if (
            len(self.secret) != DATA_KEY_SIZE
            or not 0 < len(self.wrapped) <= MAX_WRAPPED_SIZE
            or not 0 < self.key_version <= MAX_KEY_VERSION
        ):
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"this is not a data key of {self.key_uri}",
                why=f"a data key has {DATA_KEY_SIZE} bytes, is wrapped in 1 to {MAX_WRAPPED_SIZE} bytes "
                "and names a key version from 1",
                todo="ask the key broker for a new one",
            )
