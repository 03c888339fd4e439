# SPDX-License-Identifier: Apache-2.0
"""Hugging Face data sets over `cloister://`: streamed, rows come and nothing stays; not streamed, it is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cloister.sealed.directory import seal_directory
from fakes.sealed_material import ROOT, data_key

ROWS = [{"id": number, "text": f"confidential 行 {number}"} for number in range(300)]

# A process of its own: the library reads its cache's place when it is imported, and registers what it finds then.
PROGRAM = """
import json, sys
import fsspec
from cloister.data import keyring
from cloister.data.filesystem import SealedFileSystem
from fakes.rings import Ring
fsspec.register_implementation("cloister", SealedFileSystem, clobber=True)
from datasets import load_dataset

kind, url, streaming = sys.argv[1:]
with keyring.using(Ring()):
    rows = load_dataset(kind, data_files={"train": url}, split="train", streaming=streaming == "yes")
    print(json.dumps(list(rows.shuffle(seed=1, buffer_size=50) if streaming == "yes" else rows)))
"""


def run(tmp_path: Path, kind: str, url: str, streaming: str, **more: str) -> subprocess.CompletedProcess[str]:
    places = {"HF_HOME": str(tmp_path / "cache"), "TMPDIR": str(tmp_path / "tmp"), "HOME": str(tmp_path / "home")}
    (tmp_path / "tmp").mkdir(exist_ok=True)
    # Other tests of this process may have switched it off, as ranks do.
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1"}
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")} | online | places | more
    argv = [sys.executable, "-c", PROGRAM, kind, url, streaming]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=110, cwd=tmp_path)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    source = tmp_path / "plain"
    source.mkdir()
    for number in range(3):
        part = ROWS[number::3]
        (source / f"train-{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (source / "all.csv").write_text("id,text\n" + "".join(f"{row['id']},{row['text']}\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), source / "all.parquet")
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    for path in source.iterdir():
        path.unlink()
    return tmp_path / "sealed"


def plaintext_below(place: Path) -> list[Path]:
    needles = (b"confidential", json.dumps("行").encode()[1:-1], "行".encode())
    files = [path for path in place.rglob("*") if path.is_file()]
    return [path for path in files if any(needle in path.read_bytes() for needle in needles)]


@pytest.mark.parametrize(("kind", "files"), [("json", "train-*.jsonl"), ("csv", "all.csv"), ("parquet", "all.parquet")])
def test_streamed_rows_are_all_there_and_nothing_of_them_is_on_a_disk(
    tmp_path: Path, sealed: Path, kind: str, files: str
) -> None:
    done = run(tmp_path, kind, f"cloister://{sealed}/{files}", "yes")
    assert done.returncode == 0, done.stderr
    assert sorted(json.loads(done.stdout), key=lambda row: row["id"]) == ROWS
    assert plaintext_below(tmp_path) == []


def test_a_chain_of_urls_names_the_storage(tmp_path: Path, sealed: Path) -> None:
    done = run(tmp_path, "json", f"cloister://train-*.jsonl::{sealed}", "yes")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)) == len(ROWS)


def test_without_streaming_the_copy_into_the_cache_is_refused(tmp_path: Path, sealed: Path) -> None:
    """The library would first copy every file to its cache, then write them once more as Arrow files."""
    done = run(tmp_path, "json", f"cloister://{sealed}/train-*.jsonl", "no")
    assert done.returncode != 0
    assert "CLO-1407" in done.stderr
    assert "streaming=True" in done.stderr
    assert plaintext_below(tmp_path) == []


def test_without_streaming_a_cache_in_memory_is_taken(tmp_path: Path, sealed: Path) -> None:
    cache = Path("/dev/shm") / f"cloister-test-{os.getpid()}"
    try:
        done = run(tmp_path, "json", f"cloister://{sealed}/train-*.jsonl", "no", HF_HOME=str(cache))
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)) == len(ROWS)
        assert plaintext_below(cache) != []
        assert plaintext_below(tmp_path) == []
    finally:
        subprocess.run(["rm", "-rf", str(cache)], check=True)


def test_damage_ends_the_stream(tmp_path: Path, sealed: Path) -> None:
    file = sealed / "train-1.jsonl.sealed"
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    done = run(tmp_path, "json", f"cloister://{sealed}/train-*.jsonl", "yes")
    assert done.returncode != 0
    assert "CLO-1401" in done.stderr
