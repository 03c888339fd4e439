# SPDX-License-Identifier: Apache-2.0
"""A re-wrap changes what stands in the headers about the key, and nothing else; it can be interrupted anywhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cloister.errors import CloisterError
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.sealed.format import Header
from cloister.sealed.journal import REWRAP_NAME
from cloister.sealed.rewrap import rewrap_directory, rewrap_file
from cloister.tlv import tlv
from fakes.sealed_material import content, data_key

NEW = b"wrapped under version 4" * 3


def newer(_uri: str, version: int, _wrapped: bytes) -> tuple[int, bytes]:
    return version + 1, NEW


def never(_uri: str, _version: int, _wrapped: bytes) -> tuple[int, bytes]:
    raise AssertionError("the broker was asked again")


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / name).write_bytes(content(1000, salt=name))
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    return tmp_path / "sealed"


def header(path: Path) -> Header:
    with path.open("rb") as file:
        return Header.read(file)


def rewrapped_key() -> DataKey:
    return replace(data_key(), wrapped=NEW, key_version=4)


def test_every_header_names_the_new_version_and_the_data_stays(sealed: Path) -> None:
    before = {path.name: path.read_bytes() for path in sealed.iterdir()}
    digest = SealedDirectory.open(sealed, data_key=data_key()).manifest.digest
    found = rewrap_directory(sealed, newer)
    assert (found.key_version, found.files) == (4, 3)
    for path in sealed.glob("*.sealed"):
        old, new = before[path.name], path.read_bytes()
        size = header(path).size
        assert (header(path).key_version, header(path).wrapped) == (4, NEW)
        assert len(old) == len(new)
        assert old[size:] == new[size:]
    directory = SealedDirectory.open(sealed, data_key=rewrapped_key())
    directory.verify()
    assert directory.manifest.digest == digest
    assert SealedDirectory.peek(sealed).key_version == 4
    assert {path.name for path in sealed.iterdir()} == set(before)


@pytest.mark.parametrize("done", [0, 1, 2])
def test_an_interrupted_re_wrap_is_finished_with_the_same_wrapped_key(sealed: Path, done: int) -> None:
    files = sorted(sealed.glob("*.sealed"))
    rewrapped = {}
    for path in files[:done]:
        rewrap_file(path, newer)
        rewrapped[path] = path.read_bytes()
    (sealed / REWRAP_NAME).write_bytes(tlv("cloister-rewrap-v1", 4, NEW))
    SealedDirectory.open(sealed, data_key=data_key()).verify()  # it can be read all the while
    assert rewrap_directory(sealed, never).files == 3 - done
    assert all(path.read_bytes() == data for path, data in rewrapped.items())
    SealedDirectory.open(sealed, data_key=rewrapped_key()).verify()
    assert not (sealed / REWRAP_NAME).exists()


def test_a_header_that_was_cut_by_a_loss_of_power_is_mended(sealed: Path) -> None:
    path = sealed / "b.sealed"
    whole, new = path.read_bytes(), header(path).rewrapped(4, NEW)
    assert new is not None
    written = new.to_bytes()
    begin = next(at for at in range(len(written)) if written[at] != whole[at])
    for cut in range(begin, begin + 140, 7):
        path.write_bytes(written[:cut] + whole[cut:])
        (sealed / REWRAP_NAME).write_bytes(tlv("cloister-rewrap-v1", 4, NEW))
        rewrap_directory(sealed, never)
        assert path.read_bytes() == written + whole[len(written) :]
    SealedDirectory.open(sealed, data_key=rewrapped_key()).verify()


def test_what_is_more_than_cut_is_refused_and_left(sealed: Path) -> None:
    path = sealed / "b.sealed"
    good = path.read_bytes()
    for place in (0, 9, 20, 60):
        damaged = bytearray(good)
        damaged[place] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(CloisterError, match=r"b\.sealed"):
            rewrap_file(path, newer)
        assert path.read_bytes() == damaged


def test_a_wrapped_key_too_long_for_the_padding_moves_the_stream(sealed: Path) -> None:
    path = sealed / "a.sealed"
    longer = b"w" * 3000
    rewrap_file(path, lambda _uri, version, _wrapped: (version + 1, longer))
    assert header(path).wrapped == longer
    assert SealedDirectory.open(sealed, data_key=data_key()).read("a") == content(1000, salt="a")
    rewrap_file(path, newer)  # and back again, in place
    assert header(path).wrapped == NEW
    assert SealedDirectory.open(sealed, data_key=data_key()).read("a") == content(1000, salt="a")


def test_a_wrapped_key_of_another_data_key_is_found_out_when_the_file_is_opened(sealed: Path) -> None:
    rewrap_directory(sealed, newer)
    other = replace(data_key("two"), wrapped=NEW, key_version=4)
    with pytest.raises(CloisterError):
        SealedDirectory.open(sealed, data_key=other)


@pytest.mark.parametrize("marker", [b"", b"nothing", tlv("cloister-rewrap-v1", b"\x01", NEW), tlv("other", 4, NEW)])
def test_a_marker_that_says_nothing_is_refused(sealed: Path, marker: bytes) -> None:
    (sealed / REWRAP_NAME).write_bytes(marker)
    with pytest.raises(CloisterError, match="remove it"):
        rewrap_directory(sealed, never)


@pytest.mark.parametrize(("version", "wrapped"), [(0, NEW), (2**32, NEW), (4, b""), (4, b"w" * 9000)])
def test_a_broker_that_answers_nonsense_changes_no_file(sealed: Path, version: int, wrapped: bytes) -> None:
    before = {path.name: path.read_bytes() for path in sealed.glob("*.sealed")}
    with pytest.raises(CloisterError, match="out of bounds"):
        rewrap_directory(sealed, lambda *_: (version, wrapped))
    assert {path.name: path.read_bytes() for path in sealed.glob("*.sealed")} == before
    assert not (sealed / REWRAP_NAME).exists()
