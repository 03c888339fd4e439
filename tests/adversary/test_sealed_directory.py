# SPDX-License-Identifier: Apache-2.0
"""Whoever holds the storage changes a sealed directory: every change is refused and names what was changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.sealed.manifest import MANIFEST_NAME, Manifest
from fakes.sealed_material import content, data_key, sealed_bytes


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A sealed directory of three files, one of them in a folder."""
    return make(tmp_path, "sealed")


def make(tmp_path: Path, name: str, *, salt: str = "", version: int = 1) -> Path:
    source = tmp_path / f"{name}-source"
    (source / "sub").mkdir(parents=True)
    for path in ("train.tsv", "test.tsv", "sub/more.tsv"):
        (source / path).write_bytes(content(3000, salt=path + salt))
    seal_directory(source, tmp_path / name, data_key=data_key(), dataset="reviews", version=version, segment_size=1024)
    return tmp_path / name


def read_all(path: Path) -> None:
    directory = SealedDirectory.open(path, data_key=data_key())
    for name in directory.files:
        directory.read(name)


def refused(path: Path, code: Code, *names: str) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        read_all(path)
    assert caught.value.code is code
    for name in names:
        assert name in str(caught.value)
    return caught.value


def test_an_unchanged_directory_opens(sealed: Path) -> None:
    read_all(sealed)


def test_an_added_file_is_refused(sealed: Path) -> None:
    shutil.copy(sealed / "train.tsv.sealed", sealed / "extra.tsv.sealed")
    refused(sealed, Code.SEALED_DIRECTORY_MISMATCH, "extra.tsv.sealed", "added")


def test_an_added_plain_file_is_refused_in_a_folder_too(sealed: Path) -> None:
    (sealed / "sub" / "more.tsv").write_text("label\ttext_a\n")
    refused(sealed, Code.SEALED_DIRECTORY_MISMATCH, "sub/more.tsv")


def test_a_removed_file_is_refused(sealed: Path) -> None:
    (sealed / "sub" / "more.tsv.sealed").unlink()
    refused(sealed, Code.SEALED_DIRECTORY_MISMATCH, "sub/more.tsv", "missing")


def test_a_renamed_file_is_refused(sealed: Path) -> None:
    (sealed / "test.tsv.sealed").rename(sealed / "dev.tsv.sealed")
    refused(sealed, Code.SEALED_DIRECTORY_MISMATCH, "dev.tsv.sealed")


def test_two_swapped_files_are_refused(sealed: Path) -> None:
    (sealed / "test.tsv.sealed").rename(sealed / "x")
    (sealed / "train.tsv.sealed").rename(sealed / "test.tsv.sealed")
    (sealed / "x").rename(sealed / "train.tsv.sealed")
    refused(sealed, Code.SEALED_FILE_INVALID, "test.tsv", "renamed or swapped")


def test_an_older_version_of_a_file_is_refused_though_it_is_authentic(sealed: Path, tmp_path: Path) -> None:
    older = make(tmp_path, "older", salt="old")
    read_all(older)
    shutil.copy(older / "train.tsv.sealed", sealed / "train.tsv.sealed")
    refused(sealed, Code.SEALED_FILE_INVALID, "train.tsv", "older or a newer version")


@pytest.mark.parametrize("other", ["older/sub/more.tsv.sealed", "sealed/train.tsv.sealed"], ids=["older", "swapped"])
def test_the_file_that_names_the_key_is_named_when_it_is_another(other: str, sealed: Path, tmp_path: Path) -> None:
    # Its header says which data key to ask for: another version's would make the manifest look forged.
    make(tmp_path, "older", salt="old")
    shutil.copy(tmp_path / other, sealed / "sub/more.tsv.sealed")
    with pytest.raises(CloisterError) as caught:
        SealedDirectory.peek(sealed)
    assert caught.value.code is Code.SEALED_DIRECTORY_MISMATCH
    assert "sub/more.tsv" in str(caught.value)


def test_a_file_of_another_dataset_under_the_same_key_is_refused(sealed: Path) -> None:
    (sealed / "train.tsv.sealed").write_bytes(sealed_bytes(b"x", path="test.tsv"))
    refused(sealed, Code.SEALED_FILE_INVALID, "train.tsv")


def test_a_cut_file_is_refused(sealed: Path) -> None:
    file = sealed / "train.tsv.sealed"
    file.write_bytes(file.read_bytes()[:-1])
    refused(sealed, Code.SEALED_FILE_INVALID, "train.tsv")


