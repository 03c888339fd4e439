# SPDX-License-Identifier: Apache-2.0
"""The keyring of a process: the innermost one counts, and without one there is a clear error."""

from __future__ import annotations

import pytest

from cloister.data import keyring
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from fakes.sealed_material import data_key


class One:
    """A keyring that has one key."""

    def __init__(self, name: str) -> None:
        self.name = name

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        return data_key(self.name)

    def new(self, key_uri: str = "") -> DataKey:
        return data_key(self.name)


def test_without_a_keyring_the_error_says_what_to_do() -> None:
    assert not keyring.is_active()
    with pytest.raises(CloisterError) as caught:
        keyring.current()
    assert caught.value.code is Code.KEYRING_MISSING
    assert "data_key" in caught.value.todo


def test_the_innermost_keyring_counts_and_leaves_with_its_block() -> None:
    with keyring.using(One("outer")) as outer:
        assert keyring.current() is outer
        with keyring.using(One("inner")) as inner:
            assert keyring.current() is inner
        assert keyring.current() is outer
    assert not keyring.is_active()
