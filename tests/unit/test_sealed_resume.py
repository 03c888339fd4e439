# SPDX-License-Identifier: Apache-2.0
"""Sealing and opening go on where they stopped, and take nothing over that changed meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, open_directory, seal_directory
from cloister.sealed.extraction import MARKER_NAME as OPENING
from cloister.sealed.journal import MARKER_NAME, read_unfinished
from cloister.sealed.manifest import Manifest
from fakes.sealed_material import content, data_key

NAMES = [f"{number}.jsonl" for number in range(6)]


class Stop(Exception):
    """Ends a run in the middle."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    for name in NAMES:
        (path / name).write_bytes(content(3000, salt=name))
    return path


def seal(source: Path, out: Path, *, stop_after: int = 99, key: str = "one", version: int = 1) -> Manifest:
    """Seal with one thread, in the order of names; stop when so many files are done and the next one begins."""
    seen: list[str] = []

    def progress(_done: int, _total: int, name: str) -> None:
        seen.append(name)
        if len(seen) > stop_after:
            raise Stop

    return seal_directory(
        source, out, data_key=data_key(key), dataset="d", version=version, progress=progress, workers=1
    )


def interrupted(source: Path, out: Path, *, after: int = 3) -> dict[str, int]:
    """Interrupt a run; return when each sealed file that it left was written."""
    with pytest.raises(Stop):
        seal(source, out, stop_after=after)
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.sealed")}


def test_sealing_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = interrupted(source, out)
    assert set(done) == {f"{name}.sealed" for name in NAMES[:3]}
    manifest = seal(source, out)
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done  # not written again
    assert [entry.path for entry in manifest.files] == NAMES
    opened = SealedDirectory.open(out, data_key=data_key())
    assert all(opened.read(name) == content(3000, salt=name) for name in NAMES)
    assert not (out / MARKER_NAME).exists()