def test_a_plain_file_in_place_of_a_sealed_one_is_refused(sealed: Path) -> None:
    (sealed / "train.tsv.sealed").write_text("label\ttext_a\n1\tgood\n")
    refused(sealed, Code.SEALED_FILE_INVALID, "train.tsv", "does not begin like a sealed file")


def test_a_link_in_place_of_a_file_is_refused(sealed: Path, tmp_path: Path) -> None:
    (sealed / "train.tsv.sealed").rename(tmp_path / "elsewhere")
    (sealed / "train.tsv.sealed").symlink_to(tmp_path / "elsewhere")
    refused(sealed, Code.SEALED_DIRECTORY_MISMATCH, "train.tsv", "regular file")


def test_a_directory_without_manifest_is_not_sealed(sealed: Path) -> None:
    (sealed / MANIFEST_NAME).unlink()
    refused(sealed, Code.NOT_SEALED, str(sealed))
    with pytest.raises(CloisterError, match="CLO-1404"):
        SealedDirectory.peek(sealed)


def test_no_bit_of_a_manifest_can_be_changed(sealed: Path) -> None:
    manifest = sealed / MANIFEST_NAME
    original = manifest.read_bytes()
    for position in range(len(original)):
        changed = bytearray(original)
        changed[position] ^= 1 << (position % 7)
        manifest.write_bytes(changed)
        refused(sealed, Code.MANIFEST_INVALID)


def test_a_cut_or_extended_manifest_is_refused(sealed: Path) -> None:
    manifest = sealed / MANIFEST_NAME
    original = manifest.read_bytes()
    for data in (b"", original[:-1], original + b"\n", b" " + original, original + original):
        manifest.write_bytes(data)
        refused(sealed, Code.MANIFEST_INVALID)


def edit_dropped(document: dict[str, object]) -> None:
    assert isinstance(document["files"], list)
    del document["files"][0]


def edit_version(document: dict[str, object]) -> None:
    document["version"] = 2


@pytest.mark.parametrize("edit", [edit_dropped, edit_version])
def test_a_well_formed_edit_without_the_key_is_refused(sealed: Path, edit: Callable[[dict[str, object]], None]) -> None:
    manifest = sealed / MANIFEST_NAME
    document = json.loads(manifest.read_bytes())
    edit(document)
    manifest.write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    error = refused(sealed, Code.MANIFEST_INVALID)
    assert "changed, or made under another key" in error.why


def test_a_manifest_under_another_key_is_refused(sealed: Path) -> None:
    original = Manifest.parse((sealed / MANIFEST_NAME).read_bytes())
    (sealed / MANIFEST_NAME).write_bytes(original.signed(data_key("two").secret).to_bytes())
    refused(sealed, Code.MANIFEST_INVALID)


def test_another_authentic_version_is_refused_when_one_was_asked_for(sealed: Path, tmp_path: Path) -> None:
    asked = SealedDirectory.peek(sealed).manifest_digest
    older = make(tmp_path, "older", salt="old")
    SealedDirectory.open(sealed, data_key=data_key(), manifest_digest=asked)
    with pytest.raises(CloisterError) as caught:
        SealedDirectory.open(older, data_key=data_key(), manifest_digest=asked)
    assert caught.value.code is Code.SEALED_DIRECTORY_MISMATCH


@pytest.mark.parametrize(
    "path", ["../escape", "/etc/passwd", "a/../../b", "a//b", ".", "a\\b", "a\x00b", "", "x.sealed"]
)
def test_a_path_that_leaves_the_directory_is_refused_even_from_the_holder_of_the_key(sealed: Path, path: str) -> None:
    document = json.loads((sealed / MANIFEST_NAME).read_bytes())
    document["files"] = [document["files"][0] | {"path": path}]
    (sealed / MANIFEST_NAME).write_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    refused(sealed, Code.MANIFEST_INVALID, "path")
    with pytest.raises(CloisterError, match="CLO-1402"):
        SealedDirectory.peek(sealed)


def test_a_manifest_with_a_doubled_field_is_refused(sealed: Path) -> None:
    """JSON readers differ in which of two equal keys they take."""
    data = (sealed / MANIFEST_NAME).read_bytes()
    (sealed / MANIFEST_NAME).write_bytes(data.replace(b'"version":1', b'"version":2,"version":1'))
    refused(sealed, Code.MANIFEST_INVALID, "canonical")
