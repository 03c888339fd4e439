# SPDX-License-Identifier: Apache-2.0
"""The drop-in for torch.save and torch.load: as BigDL Nano's users know it, without what it weakened."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.fernet import Fernet

from cloister.data import EncryptedDataset, keyring, patch_encryption, unpatch_encryption
from cloister.data.patch import guarded
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.stream import SealedWriter, is_sealed
from cloister.secret import SecretBytes
from fakes.sealed_material import data_key

KEY = base64.urlsafe_b64encode(bytes(range(32))).decode()
STATE = {"w": torch.arange(6.0), "step": 3}


class Ring:
    """The keyring of a job."""

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        return data_key("job")

    def new(self, key_uri: str = "") -> DataKey:
        return data_key("job")


@pytest.fixture
def patched() -> Iterator[None]:
    own = torch.save, torch.load
    patch_encryption()
    patch_encryption()
    yield
    unpatch_encryption()
    assert (torch.save, torch.load) == own


def same(loaded: Any) -> bool:
    return torch.equal(loaded["w"], STATE["w"]) and loaded["step"] == STATE["step"]


def legacy(obj: Any, key: str = KEY) -> bytes:
    """What BigDL Nano wrote: a Fernet token over what torch.save wrote."""
    plain = io.BytesIO()
    torch.save(obj, plain)
    return Fernet(key).encrypt(plain.getvalue())


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("kind", [str, Path, os.fspath, lambda path: _PathLike(path)])
def test_a_file_is_sealed_and_comes_back(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "model.pt"
    torch.save(STATE, kind(path), encryption_key=KEY)
    assert is_sealed(path)
    assert b"step" not in path.read_bytes()
    assert same(torch.load(kind(path), decryption_key=KEY))
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


class _PathLike:
    """A path that is neither text nor a Path."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


