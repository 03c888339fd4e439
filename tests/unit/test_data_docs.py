# SPDX-License-Identifier: Apache-2.0
"""docs/sealed-data.md: every code block runs as it stands there, and what a user adds is at most three lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from cloister.data import keyring, unpatch_encryption
from cloister.data.filesystem import SealedFileSystem
from cloister.sealed.directory import seal_directory
from fakes.rings import Ring
from fakes.sealed_material import ROOT, data_key

TEXT = (ROOT / "docs" / "sealed-data.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FRAME = pd.DataFrame({"id": range(100), "text": [f"row {number}" for number in range(100)]})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `sealed` in it; Hugging Face's cache is here as well."""
    source = tmp_path / "plain"
    source.mkdir()
    FRAME.to_csv(source / "rows.csv", index=False)
    FRAME.to_json(source / "train.jsonl", orient="records", lines=True)
    pq.write_table(pa.Table.from_pandas(FRAME), source / "rows.parquet")
    seal_directory(source, tmp_path / "sealed", data_key=data_key(), dataset="d")
    monkeypatch.chdir(tmp_path)
    fsspec.register_implementation("cloister", SealedFileSystem, clobber=True)
    SealedFileSystem.clear_instance_cache()
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_code_block_runs(place: Path, number: int) -> None:
    code = BLOCKS[number].replace("/data/sealed", str(place / "sealed"))
    model = torch.nn.Linear(2, 3)
    names: dict[str, Any] = {
        "DataLoader": DataLoader,
        "Path": Path,
        "fsspec": fsspec,
        "key": "k" * 32,
        "model": model,
        "table": pa.table({"id": [1, 2]}),
        "torch": torch,
    }
    weights = model.weight.detach().clone()
    with keyring.using(Ring()):
        try:
            exec(compile(code, "docs/sealed-data.md", "exec"), names)
        finally:
            unpatch_encryption()
        assert torch.equal(model.weight, weights)
        if "loader" in names:
            assert sum(len(batch["id"]) for batch in names["loader"]) == 100
        if "rows" in names:
            assert [row["id"] for row in names["rows"]] == list(range(100))
        if "frame" in names:
            assert names["frame"].equals(FRAME)
        if "again" in names:
            assert names["again"]["id"].to_pylist() == [1, 2]
        if "step" in names:
            assert names["step"] == 100
    for path in place.rglob("*"):
        assert path.is_dir() or path.parent.name == "plain" or b"row 77" not in path.read_bytes()


def test_the_three_kinds_of_user_change_at_most_three_lines_for_each_thing() -> None:
    part = TEXT[TEXT.index("## What to change") : TEXT.index("## On the command line")]
    for block in re.findall(r"```python\n(.*?)```", part, re.DOTALL):
        lines = [line for line in block.splitlines() if line and not line.startswith(("torch.save", "model.load"))]
        assert len(lines) <= 3, block
