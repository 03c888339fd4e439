# SPDX-License-Identifier: Apache-2.0
"""Fuzz what stands inside and beside sealed files: column headers, journals, re-wrap markers, wrapped Parquet keys,
skeletons, tensors, rows. Bytes of any kind end in the errors of their format.

PYTHONPATH=tests python tests/fuzz/fuzz_data.py -max_total_time=60 [corpus directory]
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

# Not instrumented: libraries of hundreds of modules, whose parsers are not ours.
import pyarrow.parquet.encryption  # noqa: F401
import torch

with atheris.instrument_imports(include=["cloister"]):
    from cloister.data import parquet
    from cloister.data.rowfiles import open_rows
    from cloister.data.skeleton import put_together
    from cloister.data.tensors import read_tensors
    from cloister.errors import CloisterError, Code
    from cloister.sealed.columns import ColumnHeader, open_columns, read_rows
    from cloister.sealed.format import AssociatedData
    from cloister.sealed.journal import MARKER_NAME, Journal, Unfinished, read_unfinished
    from cloister.sealed.rewrap import _read_marker
    from cloister.sealed.stream import SealedReader, SealedWriter
    from fakes.sealed_material import data_key

KEY = data_key()
SCRATCH = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm"))
WHAT = Unfinished("d", 1, "", KEY.key_uri, KEY.key_version, KEY.wrapped.hex())
TENSORS = {"a": torch.ones(2), "b": torch.zeros(1)}
EXPECTED = {
    Code.SEALED_FILE_INVALID,
    Code.SEALED_DIRECTORY_MISMATCH,
    Code.WRAPPED_KEY_INVALID,
    Code.DATA_INVALID,
    Code.NOT_SEALED,
}
ROW_KINDS = ("jsonl", "csv", "tsv", "safetensors", "tar")


def one_input(data: bytes) -> None:
    """Try one input on one of the parsers."""
    source = atheris.FuzzedDataProvider(data)
    kind = source.ConsumeIntInRange(0, 6)
    with suppress(UnicodeError):
        try:
            parse(kind, source)
        except CloisterError as error:
            if error.code not in EXPECTED:
                raise


def parse(kind: int, source: atheris.FuzzedDataProvider) -> None:
    """Give the rest of the input to the parser of this number."""
    match kind:
        case 0:
            text = source.ConsumeUnicodeNoSurrogates(30_000)
            header = ColumnHeader.parse(text)
            assert header is None or header.to_cell() == text
            list(open_columns(read_rows(io.StringIO(text), "t.csv"), data_key=lambda _: KEY.secret))
        case 1:
            marker = SCRATCH / MARKER_NAME
            marker.write_bytes(rest(source))
            read_unfinished(SCRATCH)
            descriptor = os.open(marker, os.O_RDWR)
            try:
                # Nothing that is not under the key's MAC counts.
                assert Journal(descriptor, KEY.secret).begin(WHAT) == {}
                assert Journal(descriptor, KEY.secret).begin(WHAT) == {}
            finally:
                os.close(descriptor)
        case 2:
            (SCRATCH / "rewrap").write_bytes(rest(source))
            _read_marker(SCRATCH / "rewrap")
        case 3:
            put_together(source.ConsumeUnicodeNoSurrogates(10_000), TENSORS)
        case 4:
            parquet.unwrap(source.ConsumeUnicodeNoSurrogates(20_000), lambda *_: KEY.secret)
        case 5:
            read_tensors(sealed(rest(source)), "f")
        case _:
            name = ROW_KINDS[source.ConsumeIntInRange(0, len(ROW_KINDS) - 1)]
            content, memory = rest(source), source.ConsumeIntInRange(0, 1) << 20
            rows = open_rows(f"f.{name}", lambda: sealed(content), memory=memory)
            by_index = [rows.row(index) for index in range(min(len(rows), 50))]
            assert len(by_index) == min(len(rows), 50)
            assert sum(len(list(rows.stream(part, 3))) for part in range(3)) == len(rows)


def rest(source: atheris.FuzzedDataProvider) -> bytes:
    return bytes(source.ConsumeBytes(1 << 20))


def sealed(content: bytes) -> SealedReader:
    """Return the reader of a sealed file with this content: what is authentic may still be nonsense."""
    out = io.BytesIO()
    with SealedWriter(out, data_key=KEY, associated=AssociatedData("d", "f"), segment_size=128) as writer:  # type: ignore[arg-type]
        writer.write(content)
    return SealedReader(io.BytesIO(out.getvalue()), data_key=KEY)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
