# SPDX-License-Identifier: Apache-2.0
"""Where the files of a sealed directory lie: the three things that reading one needs of any storage.

Nothing that a storage says is believed: names are compared with an authentic manifest, and bytes are authenticated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from cloister.sealed.directorywriter import walk
from cloister.sealed.manifest import MANIFEST_NAME, read_manifest


class Storage(Protocol):
    """A directory of ciphertext. Calls raise OSError, or CloisterError that names the directory."""

    def __str__(self) -> str:
        """Return how errors name it."""

    def manifest(self) -> bytes:
        """Return the bytes of the manifest file, at most MAX_MANIFEST_SIZE; raise NOT_SEALED without one."""

    def names(self) -> Iterator[tuple[str, bool]]:
        """Yield the relative path of every file below, and whether it is a regular file."""

    def file(self, name: str) -> Path | BinaryIO:
        """Return a file as its path, or open for reading at any place; whoever asks for it closes it."""


@dataclass(frozen=True, slots=True)
class LocalStorage:
    """A directory of this machine, network mounts among them."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def manifest(self) -> bytes:
        return read_manifest(self.path)

    def names(self) -> Iterator[tuple[str, bool]]:
        return walk(self.path)

    def file(self, name: str) -> Path:
        return self.path / name


def shown(storage: Storage, name: str = MANIFEST_NAME) -> str:
    """Return how errors name a file of a storage."""
    return f"{str(storage).rstrip('/')}/{name}"
