# SPDX-License-Identifier: Apache-2.0
"""Where the data key of a sealed file comes from when nobody names it: the process's keyring.

A rank, a serving worker and a session of the owner each activate one; what reads and writes sealed data asks it.
There is no other way for a key to be found: none is taken from arguments, the environment or a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey

_active: list[Keyring] = []


class Keyring(Protocol):
    """Data keys, by what stands in the header of a sealed file. Calls may take a round trip to the key broker."""

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        """Return the data key that is wrapped there; raise CloisterError when it is not given.

        `manifest_digest` (48 bytes) is that of the sealed directory it is for, or empty for a single file.
        """

    def new(self, key_uri: str = "") -> DataKey:
        """Return a new data key to seal with, under this key or, with none named, that of the job's output."""


def activate(keyring: Keyring) -> None:
    """Make this the keyring of the process, for good: what a rank or a worker does before any other code runs."""
    _active.append(keyring)


@contextmanager
def using(keyring: Keyring) -> Iterator[Keyring]:
    """Make this the keyring inside of the block."""
    _active.append(keyring)
    try:
        yield keyring
    finally:
        _active.remove(keyring)


def current() -> Keyring:
    """Return the keyring in force; raise CloisterError(KEYRING_MISSING) when there is none."""
    if not _active:
        raise CloisterError(
            Code.KEYRING_MISSING,
            what="there is no key for this sealed data",
            why="this process is no rank of a job, no serving worker and no session of the owner",
            todo="pass data_key=, work inside `with cloister.session():`, or submit the script as a job",
        )
    return _active[-1]


def is_active() -> bool:
    """Say whether keys are found by themselves in this process."""
    return bool(_active)
