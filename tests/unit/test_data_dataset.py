# SPDX-License-Identifier: Apache-2.0
"""Sealed data sets: every row once, in every kind of file, in this process and in workers, shuffled or not."""

from __future__ import annotations

import copy
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from cloister.data import keyring
from cloister.data.dataset import SealedDataset, SealedIterable
from cloister.data.rowfiles import open_rows
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory, seal_directory
from cloister.sealed.stream import SealedReader
from fakes.sealed_material import data_key, sealed_bytes

COUNT = 1000
ROWS = [{"id": str(number), "text": f"行 {number}, said" + " x" * (number % 40)} for number in range(COUNT)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS))


def write_csv(path: Path) -> None:
    import csv

    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_tsv(path: Path) -> None:
    path.write_text("id\ttext\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ROWS))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=300)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        for batch in table.to_batches(max_chunksize=300):
            writer.write_batch(batch)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "a.csv": write_csv,
    "a.tsv": write_tsv,
    "a.parquet": write_parquet,
    "a.arrow": write_arrow,
}


def sealed(tmp_path: Path, *names: str) -> Path:
    source = tmp_path / "plain"
    source.mkdir(exist_ok=True)
    for name in names:
        WRITERS[f"a.{name.rpartition('.')[2]}"](source / name)
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    return tmp_path / "sealed"


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_every_row_is_found_at_its_place(tmp_path: Path, name: str, memory: int) -> None:
    data = SealedDataset(sealed(tmp_path, name), data_key=data_key(), memory=memory)
    assert len(data) == COUNT
    for place in (0, 1, 299, 300, COUNT - 1, 17, 17):
        assert data[place] == ROWS[place]
    assert data[-1] == ROWS[-1]
    for outside in (COUNT, -COUNT - 1):
        with pytest.raises(IndexError):
            data[outside]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("parts", [1, 2, 3, 7, 64])
def test_the_parts_of_a_stream_hold_every_row_once(tmp_path: Path, name: str, parts: int) -> None:
    path, seen = sealed(tmp_path, name), []
    for part in range(parts):
        rows = SealedIterable(path, data_key=data_key(), rank=part, world_size=parts)
        seen += list(rows)
    assert seen == ROWS  # and, for one file, in their order


def test_files_are_chosen_by_name_or_pattern(tmp_path: Path) -> None:
    path = sealed(tmp_path, "train-1.jsonl", "train-2.jsonl", "test.tsv")
    (tmp_path / "plain" / "README.md").write_text("no rows")
    assert len(SealedDataset(path, data_key=data_key())) == 3 * COUNT
    assert len(SealedDataset(path, ["train-*.jsonl"], data_key=data_key())) == 2 * COUNT
    assert SealedDataset(path, "test.tsv", data_key=data_key(), transform=lambda row: row["id"])[5] == "5"
    for wrong in (["nothing"], ["train-*.jsonl", "other*"]):
        with pytest.raises(CloisterError) as caught:
            SealedDataset(path, wrong, data_key=data_key())
        assert caught.value.code is Code.FILE_NOT_FOUND


def test_tensors_are_cut_into_rows(tmp_path: Path) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    tensors = {"x": torch.randn(50, 3, 2), "y": torch.arange(50), "z": torch.randn(50, 4).to(torch.bfloat16)}
    save_file(tensors, source / "a.safetensors")
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    data = SealedDataset(tmp_path / "sealed", data_key=data_key())
    for place in (0, 7, 49):
        assert all(torch.equal(data[place][name], tensors[name][place]) for name in tensors)
    streamed = list(SealedIterable(tmp_path / "sealed", data_key=data_key()))
    assert torch.equal(torch.stack([row["x"] for row in streamed]), tensors["x"])


def test_samples_of_a_webdataset_shard_are_what_webdataset_reads(tmp_path: Path) -> None:
    import webdataset

    source = tmp_path / "plain"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w") as archive:
        for number in range(30):
            for extension, content in (("txt", f"text {number}".encode()), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"folder/{number:04}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    theirs = [
        {key: value for key, value in sample.items() if key in {"__key__", "txt", "cls"}}
        for sample in webdataset.WebDataset(str(source / "a.tar"), shardshuffle=False)
    ]
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    data = SealedDataset(tmp_path / "sealed", data_key=data_key())
    assert [data[at] for at in range(len(data))] == theirs
    assert list(SealedIterable(tmp_path / "sealed", data_key=data_key())) == theirs


def ids(batch: Any) -> list[str]:
    return list(batch["id"])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_this_process_reads(tmp_path: Path, start: str) -> None:
    path = sealed(tmp_path, "a.jsonl")
    data = SealedDataset(path, data_key=data_key(), memory=0)
    loader = DataLoader(data, batch_size=50, num_workers=2, shuffle=True, multiprocessing_context=start)
    assert sorted(int(i) for batch in loader for i in ids(batch)) == list(range(COUNT))
    stream = SealedIterable(path, data_key=data_key(), shuffle=100, seed=3)
    loader = DataLoader(stream, batch_size=50, num_workers=2, multiprocessing_context=start)
    assert sorted(int(i) for batch in loader for i in ids(batch)) == list(range(COUNT))


