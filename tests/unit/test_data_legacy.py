# SPDX-License-Identifier: Apache-2.0
"""Fernet files of BigDL and Nano: read with their own key, refused with any other."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from cryptography.fernet import Fernet

from cloister.data.legacy import is_legacy, open_legacy, read_key, read_legacy
from cloister.errors import CloisterError, Code
from cloister.secret import SecretBytes

RAW = bytes(range(224, 256))  # its base64 has + and / in the standard alphabet
KEY = base64.urlsafe_b64encode(RAW)
# The example of the Fernet specification: key, time and IV are its own.
SPEC_KEY = b"cw_0x689RpI-jtRR7oE8h_eQsKImvJapLeSbXpwF4e4="
SPEC_TOKEN = b"gAAAAAAdwJ6wAAECAwQFBgcICQoLDA0ODy021cpGVWKZ_eEwCGM4BLLF_5CV9dOPmrhuVUPgJobwOz7JcbmrR64jVmpU4IwqDA=="


def test_the_example_of_the_specification_opens() -> None:
    assert open_legacy(SPEC_TOKEN, SecretBytes(SPEC_KEY), name="spec") == b"hello"
    assert is_legacy(SPEC_TOKEN)


@pytest.mark.parametrize("written", [KEY, KEY + b"\n", RAW, base64.standard_b64encode(RAW)])
def test_a_key_is_read_however_it_was_written(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "key").write_bytes(written)
    (tmp_path / "data").write_bytes(Fernet(KEY).encrypt(b"content"))
    assert read_legacy(tmp_path / "data", read_key(tmp_path / "key")) == b"content"


@pytest.mark.parametrize("written", [b"", b"short", KEY[:-4], b"\xff" * 40, b"x" * 5000])
def test_what_is_no_key_is_refused(tmp_path: Path, written: bytes) -> None:
    (tmp_path / "key").write_bytes(written)
    with pytest.raises(CloisterError, match="no Fernet key") as caught:
        read_key(tmp_path / "key")
    assert caught.value.code is Code.DATA_INVALID


def test_a_changed_file_or_another_key_is_refused(tmp_path: Path) -> None:
    token = Fernet(KEY).encrypt(b"content")
    other = SecretBytes(Fernet.generate_key())
    for data, key in ((token[:-5] + b"AAAA=", SecretBytes(KEY)), (token, other), (b"gAAAA", other), (b"", other)):
        with pytest.raises(CloisterError, match="does not open"):
            open_legacy(data, key, name="data")


def test_other_files_do_not_look_like_it() -> None:
    assert not is_legacy(b"CLOISTER")
    assert not is_legacy(b"")
