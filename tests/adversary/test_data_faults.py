# SPDX-License-Identifier: Apache-2.0
"""Disks that fail, files that answer short, two writers at once, tracebacks: an error that names it, and no secret."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cloister.data import load, parquet, save
from cloister.data.dataset import SealedDataset
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.sealed.format import AssociatedData
from cloister.sealed.stream import SealedReader, SealedWriter
from fakes.sealed_material import ROOT, content, data_key, sealed_bytes

PLAIN = content(5000)


class Faulty(io.BytesIO):
    """A file that takes and gives a few bytes at a time, and fails at the n-th call."""

    def __init__(self, data: bytes = b"", *, fails_at: int = -1, error: int = errno.EIO, most: int = 7) -> None:
        super().__init__(data)
        self.calls = 0
        self._fails_at = fails_at
        self._error = error
        self._most = most

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self._fails_at:
            raise OSError(self._error, os.strerror(self._error))

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(self._most if size is None or size < 0 else min(size, self._most))

    def readinto(self, buffer: Any, /) -> int:
        self._count()
        return super().readinto(memoryview(buffer)[: self._most])

    def write(self, data: Any, /) -> int:
        self._count()
        return super().write(memoryview(data).cast("B")[: self._most])


def write(file: Any) -> None:
    about = AssociatedData("reviews", "train.tsv")
    with SealedWriter(file, data_key=data_key(), associated=about, segment_size=256) as writer:
        for at in range(0, len(PLAIN), 333):
            writer.write(PLAIN[at : at + 333])


def read(file: Any) -> bytes:
    with SealedReader(file, data_key=data_key(), name="train.tsv") as reader:
        return reader.readall()


def calls_of(action: Callable[[Any], Any], file: Faulty) -> int:
    action(file)
    return file.calls


def test_short_reads_and_short_writes_lose_nothing() -> None:
    out = Faulty()
    write(out)
    assert read(Faulty(out.getvalue())) == PLAIN
    assert read(Faulty(sealed_bytes(PLAIN), most=1)) == PLAIN


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.ESTALE])
def test_every_write_that_can_fail_is_reported(error: int) -> None:
    for at in range(1, calls_of(write, Faulty(most=500)) + 1):
        with pytest.raises(CloisterError) as caught:
            write(Faulty(fails_at=at, error=error, most=500))
        assert caught.value.code is (Code.DISK_FULL if error == errno.ENOSPC else Code.IO_FAILED)
        assert "train.tsv" in caught.value.what


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_every_read_that_can_fail_is_reported(error: int) -> None:
    sealed = sealed_bytes(PLAIN)
    for at in range(1, calls_of(read, Faulty(sealed, most=500)) + 1):
        with pytest.raises(CloisterError) as caught:
            read(Faulty(sealed, fails_at=at, error=error, most=500))
        assert caught.value.code is Code.IO_FAILED
        assert "train.tsv" in caught.value.what


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(sealed_bytes(content(2_000_000), segment_size=4096))
    with SealedReader(path, data_key=data_key()) as reader:
        reader.read(10)
        os.truncate(path, 500_000)
        with pytest.raises(CloisterError) as caught:
            reader.readall()
    assert caught.value.code in {Code.IO_FAILED, Code.SEALED_FILE_INVALID}


SEAL = """
import sys
from pathlib import Path
from cloister.errors import CloisterError
from cloister.sealed.directory import seal_directory
from fakes.sealed_material import data_key
source, out = map(Path, sys.argv[1:])
print("ready", flush=True)
sys.stdin.readline()
try:
    seal_directory(source, out, data_key=data_key(), dataset="d")
    print("sealed")
except CloisterError as error:
    print(error.code.text)
"""


def test_of_processes_that_seal_the_same_directory_one_does_it_and_the_others_are_told(tmp_path: Path) -> None:
    source, out = tmp_path / "plain", tmp_path / "sealed"
    source.mkdir()
    for number in range(200):
        (source / f"{number}").write_bytes(content(20_000, salt=str(number)))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEAL, str(source), str(out)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    for process in processes:  # all of them are at the same place now
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said[-1] == "sealed"
    assert said[:2] == [Code.FILE_EXISTS.text] * 2
    opened = SealedDirectory.open(out, data_key=data_key())
    assert all(opened.read(str(number)) == content(20_000, salt=str(number)) for number in range(200))


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


def _load_damaged(base: Path) -> None:
    save({"w": torch.ones(100)}, base / "a.pt", data_key=data_key())
    damaged(base / "a.pt")
    load(base / "a.pt", data_key=data_key())


def _read_damaged(base: Path) -> None:
    (base / "plain").mkdir()
    (base / "plain" / "a.jsonl").write_text('{"a": 1}\n' * 100)
    seal_directory(base / "plain", base / "sealed", data_key=data_key(), dataset="d")
    damaged(base / "sealed" / "a.jsonl.sealed")
    SealedDataset(base / "sealed", data_key=data_key())[0]


def _unwrap_damaged(_base: Path) -> None:
    text = parquet.wrap(data_key(), b"p" * 32)
    parquet.unwrap(text, lambda *_: data_key("two").secret)


def _unsaveable(base: Path) -> None:
    save({"w": object()}, base / "a.pt", data_key=data_key())


def _unwritable(base: Path) -> None:
    save({"w": torch.ones(3)}, base / "none" / "a.pt", data_key=data_key())


@pytest.mark.parametrize("action", [_load_damaged, _read_damaged, _unwrap_damaged, _unsaveable, _unwritable])
def test_no_key_is_in_a_traceback_with_all_its_local_variables(tmp_path: Path, action: Callable[[Path], None]) -> None:
    """What error reporters send: every frame's variables, of the cause and the context as well."""
    with pytest.raises(CloisterError) as caught:
        action(tmp_path)
    shown = "".join(traceback.TracebackException.from_exception(caught.value, capture_locals=True).format())
    shown += "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    for name in ("one", "two"):
        secret = data_key(name).secret.reveal()
        for form in (repr(secret)[2:-1], secret.hex(), repr(bytearray(secret))[12:-2], str(list(secret))[1:-1]):
            assert form not in shown
    with contextlib.suppress(OSError):
        (tmp_path / "a.pt").unlink()
