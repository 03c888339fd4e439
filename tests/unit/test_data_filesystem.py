# SPDX-License-Identifier: Apache-2.0
"""`cloister://`: what reads through fsspec reads sealed data, on any storage, and leaves no plaintext behind."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from cloister.data import keyring
from cloister.data.dataset import SealedDataset
from cloister.data.filesystem import SealedFileSystem, open_url
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import seal_directory
from cloister.sealed.manifest import MANIFEST_NAME
from fakes.object_store import OBJECTS, ObjectStore
from fakes.rings import Ring
from fakes.sealed_material import ROOT, data_key

ROWS = [{"id": number, "text": f"confidential 行 {number}"} for number in range(500)]
FRAME = pd.DataFrame(ROWS)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """The protocol as the installed package registers it, whatever version is installed here."""
    fsspec.register_implementation("cloister", SealedFileSystem, clobber=True)
    SealedFileSystem.clear_instance_cache()
    yield
    SealedFileSystem.clear_instance_cache()
    OBJECTS.clear()


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    """A sealed directory of the same rows in three kinds of file."""
    source = tmp_path / "plain"
    (source / "more").mkdir(parents=True)
    FRAME.to_csv(source / "rows.csv", index=False)
    (source / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))
    (source / "more" / "test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    pq.write_table(pa.table(FRAME), source / "rows.parquet", row_group_size=100)
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    shutil.rmtree(source)
    return tmp_path / "sealed"


@pytest.fixture
def ring() -> Iterator[Ring]:
    with keyring.using(Ring()) as found:
        yield found  # type: ignore[misc]


def upload(sealed: Path, protocol: str) -> str:
    """Copy the ciphertext to another file system; return the URL of the directory there."""
    if protocol == "memory":
        target = fsspec.filesystem("memory")
        target.rm("/", recursive=True)
        target.put(str(sealed), "/sealed", recursive=True)
        return "memory://sealed"
    for path in sealed.rglob("*"):
        if path.is_file():
            OBJECTS[f"data/sealed/{path.relative_to(sealed)}"] = path.read_bytes()
    return "bucket://data/sealed"


def refused(action: Any) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        action()
    return caught.value


def test_the_package_registers_the_protocol() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name = project["entry-points"]["fsspec.specs"]["cloister"]
    assert name == f"{SealedFileSystem.__module__}.{SealedFileSystem.__qualname__}"


def test_pandas_reads_csv_json_and_parquet(sealed: Path, ring: Ring) -> None:
    assert pd.read_csv(f"cloister://{sealed}/rows.csv").equals(FRAME)
    assert pd.read_json(f"cloister://{sealed}/train.jsonl", lines=True).equals(FRAME)
    assert pd.read_parquet(f"cloister://{sealed}/rows.parquet").equals(FRAME)
    assert len(ring.asked) == 1  # one release for one directory
    assert len(ring.asked[0][2]) == 48


def test_pyarrow_reads_files_and_data_sets(sealed: Path, ring: Ring) -> None:
    files = fsspec.filesystem("cloister")
    table = pq.read_table(f"{sealed}/rows.parquet", filesystem=files, columns=["id"], filters=[("id", ">", 450)])
    assert table["id"].to_pylist() == list(range(451, 500))
    found = ds.dataset(f"{sealed}/rows.parquet", filesystem=files, format="parquet")
    assert found.count_rows(filter=ds.field("id") < 7) == 7
    lines = ds.dataset([f"{sealed}/train.jsonl"], filesystem=files, format="json")
    assert lines.to_table()["text"].to_pylist() == [row["text"] for row in ROWS]


@pytest.mark.parametrize("protocol", ["memory", "bucket"])
@pytest.mark.parametrize("chained", [True, False])
def test_any_target_of_fsspec_holds_the_ciphertext(sealed: Path, ring: Ring, protocol: str, chained: bool) -> None:
    url = upload(sealed, protocol)
    shutil.rmtree(sealed)
    if chained:
        frame = pd.read_json(f"cloister://train.jsonl::{url}", lines=True)
    else:
        place = f"cloister://{url.partition('://')[2]}/train.jsonl"
        frame = pd.read_json(place, lines=True, storage_options={"target_protocol": protocol})
    assert frame.equals(FRAME)
    files = fsspec.filesystem("cloister", fo=url)
    assert sorted(files.glob("**/*.jsonl")) == ["more/test.jsonl", "train.jsonl"]
    assert files.cat_file("train.jsonl", start=0, end=7) == b'{"id": '


def test_an_object_store_is_read_in_ranges(sealed: Path, ring: Ring) -> None:
    url = upload(sealed, "bucket")
    ObjectStore.reads.clear()
    with fsspec.open(f"cloister://rows.parquet::{url}") as file:
        file.seek(100)
        file.read(10)
    assert max(end - start for start, end in ObjectStore.reads) < 3 * (64 << 10)


def test_rows_come_from_an_object_store_into_workers(sealed: Path) -> None:
    directory = open_url(upload(sealed, "bucket"), data_key=data_key())
    rows = SealedDataset(directory, ["train.jsonl"])
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [row["id"] for row in loader] == [row["id"] for row in ROWS]


def test_it_lists_walks_and_describes_like_any_file_system(sealed: Path, ring: Ring) -> None:
    files = fsspec.filesystem("cloister")
    root = str(sealed)
    assert files.ls(root, detail=False) == [f"{root}/{name}" for name in MORE]
    assert files.find(f"cloister://{root}") == sorted(f"{root}/{name}" for name in [*MORE[1:], "more/test.jsonl"])
    assert files.isdir(f"{root}/more")
    assert files.isfile(f"{root}/more/test.jsonl")
    assert not files.exists(f"{root}/none.csv")
    assert not files.exists("/nowhere/at/all")
    assert files.info(f"{root}/rows.csv")["size"] == len(files.cat_file(f"{root}/rows.csv"))
    assert files.ls(f"{root}/rows.csv", detail=False) == [f"{root}/rows.csv"]
    with pytest.raises(FileNotFoundError):
        files.open(f"{root}/none.csv")
    with pytest.raises(FileNotFoundError):
        files.ls(f"{root}/none")
    assert refused(lambda: files.open("/nowhere/at/all.csv")).code is Code.NOT_SEALED


MORE = ["more", "rows.csv", "rows.parquet", "train.jsonl"]


def test_it_can_be_handed_on_without_a_key_in_it(sealed: Path, ring: Ring) -> None:
    files = fsspec.filesystem("cloister", fo=str(sealed))
    assert files.isfile("rows.csv")
    data = pickle.dumps(files)
    assert data_key().secret.reveal() not in data
    assert pickle.loads(data).isfile("rows.csv")


@pytest.mark.parametrize("protocol", ["file", "memory", "bucket"])
@pytest.mark.parametrize("what", ["flip", "cut", "add", "remove", "swap", "manifest", "no manifest"])
def test_what_storage_changed_is_refused_and_not_taken_for_absent(
    sealed: Path, ring: Ring, protocol: str, what: str
) -> None:
    one, other = sealed / "train.jsonl.sealed", sealed / "rows.csv.sealed"
    match what:
        case "flip":
            data = bytearray(one.read_bytes())
            data[-50] ^= 1
            one.write_bytes(data)
        case "cut":
            one.write_bytes(one.read_bytes()[:-1])
        case "add":
            (sealed / "added").write_bytes(b"x")
        case "remove":
            other.unlink()
        case "swap":
            one.write_bytes(other.read_bytes())
        case "manifest":
            manifest = sealed / MANIFEST_NAME
            manifest.write_bytes(manifest.read_bytes().replace(b'"length":', b'"length":1', 1))
        case "no manifest":
            (sealed / MANIFEST_NAME).unlink()
    fo = str(sealed) if protocol == "file" else upload(sealed, protocol)
    files = fsspec.filesystem("cloister", fo=fo)
    error = refused(lambda: files.cat_file("train.jsonl"))
    assert error.code in {
        Code.SEALED_FILE_INVALID,
        Code.SEALED_DIRECTORY_MISMATCH,
        Code.MANIFEST_INVALID,
        Code.NOT_SEALED,
    }
    if what in {"add", "remove", "manifest"}:
        assert refused(lambda: files.glob("*.jsonl")).code is error.code
        assert refused(lambda: files.exists("train.jsonl")).code is error.code


def test_without_a_key_nothing_opens(sealed: Path) -> None:
    files = fsspec.filesystem("cloister")
    assert refused(lambda: files.open(f"{sealed}/rows.csv")).code is Code.KEYRING_MISSING
    assert refused(lambda: files.exists(f"{sealed}/rows.csv")).code is Code.KEYRING_MISSING
    with keyring.using(Ring("two")):
        assert refused(lambda: files.open(f"{sealed}/rows.csv")).code is Code.RELEASE_DENIED
    with keyring.using(Ring()):
        files.open(f"{sealed}/rows.csv").close()
    with keyring.using(Ring("two")):  # what another keyring opened is not lent out
        assert refused(lambda: files.open(f"{sealed}/rows.csv")).code is Code.RELEASE_DENIED


def test_another_version_in_its_place_is_noticed(sealed: Path, ring: Ring, tmp_path: Path) -> None:
    files = fsspec.filesystem("cloister", fo=str(sealed))
    files.cat_file("train.jsonl")
    source = tmp_path / "next"
    source.mkdir()
    (source / "train.jsonl").write_text("{}\n")
    shutil.rmtree(sealed)
    seal_directory(source, sealed, data_key=data_key(), dataset="d", version=2)
    assert refused(lambda: files.cat_file("train.jsonl")).code is Code.SEALED_FILE_INVALID
    files.invalidate_cache()
    assert files.cat_file("train.jsonl") == b"{}\n"


@pytest.mark.parametrize(
    "action",
    [
        lambda files: files.open("x", "wb"),
        lambda files: files.open("rows.csv", "ab"),
        lambda files: files.rm("rows.csv"),
        lambda files: files.mkdir("x"),
        lambda files: files.makedirs("x/y"),
        lambda files: files.mv("rows.csv", "x"),
        lambda files: files.cp_file("rows.csv", "x"),
        lambda files: files.touch("x"),
        lambda files: files.pipe_file("x", b"x"),
        lambda files: files.put_file("/etc/hostname", "x"),
    ],
)
def test_nothing_can_be_written(sealed: Path, ring: Ring, action: Any) -> None:
    before = {path: path.read_bytes() for path in sealed.rglob("*") if path.is_file()}
    with pytest.raises(OSError) as caught:
        action(fsspec.filesystem("cloister", fo=str(sealed)))
    assert caught.value.errno == errno.EROFS
    assert {path: path.read_bytes() for path in sealed.rglob("*") if path.is_file()} == before


def test_plaintext_goes_to_memory_and_not_to_a_disk(sealed: Path, ring: Ring, tmp_path: Path) -> None:
    files = fsspec.filesystem("cloister", fo=str(sealed))
    assert refused(lambda: files.get("train.jsonl", str(tmp_path / "copy"))).code is Code.PLAINTEXT_REFUSED
    assert refused(lambda: files.get_file("train.jsonl", str(tmp_path / "copy"))).code is Code.PLAINTEXT_REFUSED
    assert not (tmp_path / "copy").exists()
    (tmp_path / "old").write_text("mine")
    assert refused(lambda: files.download("train.jsonl", str(tmp_path / "old"))).code is Code.PLAINTEXT_REFUSED
    assert (tmp_path / "old").read_text() == "mine"
    assert refused(lambda: files.get("more", str(tmp_path / "tree"), recursive=True)).code is Code.PLAINTEXT_REFUSED
    with (tmp_path / "open").open("wb") as target:
        assert refused(lambda: files.get_file("train.jsonl", target)).code is Code.PLAINTEXT_REFUSED
    assert (tmp_path / "open").read_bytes() == b""
    memory = io.BytesIO()
    files.get_file("train.jsonl", memory)
    assert memory.getvalue() == files.cat_file("train.jsonl")
    with os.fdopen(os.memfd_create("test"), "w+b") as anonymous:
        files.get_file("train.jsonl", f"/proc/self/fd/{anonymous.fileno()}")
        assert anonymous.read() == memory.getvalue()


def test_a_file_on_tmpfs_is_memory(sealed: Path, ring: Ring, tmp_path: Path) -> None:
    place = Path("/dev/shm") / f"cloister-test-{os.getpid()}"
    try:
        fsspec.filesystem("cloister", fo=str(sealed)).get_file("more/test.jsonl", str(place))
        assert json.loads(place.read_bytes()) == ROWS[0]
        assert place.stat().st_mode & 0o777 == 0o600
    finally:
        place.unlink(missing_ok=True)


@pytest.mark.parametrize("cache", ["simplecache", "filecache"])
def test_a_cache_of_fsspec_gets_no_plaintext(sealed: Path, ring: Ring, cache: str, tmp_path: Path) -> None:
    options = {cache: {"cache_storage": str(tmp_path / "cache")}}
    error = refused(lambda: fsspec.open(f"{cache}::cloister://{sealed}/train.jsonl", **options).open())
    assert error.code is Code.PLAINTEXT_REFUSED
    assert not [path for path in (tmp_path / "cache").rglob("*") if b"confidential" in path.read_bytes()]
