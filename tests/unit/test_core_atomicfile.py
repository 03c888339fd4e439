# SPDX-License-Identifier: Apache-2.0
"""A file is there whole, or as it was before."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.atomicfile import AtomicFile, write_atomically
from cloister.errors import CloisterError, Code
from cloister.runtime.endpoints import read_endpoints, write_endpoints


def test_a_file_is_replaced_with_the_mode_asked_for_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomically(path, b"new", mode=0o644)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted() -> None:
        with AtomicFile(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory in which a megabyte does not fit: a tiny tmpfs for root, a file size limit for others."""
    target = tmp_path / "disk"
    target.mkdir()
    if os.geteuid() == 0:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(target)], check=False, capture_output=True
        )
        if mounted.returncode == 0:
            yield target
            subprocess.run(["umount", str(target)], check=True)
            return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, before[1]))
    yield target
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_no_trace(small_disk: Path) -> None:
    path = small_disk / "file"
    write_atomically(path, b"old")
    with pytest.raises(CloisterError) as caught:
        write_atomically(path, bytes(1024 * 1024))
    assert caught.value.code is Code.DISK_FULL
    assert str(path) in caught.value.what
    assert path.read_bytes() == b"old"
    assert os.listdir(small_disk) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_directory_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        write_atomically(tmp_path / "none" / "file", b"")
    assert caught.value.code is Code.FILE_NOT_FOUND
    assert "none/file" in caught.value.what


def test_endpoints_survive_their_file_and_only_they_do(tmp_path: Path) -> None:
    path = tmp_path / "run" / "endpoints.json"
    with pytest.raises(CloisterError) as caught:
        read_endpoints(path)
    assert caught.value.code is Code.FILE_NOT_FOUND
    write_endpoints(path, {"grpc": "127.0.0.1:1"})
    assert read_endpoints(path) == {"grpc": "127.0.0.1:1"}
    for broken in (b"", b"[]", json.dumps({"grpc": 1}).encode(), b"\xff", b" " * 20_000):
        path.write_bytes(broken)
        with pytest.raises(CloisterError) as caught:
            read_endpoints(path)
        assert caught.value.code is Code.CONFIG_INVALID
