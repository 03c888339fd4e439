# SPDX-License-Identifier: Apache-2.0
"""Model archives: what is packed is what is unpacked, and torch-model-archiver's own files are read."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from cloister.data.archive import build_archive, extract_sealed, read_archive
from cloister.errors import CloisterError, Code
from fakes.serving_archives import HANDLER, good_entries, packed, sealed_bytes


@pytest.fixture
def sealed_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "sealed"
    (directory / "parts").mkdir(parents=True)
    (directory / "cloister-manifest.json").write_bytes(b"{}")
    (directory / "vocab.txt.sealed").write_bytes(sealed_bytes("vocab.txt"))
    (directory / "parts" / "model.safetensors.sealed").write_bytes(sealed_bytes("parts/model.safetensors", b"w" * 9000))
    return directory


def test_what_is_packed_is_what_is_unpacked(sealed_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.mar"
    digest = build_archive(sealed_directory, out, handler_source=HANDLER)
    assert digest == hashlib.sha384(out.read_bytes()).digest()
    target = tmp_path / "unpacked"
    target.mkdir()
    with out.open("rb") as file:
        archive = read_archive(file)
        extract_sealed(file, archive, target)
    assert archive.handler_source == HANDLER
    assert archive.handler_name == "text_classifier.py"
    names = {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()}
    wanted = {
        p.relative_to(sealed_directory).as_posix(): p.read_bytes() for p in sealed_directory.rglob("*") if p.is_file()
    }
    assert names == wanted


def test_the_same_content_gives_the_same_bytes(sealed_directory: Path, tmp_path: Path) -> None:
    one = build_archive(sealed_directory, tmp_path / "1.mar", handler_source=HANDLER)
    for path in sealed_directory.rglob("*"):
        path.touch()
    assert build_archive(sealed_directory, tmp_path / "2.mar", handler_source=HANDLER) == one
    assert build_archive(sealed_directory, tmp_path / "3.mar", handler_source=HANDLER + b"#") != one


def test_an_archive_of_the_stock_archiver_is_read(sealed_directory: Path, tmp_path: Path) -> None:
    handler = tmp_path / "my_handler.py"
    handler.write_bytes(HANDLER)
    holder = tmp_path / "holder"
    holder.mkdir()
    sealed_directory.rename(holder / "model")
    command = [sys.executable, "-m", "model_archiver.model_packaging", "--model-name", "reviews", "--version", "1.0"]
    command += ["--handler", str(handler), "--extra-files", str(holder), "--export-path", str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env={"TMPDIR": str(tmp_path)})
    with (tmp_path / "reviews.mar").open("rb") as file:
        archive = read_archive(file)
    assert archive.model_name == "reviews"
    assert archive.handler_source == HANDLER
    assert set(archive.sealed_files) == {
        "cloister-manifest.json",
        "vocab.txt.sealed",
        "parts/model.safetensors.sealed",
    }


def test_a_directory_that_is_not_sealed_is_not_packed(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CloisterError) as caught:
        build_archive(tmp_path, tmp_path / "m.mar", handler_source=HANDLER)
    assert caught.value.code is Code.NOT_SEALED
    assert not (tmp_path / "m.mar").exists()


def test_plaintext_among_sealed_files_is_not_packed(sealed_directory: Path, tmp_path: Path) -> None:
    (sealed_directory / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(CloisterError) as caught:
        build_archive(sealed_directory, tmp_path / "m.mar", handler_source=HANDLER)
    assert caught.value.code is Code.ARCHIVE_INVALID
    assert not (tmp_path / "m.mar").exists()


def test_a_failed_build_leaves_the_old_archive(sealed_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.mar"
    build_archive(sealed_directory, out, handler_source=HANDLER)
    before = out.read_bytes()
    (sealed_directory / "link.sealed").symlink_to("/etc/passwd")
    with pytest.raises(CloisterError):
        build_archive(sealed_directory, out, handler_source=HANDLER)
    assert out.read_bytes() == before


def test_a_compressed_archive_is_read() -> None:
    assert read_archive(packed(good_entries(), method=zipfile.ZIP_DEFLATED)).handler_name == "h.py"