def test_a_key_does_not_go_into_a_pickle(tmp_path: Path) -> None:
    for data in (SealedDataset(sealed(tmp_path, "a.jsonl"), data_key=data_key()), data_key()):
        with pytest.raises(TypeError):
            pickle.dumps(data)
        with pytest.raises(TypeError):
            copy.deepcopy(data)


def test_shuffling_depends_on_seed_and_epoch_and_on_nothing_else(tmp_path: Path) -> None:
    path = sealed(tmp_path, "a.jsonl", "b.jsonl", "c.jsonl")

    def order(seed: int, epoch: int) -> list[str]:
        stream = SealedIterable(path, data_key=data_key(), shuffle=200, seed=seed)
        stream.set_epoch(epoch)
        return [row["id"] for row in stream]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)
    assert sorted(order(1, 0)) == sorted([row["id"] for row in ROWS] * 3)


def test_a_stream_that_is_left_early_leaves_no_thread(tmp_path: Path) -> None:
    import threading

    source = tmp_path / "plain"
    source.mkdir()
    (source / "a.jsonl").write_text((json.dumps("x" * 1000) + "\n") * 20_000)  # more than is read ahead
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    stream = iter(SealedIterable(tmp_path / "sealed", data_key=data_key()))
    next(stream)
    assert any(thread.name == "cloister read-ahead" for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name == "cloister read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_damage_is_met_where_it_is_read(tmp_path: Path, kind: str) -> None:
    path = sealed(tmp_path, "a.jsonl")
    data = bytearray((path / "a.jsonl.sealed").read_bytes())
    data[3000] ^= 1
    (path / "a.jsonl.sealed").write_bytes(data)
    rows = SealedDataset if kind == "map" else SealedIterable
    with pytest.raises(CloisterError, match=r"a\.jsonl") as caught:
        list(rows(path, data_key=data_key()))
    assert caught.value.code is Code.SEALED_FILE_INVALID


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n'),
        ("a.csv", b"a,b\n1,2\n3\n"),
        ("a.csv", b'a,b\n1,"2\n'),
        ("a.csv", b"a,a\n1,2\n"),
        ("a.tsv", b"a\tb\n1\t2\t3\n"),
        ("a.parquet", b"PAR1 nothing"),
        ("a.arrow", b"ARROW1 nothing"),
        ("a.safetensors", b"\x02\0\0\0\0\0\0\0{}"),
        ("a.tar", b"x" * 2000),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    source = tmp_path / "plain"
    source.mkdir()
    (source / name).write_bytes(content)
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    with pytest.raises(CloisterError, match=name) as caught:
        list(SealedDataset(tmp_path / "sealed", data_key=data_key()))
    assert caught.value.code is Code.DATA_INVALID


class Ring:
    """A keyring with the key of these tests."""

    def open(self, key_uri: str, *, key_version: int, wrapped: bytes, manifest_digest: bytes = b"") -> DataKey:
        assert len(manifest_digest) == 48
        return data_key()

    def new(self, key_uri: str = "") -> DataKey:
        raise AssertionError("nothing is sealed here")


def test_the_key_is_found_by_itself(tmp_path: Path) -> None:
    path = sealed(tmp_path, "a.jsonl")
    with keyring.using(Ring()):
        assert SealedDataset(path)[3] == ROWS[3]
    with pytest.raises(CloisterError, match="CLO-1406"):
        SealedDataset(path)
    assert SealedDataset(SealedDirectory.open(path, data_key=data_key()))[3] == ROWS[3]


CELL = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r"), max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=30), st.integers(1, 5), st.integers(1, 200))
def test_any_csv_is_cut_into_its_rows(cells: list[tuple[str, str]], parts: int, chunk: int) -> None:
    import csv

    from cloister.data.rowfiles import lines

    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(cells)
    data = text.getvalue().encode()
    pieces = iter([data[at : at + chunk] for at in range(0, len(data), chunk)])
    rows = [next(csv.reader([row.decode()])) for row in lines._rows(pieces, True, "t") if row.strip()]
    assert rows == [next(csv.reader([row])) for row in _records(cells)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["1", "", "[22]", '"three"']), max_size=12), st.integers(1, 40), st.booleans())
def test_a_small_file_in_many_parts_gives_every_row_once(values: list[str], parts: int, ended: bool) -> None:
    text = "\n".join(values) + ("\n" if ended else "")
    content = sealed_bytes(text.encode(), segment_size=64)
    rows = open_rows("a.jsonl", lambda: SealedReader(io.BytesIO(content), data_key=data_key()), memory=0)
    streamed = [row for part in range(parts) for row in rows.stream(part, parts)]
    assert streamed == [json.loads(value) for value in values if value] == [rows.row(n) for n in range(len(rows))]


def _records(cells: list[tuple[str, str]]) -> list[str]:
    import csv

    found = []
    for row in cells:
        text = io.StringIO()
        csv.writer(text, lineterminator="", quoting=csv.QUOTE_ALL).writerow(row)
        found.append(text.getvalue())
    return found