@pytest.mark.usefixtures("patched")
def test_a_buffer_and_an_open_file_are_sealed_and_come_back(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(STATE, buffer, encryption_key=KEY)
    buffer.seek(0)
    assert same(torch.load(buffer, decryption_key=KEY))
    with (tmp_path / "model.pt").open("w+b") as file:
        torch.save(STATE, file, encryption_key=KEY)
        file.seek(0)
        assert same(torch.load(file, decryption_key=KEY))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("form", ["text", "bytes", "raw", "standard", "secret", "data key"])
def test_a_key_may_be_given_in_every_form_that_users_have(form: str) -> None:
    raw = base64.urlsafe_b64decode(KEY)
    key = {
        "text": KEY,
        "bytes": KEY.encode(),
        "raw": raw,
        "standard": base64.standard_b64encode(raw),
        "secret": SecretBytes(raw),
        "data key": DataKey(SecretBytes(raw), b"w", data_key().key_uri, 1),
    }[form]
    buffer = io.BytesIO()
    torch.save(STATE, buffer, encryption_key=key)
    buffer.seek(0)
    if form != "data key":  # its own URI stands in the header
        assert same(torch.load(buffer, decryption_key=KEY))
    else:
        assert same(torch.load(buffer, decryption_key=key))


@pytest.mark.usefixtures("patched")
def test_old_fernet_files_are_read_with_their_key(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    path.write_bytes(legacy(STATE))
    assert same(torch.load(path, decryption_key=KEY))
    assert same(torch.load(io.BytesIO(path.read_bytes()), decryption_key=KEY))
    with pytest.raises(CloisterError, match="does not open"):
        torch.load(path, decryption_key=Fernet.generate_key())


@pytest.mark.usefixtures("patched")
def test_without_a_key_torch_is_as_it_was(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.pt")
    assert same(torch.load(tmp_path / "plain.pt"))
    assert same(torch.load(tmp_path / "plain.pt", "cpu", weights_only=True, mmap=True))
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pt")
    with pytest.raises(Exception, match="weights_only"):
        torch.load(tmp_path / "module.pt")  # the default that the original switched off
    with pytest.raises(FileNotFoundError):
        torch.load(tmp_path / "missing.pt")


@pytest.mark.usefixtures("patched")
def test_weights_only_stays_the_default_under_seal(tmp_path: Path) -> None:
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(1, 1), path, encryption_key=KEY)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(path, decryption_key=KEY)
    assert isinstance(torch.load(path, decryption_key=KEY, weights_only=False), torch.nn.Linear)
    torch.save(STATE, path, encryption_key=KEY)
    assert same(torch.load(path, "cpu", decryption_key=KEY, weights_only=True))


@pytest.mark.usefixtures("patched")
@pytest.mark.parametrize("key", ["", "short", "x" * 44, b"\xff" * 31, KEY[:-2]])
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path: Path, key: str | bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        torch.save(STATE, tmp_path / "m", encryption_key=key)
    assert caught.value.code is Code.ARGUMENT_INVALID
    assert not key or str(key) not in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.usefixtures("patched")
def test_plaintext_and_changed_files_are_refused_where_a_key_is_given(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "plain.pt")
    with pytest.raises(CloisterError) as caught:
        torch.load(tmp_path / "plain.pt", decryption_key=KEY)
    assert caught.value.code is Code.NOT_SEALED
    torch.save(STATE, tmp_path / "m", encryption_key=KEY)
    with pytest.raises(CloisterError, match="CLO-1401"):
        torch.load(tmp_path / "m", decryption_key=Fernet.generate_key())
    data = bytearray((tmp_path / "m").read_bytes())
    data[-40] ^= 1
    (tmp_path / "m").write_bytes(data)
    with pytest.raises(CloisterError, match="CLO-1401"):
        torch.load(tmp_path / "m", decryption_key=KEY)


@pytest.mark.usefixtures("patched")
def test_a_sealed_file_cannot_be_mapped(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "m", encryption_key=KEY)
    with pytest.raises(CloisterError, match="mapped"):
        torch.load(tmp_path / "m", decryption_key=KEY, mmap=True)


@pytest.mark.usefixtures("patched")
def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m"
    torch.save(STATE, path, encryption_key=KEY)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"(?i)pickle"):
        torch.save({"w": torch.ones(1), "f": lambda: 1}, path, encryption_key=KEY)
    assert path.read_bytes() == before


@pytest.mark.usefixtures("patched")
def test_in_a_job_the_key_is_found_by_itself(tmp_path: Path) -> None:
    with keyring.using(Ring()):
        torch.save(STATE, tmp_path / "m")
        assert is_sealed(tmp_path / "m")
        assert same(torch.load(tmp_path / "m"))
        plain = io.BytesIO()
        torch.save(STATE, plain)  # memory is not a file
        assert plain.getvalue()[:2] == b"PK"
    with pytest.raises(CloisterError) as caught:
        torch.load(tmp_path / "m")
    assert caught.value.code is Code.KEYRING_MISSING


@pytest.mark.parametrize("target", [str, Path, lambda path: path.open("wb")])
def test_under_guard_plaintext_does_not_reach_a_file(tmp_path: Path, target: Any) -> None:
    own = torch.save
    with guarded():
        with pytest.raises(CloisterError) as caught:
            torch.save(STATE, target(tmp_path / "m"))
        assert caught.value.code is Code.PLAINTEXT_REFUSED
        assert not (tmp_path / "m").exists() or not (tmp_path / "m").read_bytes()
        buffer = io.BytesIO()
        torch.save(STATE, buffer)
        torch.save(STATE, tmp_path / "sealed", encryption_key=KEY)
        assert is_sealed(tmp_path / "sealed")
    assert torch.save is own
    torch.save(STATE, tmp_path / "m")


def test_under_guard_the_patch_seals_and_its_removal_does_not_open_a_hole(tmp_path: Path) -> None:
    with guarded(), keyring.using(Ring()):
        patch_encryption()
        torch.save(STATE, tmp_path / "m")
        assert is_sealed(tmp_path / "m")
        unpatch_encryption()
        with pytest.raises(CloisterError, match="CLO-1407"):
            torch.save(STATE, tmp_path / "n")


def test_a_sealed_writer_is_no_plaintext(tmp_path: Path) -> None:
    from cloister.sealed.format import AssociatedData

    with guarded(), SealedWriter(tmp_path / "m", data_key=data_key(), associated=AssociatedData("d", "m")) as file:
        torch.save(STATE, file)
    assert is_sealed(tmp_path / "m")


def test_an_old_data_set_is_read_whole(tmp_path: Path) -> None:
    rows = [{"text": "好", "label": 1}, {"text": "bad", "label": 0}]
    (tmp_path / "train").write_bytes(legacy(rows))
    data = EncryptedDataset(tmp_path / "train", KEY)
    assert (len(data), data[1]) == (2, rows[1])
    (tmp_path / "evil").write_bytes(legacy([torch.nn.Linear(1, 1)]))
    with pytest.raises(Exception, match="weights_only"):
        EncryptedDataset(tmp_path / "evil", KEY)


def test_the_guard_waits_for_torch_to_be_imported(tmp_path: Path) -> None:
    script = """
import sys
from cloister.data import guard_plaintext
guard_plaintext()
assert "torch" not in sys.modules
import torch
torch.save({}, sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "m")], capture_output=True, text=True)
    assert "CLO-1407" in done.stderr
    assert not (tmp_path / "m").exists()