def test_what_was_being_sealed_can_be_read_without_a_key(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    found = read_unfinished(tmp_path / "out")
    assert found is not None
    assert (found.dataset, found.version, bytes.fromhex(found.wrapped)) == ("d", 1, data_key().wrapped)
    assert read_unfinished(source) is None
    (source / MARKER_NAME).write_bytes(b"\xff" * 64 + b" {")
    assert read_unfinished(source) is None


def test_with_another_key_or_version_sealing_starts_anew(source: Path, tmp_path: Path) -> None:
    for change in ({"key": "two"}, {"version": 2}):
        out = tmp_path / str(change)
        done = interrupted(source, out)
        seal(source, out, **change)  # type: ignore[arg-type]
        again = {name: (out / name).stat().st_mtime_ns for name in done}
        assert again.keys() == done.keys()
        SealedDirectory.open(out, data_key=data_key(change.get("key", "one"))).verify()  # type: ignore[call-overload]


def test_a_source_that_changed_meanwhile_is_sealed_again(source: Path, tmp_path: Path) -> None:
    interrupted(source, tmp_path / "out")
    (source / NAMES[0]).write_bytes(content(3000, salt="changed"))
    (source / NAMES[1]).unlink()
    manifest = seal(source, tmp_path / "out")
    opened = SealedDirectory.open(tmp_path / "out", data_key=data_key())
    assert opened.read(NAMES[0]) == content(3000, salt="changed")
    assert NAMES[1] not in [entry.path for entry in manifest.files]


def test_a_sealed_file_that_storage_changed_meanwhile_is_sealed_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(source, out)
    damaged = bytearray((out / f"{NAMES[0]}.sealed").read_bytes())
    damaged[-1] ^= 1
    (out / f"{NAMES[0]}.sealed").write_bytes(damaged)
    (out / f"{NAMES[1]}.sealed").unlink()
    (out / f"{NAMES[2]}.sealed").rename(out / f"{NAMES[1]}.sealed")
    seal(source, out)
    SealedDirectory.open(out, data_key=data_key()).verify()


def test_a_line_that_storage_wrote_into_the_journal_counts_for_nothing(source: Path, tmp_path: Path) -> None:
    """Else an older content could be kept in a new version: the line says what the source looked like."""
    out = tmp_path / "out"
    interrupted(source, out)
    old = (source / NAMES[0]).stat()
    (source / NAMES[0]).write_bytes(content(3000, salt="changed"))
    new = (source / NAMES[0]).stat()
    lines = (out / MARKER_NAME).read_text()
    assert str(old.st_mtime_ns) in lines
    (out / MARKER_NAME).write_text(lines.replace(str(old.st_mtime_ns), str(new.st_mtime_ns)))
    seal(source, out)
    assert SealedDirectory.open(out, data_key=data_key()).read(NAMES[0]) == content(3000, salt="changed")


def test_a_line_that_a_crash_cut_counts_for_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = interrupted(source, out)
    marker = out / MARKER_NAME
    marker.write_bytes(marker.read_bytes()[:-10])
    seal(source, out)
    SealedDirectory.open(out, data_key=data_key()).verify()
    kept = [name for name in done if (out / name).stat().st_mtime_ns == done[name]]
    assert len(kept) == 2


def test_several_sources_are_sealed_side_by_side(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.tsv"
    other.write_text("0\ttext\n")
    manifest = seal_directory([source, other], tmp_path / "out", data_key=data_key(), dataset="d")
    assert [entry.path for entry in manifest.files] == ["other.tsv", *(f"source/{name}" for name in NAMES)]
    twice = tmp_path / "twice"
    twice.mkdir()
    (twice / "other.tsv").write_text("1\tanother\n")
    with pytest.raises(CloisterError, match="same name"):
        seal_directory([other, twice / "other.tsv"], tmp_path / "2", data_key=data_key(), dataset="d")


def test_large_and_small_files_come_back_whatever_the_threads(source: Path, tmp_path: Path) -> None:
    big = content(9 << 20, salt="big")
    (source / "big.bin").write_bytes(big)
    (source / "empty").write_bytes(b"")
    for workers in (1, 2, 5):
        out, back = tmp_path / f"out{workers}", tmp_path / f"back{workers}"
        progress: list[tuple[int, int]] = []
        seal_directory(
            source,
            out,
            data_key=data_key(),
            dataset="d",
            workers=workers,
            progress=lambda done, total, _name, seen=progress: seen.append((done, total)),  # type: ignore[misc]
        )
        total = sum(path.stat().st_size for path in source.iterdir())
        assert progress[-1] == (total, total)
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)
        SealedDirectory.open(out, data_key=data_key()).extract(back, workers=workers)
        assert {path.name: path.read_bytes() for path in back.iterdir()} == {
            path.name: path.read_bytes() for path in source.iterdir()
        }


def test_a_damaged_segment_is_found_by_whichever_thread_meets_it(source: Path, tmp_path: Path) -> None:
    (source / "big.bin").write_bytes(content(9 << 20, salt="big"))
    out = tmp_path / "out"
    seal_directory(source, out, data_key=data_key(), dataset="d")
    sealed = out / "big.bin.sealed"
    for place in (1 << 19, 4 << 20, 8 << 20):
        good = sealed.read_bytes()
        damaged = bytearray(good)
        damaged[place] ^= 1
        sealed.write_bytes(damaged)
        opened = SealedDirectory.open(out, data_key=data_key())
        with pytest.raises(CloisterError, match=r"big\.bin.*") as caught:
            opened.read("big.bin")
        assert caught.value.code is Code.SEALED_FILE_INVALID
        with pytest.raises(CloisterError, match=r"big\.bin"):
            opened.extract(tmp_path / f"back{place}")
        assert not (tmp_path / f"back{place}" / "big.bin").exists()
        sealed.write_bytes(good)


def test_opening_goes_on_where_it_stopped(source: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    seal(source, out)
    sealed = SealedDirectory.open(out, data_key=data_key())
    seen: list[str] = []

    def stop(_done: int, _total: int, name: str) -> None:
        seen.append(name)
        if len(seen) > 3:
            raise Stop

    with pytest.raises(Stop):
        sealed.extract(back, progress=stop, workers=1)
    there = {path.name: path.stat().st_mtime_ns for path in back.glob("*.jsonl")}
    assert len(there) == 3
    (back / NAMES[1]).write_bytes(b"edited meanwhile")
    assert open_directory(out, back, data_key=data_key()).digest == sealed.manifest.digest
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        name: content(3000, salt=name) for name in NAMES
    }
    assert (back / NAMES[0]).stat().st_mtime_ns == there[NAMES[0]]
    assert not (back / OPENING).exists()


def test_another_version_is_not_opened_into_what_an_interrupted_opening_left(source: Path, tmp_path: Path) -> None:
    seal(source, tmp_path / "out")
    seal(source, tmp_path / "out2", version=2)
    back = tmp_path / "back"
    back.mkdir()
    (back / OPENING).write_text(
        SealedDirectory.open(tmp_path / "out", data_key=data_key()).manifest.digest.hex() + "\n"
    )
    with pytest.raises(CloisterError, match="another version"):
        open_directory(tmp_path / "out2", back, data_key=data_key())
    open_directory(tmp_path / "out", back, data_key=data_key())
