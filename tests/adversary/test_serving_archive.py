# SPDX-License-Identifier: Apache-2.0
"""Archives made to hurt are refused, and no file appears anywhere but below the target."""

from __future__ import annotations

import contextlib
import io
import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.data.archive import ArchiveLimits, extract_sealed, read_archive
from cloister.errors import CloisterError, Code
from fakes.serving_archives import MANIFEST, good_entries, packed, sealed_bytes

Entries = dict[str, bytes]


def refused(archive: io.BytesIO, *, limits: ArchiveLimits | None = None) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        read_archive(archive, limits=limits or ArchiveLimits())
    assert caught.value.code is Code.ARCHIVE_INVALID
    return caught.value


def test_the_archive_that_the_others_differ_from_is_read() -> None:
    assert read_archive(packed(good_entries())).handler_name == "h.py"


@pytest.mark.parametrize(
    "name",
    [
        "../evil.sealed",
        "model/../../evil.sealed",
        "/etc/evil.sealed",
        "model//evil.sealed",
        "model/..\\evil.sealed",
        "model/./evil.sealed",
        "model/model.safetensors",
        "model.safetensors",
        "model/sub/cloister-manifest.json",
        "sitecustomize.py",
        "torch/__init__.py",
        "MAR-INF/other.json",
        "model/a.sealed/b.sealed",
        "model/",
    ],
)
def test_a_name_that_has_no_business_there_is_refused(name: str) -> None:
    refused(packed(good_entries() | {name: sealed_bytes("evil")}))


def without(name: str) -> Callable[[Entries], Entries]:
    return lambda entries: {key: value for key, value in entries.items() if key != name}


def having(name: str, content: bytes) -> Callable[[Entries], Entries]:
    return lambda entries: entries | {name: content}


def manifest(**changes: object) -> Callable[[Entries], Entries]:
    return having("MAR-INF/MANIFEST.json", json.dumps(MANIFEST | changes).encode())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without("MAR-INF/MANIFEST.json"), "does not belong"),
        (without("h.py"), "'h.py' is missing"),
        (without("model/cloister-manifest.json"), "holds no sealed model"),
        (without("model/model.safetensors.sealed"), "holds no sealed model"),
        (having("model/model.safetensors.sealed", b"\x08\0\0\0\0\0\0\0{}      " * 9), "is not sealed"),
        (having("model/model.safetensors.sealed", b""), "is not sealed"),
        (having("MAR-INF/MANIFEST.json", b"{"), "not JSON"),
        (having("MAR-INF/MANIFEST.json", b"[" * 60000), "not JSON"),
        (having("MAR-INF/MANIFEST.json", b"[]"), "does not name a model"),
        (manifest(runtime="LSP"), "does not name a model"),
        (manifest(model={"modelName": "m", "handler": "../h.py"}), "not the name of one Python module"),
        (manifest(model={"modelName": "m", "handler": "text_classifier"}), "not the name of one Python module"),
        (manifest(model={"modelName": "m", "handler": "h.py:run"}), "not the name of one Python module"),
        (manifest(model={"modelName": "../m", "handler": "h.py"}), "does not name a model"),
        (having("h.py", b"#" * (1 << 20) + b"#"), "longer than"),
    ],
)
def test_an_archive_that_lacks_or_forges_a_part_is_refused(change: Callable[[Entries], Entries], why: str) -> None:
    error = refused(packed(change(good_entries())))
    if why != "does not belong":
        assert why in error.why


def test_a_symbolic_link_is_refused() -> None:
    archive = packed(good_entries())
    with zipfile.ZipFile(archive, "a") as zipped:
        link = zipfile.ZipInfo("model/link.sealed")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        zipped.writestr(link, "/etc/passwd")
    assert "not a regular file" in refused(archive).why


def test_a_name_twice_is_refused() -> None:
    archive = packed(good_entries())
    with zipfile.ZipFile(archive, "a") as zipped, pytest.warns(UserWarning, match="Duplicate"):
        zipped.writestr("h.py", "import os")
    assert "twice" in refused(archive).why


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    bomb = sealed_bytes("x") + bytes(50 << 20)
    archive = packed(good_entries() | {"model/bomb.sealed": bomb}, method=zipfile.ZIP_DEFLATED)
    assert "would unpack to" in refused(archive).why


def test_entries_that_share_their_bytes_are_refused() -> None:
    archive = packed(good_entries())
    with zipfile.ZipFile(archive, "a") as zipped:
        big = zipped.getinfo("model/model.safetensors.sealed")
        big.compress_size = big.file_size = len(archive.getvalue())
        zipped._didModify = True  # type: ignore[attr-defined]  # what zipfile does not offer: a lying table of contents
    assert "together longer" in refused(archive).why


def test_more_files_than_the_limit_are_refused() -> None:
    many = {f"model/{i}.sealed": sealed_bytes(str(i)) for i in range(5)}
    refused(packed(good_entries() | many), limits=ArchiveLimits(entries=8))
    read_archive(packed(good_entries() | many), limits=ArchiveLimits(entries=9))


def test_a_table_of_contents_that_would_fill_memory_is_not_read() -> None:
    refused(packed(good_entries()), limits=ArchiveLimits(directory_bytes=100))


@pytest.mark.parametrize("tail", [b"x", b"PK\x05\x06" + bytes(17), b"\0" * 70])
def test_bytes_behind_the_end_are_refused(tail: bytes) -> None:
    archive = packed(good_entries())
    refused(io.BytesIO(archive.getvalue() + tail))


def test_a_damaged_file_is_noticed_while_unpacking(tmp_path: Path) -> None:
    data = bytearray(packed(good_entries()).getvalue())
    data[data.index(b"PK\x01\x02") - 5] ^= 1  # the end of the last file, before the table of contents
    archive = io.BytesIO(bytes(data))
    with pytest.raises(CloisterError) as caught:
        extract_sealed(archive, read_archive(archive), tmp_path)
    assert caught.value.code is Code.ARCHIVE_INVALID


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_changed_byte_never_escapes_as_another_error(data: st.DataObject) -> None:
    original = bytearray(_GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CloisterError):
        read_archive(io.BytesIO(bytes(original)))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_archive(data: bytes) -> None:
    refused(io.BytesIO(data))
    refused(io.BytesIO(data + b"PK\x05\x06" + bytes(18)))


_GOOD = packed(good_entries()).getvalue()
