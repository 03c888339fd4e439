# SPDX-License-Identifier: Apache-2.0
"""Keyrings for tests: they hold data keys by what is wrapped, as a broker would give them out."""

from __future__ import annotations

import hashlib
import os

from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.secret import SecretBytes
from fakes.sealed_material import KEY_URI, data_key


class Ring:
    """Knows the test key of this name and every key it made itself; keeps what it was asked for."""

    def __init__(self, *names: str) -> None:
        keys = [data_key(name) for name in names or ("one",)]
        self._keys = {(key.key_uri, key.wrapped): key for key in keys}
        self.asked: list[tuple[str, int, bytes]] = []  # key URI, version, manifest digest

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        self.asked.append((key_uri, key_version, manifest_digest))
        key = self._keys.get((key_uri, wrapped))
        if key is None or key.key_version != key_version:
            raise CloisterError(Code.RELEASE_DENIED, what=f"no key of {key_uri} for this", why="a test says so")
        return key

    def new(self, key_uri: str = "") -> DataKey:
        secret = os.urandom(32)
        wrapped = b"made " + hashlib.sha256(secret).digest()
        made = DataKey(SecretBytes(secret), wrapped, key_uri or KEY_URI, 2)
        self._keys[made.key_uri, wrapped] = made
        return made
