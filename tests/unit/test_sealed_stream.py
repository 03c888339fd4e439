# SPDX-License-Identifier: Apache-2.0
"""One sealed file, written and read: any pieces, any seeks, whole or not at all."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.sealed.format import AssociatedData, Header
from cloister.sealed.segments import Layout
from cloister.sealed.stream import SealedReader, SealedWriter, is_sealed
from fakes.sealed_material import ROOT, boundary_lengths, content, data_key, opened, sealed_bytes

ABOUT = AssociatedData("reviews", "train.tsv")


def writer(target: Path | io.BytesIO, segment_size: int = 256) -> SealedWriter:
    return SealedWriter(target, data_key=data_key(), associated=ABOUT, segment_size=segment_size)


@pytest.mark.parametrize("segment_size", [64, 57 + 30, 256, 4096, 65536])
def test_every_length_at_a_segments_edge_reads_back(segment_size: int) -> None:
    for length in boundary_lengths(segment_size):
        plain = content(length)
        sealed = sealed_bytes(plain, segment_size=segment_size)
        assert opened(sealed) == plain
        file = io.BytesIO(sealed)
        header = Header.read(file)
        assert len(sealed) - header.size == Layout(segment_size).stream_length(length)


@given(st.lists(st.binary(max_size=700), max_size=12), st.sampled_from([64, 100, 256]))
def test_the_pieces_in_which_it_is_written_do_not_matter(pieces: list[bytes], segment_size: int) -> None:
    out = io.BytesIO()
    with writer(out, segment_size) as file:
        for piece in pieces:
            assert file.write(piece) == len(piece)
    assert file.plaintext_length == sum(map(len, pieces))
    assert opened(out.getvalue()) == b"".join(pieces)


@settings(max_examples=200)
@given(
    st.integers(0, 2000),
    st.lists(st.tuples(st.integers(0, 2200), st.one_of(st.none(), st.integers(0, 1200))), max_size=20),
    st.sampled_from([64, 256, 1024]),
)
def test_seeks_and_reads_are_those_of_a_plain_file(
    length: int, steps: list[tuple[int, int | None]], segment_size: int
) -> None:
    plain = content(length)
    expected = io.BytesIO(plain)
    reader = SealedReader(io.BytesIO(sealed_bytes(plain, segment_size=segment_size)), data_key=data_key())
    assert reader.size == length
    for offset, count in steps:
        assert reader.seek(offset) == expected.seek(offset)
        assert reader.read(-1 if count is None else count) == expected.read(count)
        assert reader.tell() == expected.tell()


def test_seeks_from_the_position_and_the_end() -> None:
    reader = SealedReader(io.BytesIO(sealed_bytes(content(1000))), data_key=data_key())
    assert reader.seek(-10, os.SEEK_END) == 990
    assert reader.read(4) == content(1000)[990:994]
    assert reader.seek(-2, os.SEEK_CUR) == 992
    assert reader.readall() == content(1000)[992:]
    assert reader.read(1) == b""
    with pytest.raises(ValueError):
        reader.seek(-1)


def test_a_buffered_reader_and_a_text_wrapper_work_on_top() -> None:
    text = "label\ttext_a\n" + "1\t很好\n" * 500
    reader = SealedReader(io.BytesIO(sealed_bytes(text.encode())), data_key=data_key())
    assert list(io.TextIOWrapper(io.BufferedReader(reader), encoding="utf-8")) == text.splitlines(keepends=True)


def test_a_key_can_be_fetched_when_the_header_is_known() -> None:
    seen: list[Header] = []

    def fetch(header: Header):  # type: ignore[no-untyped-def]
        seen.append(header)
        return data_key().secret

    assert SealedReader(io.BytesIO(sealed_bytes(b"x")), data_key=fetch).readall() == b"x"
    assert seen[0].key_uri == data_key().key_uri
    assert seen[0].wrapped == data_key().wrapped


def test_two_files_of_the_same_content_share_nothing() -> None:
    one, two = sealed_bytes(bytes(1000)), sealed_bytes(bytes(1000))
    assert Header.read(io.BytesIO(one)).associated.file_id != Header.read(io.BytesIO(two)).associated.file_id
    assert one[-900:] != two[-900:]
    assert len({one[at : at + 16] for at in range(len(one) - 900, len(one) - 16, 16)}) > 50


def test_memory_is_bounded_whatever_the_files_size(tmp_path: Path) -> None:
    piece, size = bytes(1 << 20), 48 << 20
    tracemalloc.start()
    try:
        with writer(tmp_path / "big", 65536) as file:
            for _ in range(size >> 20):
                file.write(piece)
        buffer = bytearray(1 << 20)
        with SealedReader(tmp_path / "big", data_key=data_key()) as reader:
            while reader.readinto(buffer):
                pass
            assert reader.tell() == size
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_appears_when_it_is_closed_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "f"
    file = writer(path)
    file.write(content(5000))
    assert not path.exists()
    file.close()
    assert SealedReader(path, data_key=data_key()).readall() == content(5000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with writer(path) as file:
            file.write(content(2_000_000))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_a_writer_that_is_forgotten_does_not_pass_for_finished(tmp_path: Path) -> None:
    path = tmp_path / "f"
    file = writer(path)
    file.write(b"half of it")
    del file
    gc.collect()
    assert list(tmp_path.iterdir()) == []


class Faulty(io.BytesIO):
    """A file that gives and takes little at a time, and fails when told to."""

    def __init__(self, data: bytes = b"", *, fails_after: int = 10**9, error: int = errno.EIO) -> None:
        super().__init__(data)
        self.calls, self.fails_after, self.error = 0, fails_after, error

    def _called(self) -> None:
        self.calls += 1
        if self.calls > self.fails_after:
            raise OSError(self.error, os.strerror(self.error))

    def read(self, size: int | None = -1, /) -> bytes:
        self._called()
        return super().read(min(7, size) if size and size > 0 else size)

    def readinto(self, buffer, /) -> int:  # type: ignore[no-untyped-def,override]
        self._called()
        return super().readinto(memoryview(buffer)[:11])

    def write(self, data, /) -> int:  # type: ignore[no-untyped-def,override]
        self._called()
        return super().write(memoryview(data)[:13])


def test_short_reads_and_writes_are_continued() -> None:
    out = Faulty()
    with writer(out) as file:
        file.write(content(3000))
    assert SealedReader(Faulty(out.getvalue()), data_key=data_key()).readall() == content(3000)


def test_a_read_error_is_an_io_error_and_not_a_forgery() -> None:
    sealed = sealed_bytes(content(3000))
    codes = set()
    for fails_after in range(0, 300, 9):
        with pytest.raises(CloisterError) as caught:
            SealedReader(Faulty(sealed, fails_after=fails_after), data_key=data_key()).readall()
        codes.add(caught.value.code)
    assert codes == {Code.IO_FAILED}


def test_a_failed_write_is_not_forgotten_when_the_caller_goes_on() -> None:
    """torch.save hides a full disk and writes on; the file must not come out whole-looking."""
    file = writer(Faulty(fails_after=200, error=errno.ENOSPC))
    with pytest.raises(CloisterError) as first:
        file.write(content(4 << 20))
    assert first.value.code is Code.DISK_FULL
    with pytest.raises(CloisterError) as second:
        file.write(content(4 << 20))
    assert second.value.code is Code.DISK_FULL
    with pytest.raises(CloisterError):
        file.close()
    assert file.closed


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(CloisterError) as caught:
        SealedReader(tmp_path / "none", data_key=data_key())
    assert caught.value.code is Code.FILE_NOT_FOUND
    assert "none" in caught.value.what


def test_a_sealed_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(sealed_bytes(b""))
    (tmp_path / "b").write_text("label\ttext_a\n")
    assert is_sealed(tmp_path / "a")
    assert not is_sealed(tmp_path / "b")


def vectors() -> list[dict[str, object]]:
    listed = json.loads((ROOT / "tests" / "vectors" / "sealed" / "vectors.json").read_text())
    assert len(listed) >= 5
    return listed  # type: ignore[no-any-return]


@pytest.mark.parametrize("vector", vectors(), ids=lambda vector: str(vector["file"]))
def test_files_of_version_1_stay_readable(vector: dict[str, object]) -> None:
    path = ROOT / "tests" / "vectors" / "sealed" / str(vector["file"])
    with SealedReader(path, data_key=data_key("vector")) as reader:
        assert reader.readall() == content(int(str(vector["length"])), salt="vector")
        assert reader.header.associated.path == vector["path"]
        assert reader.header.segment_size == vector["segment_size"]
