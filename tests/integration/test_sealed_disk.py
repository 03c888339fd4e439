# SPDX-License-Identifier: Apache-2.0
"""Full disks and killed writers: the old file stays whole, and plaintext is never on the disk."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloister.atomicfile import write_atomically
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter, seal_directory
from cloister.sealed.format import AssociatedData
from cloister.sealed.manifest import MANIFEST_NAME
from cloister.sealed.stream import SealedReader, SealedWriter
from fakes.sealed_material import ROOT, content, data_key

ABOUT = AssociatedData("reviews", "train.tsv")
TOO_MUCH = 3 << 20


@pytest.fixture(params=["file system", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory that takes about 1 MiB: a file system of its own, which takes root, or a limit on file sizes."""
    path = tmp_path / "disk"
    path.mkdir()
    if request.param == "file system":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("this user cannot mount a file system; the limit on file sizes stands in")
        yield path
        subprocess.run(["umount", str(path)], check=True)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        yield path
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_a_full_disk_leaves_the_old_sealed_file_whole(disk: Path) -> None:
    path = disk / "train.tsv.sealed"
    with SealedWriter(path, data_key=data_key(), associated=ABOUT) as file:
        file.write(b"the old content")
    with (
        pytest.raises(CloisterError) as caught,
        SealedWriter(path, data_key=data_key(), associated=ABOUT) as file,
    ):
        file.write(content(TOO_MUCH))
    assert caught.value.code is Code.DISK_FULL
    assert str(path) in caught.value.what
    assert SealedReader(path, data_key=data_key()).readall() == b"the old content"
    assert names(disk) == {"train.tsv.sealed"}


def test_a_full_disk_while_sealing_a_directory_can_be_recovered_from(disk: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", disk / "out"
    source.mkdir()
    (source / "a.tsv").write_bytes(content(1000))
    (source / "b.tsv").write_bytes(content(900_000))
    # A limit on file sizes holds for the source, too; sealed it is larger by its header.
    (source / "c.tsv").write_bytes(content(1 << 20))
    with pytest.raises(CloisterError) as caught:
        seal_directory(source, out, data_key=data_key(), dataset="reviews")
    assert caught.value.code is Code.DISK_FULL
    assert MANIFEST_NAME not in names(out)
    with pytest.raises(CloisterError, match="CLO-1404"):
        SealedDirectory.open(out, data_key=data_key())
    (source / "b.tsv").unlink()
    (source / "c.tsv").write_bytes(content(5000))
    seal_directory(source, out, data_key=data_key(), dataset="reviews")
    assert SealedDirectory.open(out, data_key=data_key()).read("c.tsv") == content(5000)
    assert (source / "a.tsv").read_bytes() == content(1000)


def test_a_full_disk_for_a_checkpoint_leaves_the_one_before(disk: Path) -> None:
    with SealedDirectoryWriter(disk / "1", data_key=data_key(), dataset="checkpoints/1") as writer:
        writer.add("tensors", content(400_000))
        writer.finish()
    with (
        pytest.raises(CloisterError, match="CLO-1005"),
        SealedDirectoryWriter(disk / "2", data_key=data_key(), dataset="checkpoints/2") as writer,
    ):
        writer.add("tensors", content(TOO_MUCH))
    assert SealedDirectory.open(disk / "1", data_key=data_key()).read("tensors") == content(400_000)


def test_a_full_disk_leaves_the_old_plain_file_whole(disk: Path) -> None:
    write_atomically(disk / "state.json", b"old")
    with pytest.raises(CloisterError, match="CLO-1005"):
        write_atomically(disk / "state.json", bytes(TOO_MUCH))
    assert (disk / "state.json").read_bytes() == b"old"
    assert names(disk) == {"state.json"}


WRITER = """
import sys
from pathlib import Path
from fakes.sealed_material import content, data_key
from cloister.sealed.format import AssociatedData
from cloister.sealed.stream import SealedWriter
print("ready", flush=True)
for number in range(1_000_000):
    about = AssociatedData("reviews", "train.tsv")
    with SealedWriter(Path(sys.argv[1]), data_key=data_key(), associated=about) as file:
        for _ in range(4):
            file.write(content(300_000, salt="new"))
            print(number, flush=True)
    print("closed", flush=True)
"""


@pytest.mark.parametrize("lines", [1, 2, 4, 5, 6, 7, 11, 13, 21])
def test_a_killed_writer_leaves_one_whole_version_and_no_plaintext(tmp_path: Path, lines: int) -> None:
    """Killed at one of several places: between writes, while closing, just after."""
    path = tmp_path / "train.tsv.sealed"
    old, new = content(1000, salt="old"), content(300_000, salt="new") * 4
    with SealedWriter(path, data_key=data_key(), associated=ABOUT) as file:
        file.write(old)
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert child.stdout
    try:
        for _ in range(lines):
            assert child.stdout.readline()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with SealedReader(path, data_key=data_key()) as reader:
        found = reader.readall()
    assert found == new if lines >= 6 else found in (old, new)
    for entry in tmp_path.iterdir():
        assert new[1000:1016] not in entry.read_bytes()
        assert old[100:116] not in entry.read_bytes()


SEALER = """
import sys
from pathlib import Path
from fakes.sealed_material import data_key
from cloister.sealed.directory import seal_directory
def report(done, total, name):
    print(name, flush=True)
seal_directory(Path(sys.argv[1]), Path(sys.argv[2]), data_key=data_key(), dataset="reviews", progress=report)
"""


@pytest.mark.parametrize("lines", [1, 2, 3, 5])
def test_a_killed_sealing_of_a_directory_goes_on(tmp_path: Path, lines: int) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.tsv").write_bytes(content(200_000, salt=str(number)))
    child = subprocess.Popen(
        [sys.executable, "-c", SEALER, str(source), str(out)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )
    assert child.stdout
    for _ in range(lines):
        assert child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    if not (out / MANIFEST_NAME).exists():
        with pytest.raises(CloisterError, match="CLO-1404"):
            SealedDirectory.open(out, data_key=data_key())
        seal_directory(source, out, data_key=data_key(), dataset="reviews")
    SealedDirectory.open(out, data_key=data_key()).verify()
