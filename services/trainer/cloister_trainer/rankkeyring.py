# SPDX-License-Identifier: Apache-2.0
"""The keyring of a rank: what its script opens or seals gets its key from the broker, as policies allow."""

from __future__ import annotations

from collections.abc import Callable

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import Peek


class RankKeyring:
    """Ask the broker for each key once; every answer is a decision in its log."""

    def __init__(self, release: Callable[[str, Peek | None], DataKey], output_key_uri: str) -> None:
        """`release` gets the data key that a peek names, or with None a new one, under a key."""
        self._release = release
        self._output_key_uri = output_key_uri
        self._known: dict[bytes, DataKey] = {}

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        if wrapped not in self._known:
            self._known[wrapped] = self._release(key_uri, Peek(manifest_digest, key_uri, key_version, wrapped))
        return self._known[wrapped]

    def new(self, key_uri: str = "") -> DataKey:
        uri = key_uri or self._output_key_uri
        if not uri:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what="there is no key to seal with",
                why="the job was submitted without an output, and no key was named",
                todo="submit it with --output and --output-key, or name a key",
            )
        made = self._release(uri, None)
        self._known[made.wrapped] = made
        return made
