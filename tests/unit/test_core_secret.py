# SPDX-License-Identifier: Apache-2.0
"""Claims about SecretBytes: nothing but reveal() gives the bytes away."""

from __future__ import annotations

import copy
import json
import pickle
import traceback

import pytest

from cloister.secret import SecretBytes

MATERIAL = b"not to be seen anywhere"
SECRET = SecretBytes(MATERIAL)


def test_reveal_returns_the_bytes() -> None:
    assert SECRET.reveal() == MATERIAL
    assert len(SECRET) == len(MATERIAL)


@pytest.mark.parametrize("shown", [repr(SECRET), str(SECRET), f"{SECRET}", f"{SECRET:>40}", f"{[SECRET]}"])
def test_no_way_of_printing_shows_the_bytes(shown: str) -> None:
    assert "not to be seen" not in shown
    assert f"<secret, {len(MATERIAL)} bytes>" in shown


def test_a_traceback_of_an_error_about_a_secret_does_not_show_it() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError:
        assert "not to be seen" not in traceback.format_exc()


@pytest.mark.parametrize("smuggle", [pickle.dumps, copy.copy, copy.deepcopy, json.dumps])
def test_a_secret_cannot_be_pickled_copied_or_encoded(smuggle: object) -> None:
    with pytest.raises(TypeError):
        smuggle(SECRET)  # type: ignore[operator]


def test_equality_compares_contents_and_only_with_secrets() -> None:
    assert SecretBytes(MATERIAL) == SECRET
    assert SecretBytes(b"other") != SECRET
    assert SECRET != MATERIAL


def test_a_secret_cannot_be_a_dictionary_key() -> None:
    with pytest.raises(TypeError):
        hash(SECRET)


def test_a_secret_does_not_change_with_the_buffer_it_was_made_from() -> None:
    buffer = bytearray(b"abc")
    secret = SecretBytes(buffer)
    buffer[0] = 0
    assert secret.reveal() == b"abc"
