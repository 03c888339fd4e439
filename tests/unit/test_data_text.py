# SPDX-License-Identifier: Apache-2.0
"""Labelled text: every row arrives, or is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.data.text import MAX_ROW_SIZE, LabelledText, check_labelled_text, read_labelled_text
from cloister.errors import CloisterError, Code
from cloister.sealed.directory import SealedDirectory, SealedDirectoryWriter
from fakes.sealed_material import ROOT, data_key

HEADER = b"label\ttext_a\n"
CORPUS = ROOT.parent / "shared" / "data" / "chnsenticorp"


def read(tmp_path: Path, data: bytes, name: str = "train.tsv") -> list[LabelledText]:
    """Seal the bytes and read them back as rows."""
    out = tmp_path / "sealed"
    with SealedDirectoryWriter(out, data_key=data_key(), dataset="d") as writer:
        writer.add(name, data)
        writer.finish()
    return read_labelled_text(SealedDirectory.open(out, data_key=data_key()), name)


def broken(tmp_path: Path, data: bytes, name: str = "train.tsv") -> str:
    """The same bytes are refused before sealing and when read; return why."""
    (tmp_path / name).write_bytes(data)
    reasons = []
    for attempt in (lambda: check_labelled_text(tmp_path / name), lambda: read(tmp_path, data, name)):
        with pytest.raises(CloisterError) as caught:
            attempt()
        assert caught.value.code is Code.DATA_INVALID
        assert name in caught.value.what
        reasons.append(caught.value.why)
    assert reasons[0] == reasons[1]
    return reasons[0]


def test_rows_carry_their_number_label_and_text(tmp_path: Path) -> None:
    rows = read(tmp_path, HEADER + "1\t很好\n0\t不好\n".encode())
    assert rows == [LabelledText(2, "1", "很好"), LabelledText(3, "0", "不好")]


def test_quotes_tabs_and_unusual_line_separators_are_text(tmp_path: Path) -> None:
    texts = [
        '"开头的引号',
        'a "b" c',
        "with\ttabs\there",
        "U+2028\u2028inside",
        "U+0085\x85inside",
        " spaces ",
        "'",
        "x\x0by",
    ]
    data = HEADER + "".join(f"1\t{text}\n" for text in texts).encode()
    assert [row.text for row in read(tmp_path, data)] == texts


def test_a_last_line_without_end_and_windows_line_ends_are_taken(tmp_path: Path) -> None:
    assert [row.text for row in read(tmp_path, b"\xef\xbb\xbflabel\ttext_a\r\n1\tgood\r\n0\tbad")] == ["good", "bad"]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"1 no tab", "no tab"),
        (b"", "empty"),
        (b"1\t", "text is empty"),
        (b"1\t   ", "text is empty"),
        (b"2\tx", "label is '2', not one of 0, 1"),
        (b"\tx", "label is ''"),
        (b" 1\tx", "label is ' 1'"),
        (b"1.0\tx", "label is '1.0'"),
        (b"1\t\xff\xfe", "not UTF-8"),
        (b"label\ttext_a", "label is 'label'"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: bytes, why: str) -> None:
    reason = broken(tmp_path, HEADER + b"1\tgood\n" + row + b"\n0\tbad\n")
    assert "row 3" in reason
    assert why in reason
    assert "row 4" not in reason


def test_many_broken_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    reason = broken(tmp_path, HEADER + b"nonsense\n" * 100)
    assert "row 2:" in reason
    assert "row 6:" in reason
    assert "row 7:" not in reason
    assert "95 more" in reason


@pytest.mark.parametrize(
    "data", [b"", HEADER, b"1\tgood\n0\tbad\n", b"text_a\tlabel\ngood\t1\n", b"label,text_a\n1,good\n"]
)
def test_a_file_without_header_or_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    broken(tmp_path, data)


def test_a_missing_header_is_row_one(tmp_path: Path) -> None:
    assert broken(tmp_path, b"1\tgood\n").startswith("row 1: the header is not")


def test_a_row_without_end_is_bounded(tmp_path: Path) -> None:
    assert "row 2: it is longer than" in broken(tmp_path, HEADER + b"1\t" + b"x" * MAX_ROW_SIZE + b"\n")


def test_json_lines(tmp_path: Path) -> None:
    rows = read(tmp_path, '{"label": 1, "text": "很好"}\n{"text": "bad", "label": "0"}\n'.encode(), "a.jsonl")
    assert rows == [LabelledText(1, "1", "很好"), LabelledText(2, "0", "bad")]


@pytest.mark.parametrize(
    "row",
    [
        b"",
        b"[]",
        b"{",
        b'{"label": 1}',
        b'{"label": true, "text": "x"}',
        b'{"label": 1.0, "text": "x"}',
        b'{"label": 1, "text": 2}',
        b'{"label": 1, "text": ""}',
        b'{"label": 1, "text": "x", "more": 1}',
        b'{"label": 0, "label": 1, "text": "x"}',
        b'{"label": 2, "text": "x"}',
        b"[" * 100_000,
    ],
)
def test_a_broken_json_row_is_named(tmp_path: Path, row: bytes) -> None:
    good = b'{"label": 1, "text": "x"}\n'
    assert broken(tmp_path, good + row + b"\n" + good, "a.jsonl").startswith("row 2: ")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    assert ".tsv nor .jsonl" in broken(tmp_path, b"label,text\n", "train.csv")


def test_other_labels_can_be_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(HEADER + b"spam\tx\n")
    assert check_labelled_text(tmp_path / "a.tsv", labels=("ham", "spam")) == 1


@given(st.binary(max_size=200))
def test_arbitrary_bytes_give_rows_or_the_one_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.tsv"
    path.write_bytes(HEADER + data)
    try:
        rows = check_labelled_text(path)
    except CloisterError as error:
        rows = -1
        code = error.code
    assert code is Code.DATA_INVALID if rows < 0 else rows > 0


@pytest.mark.skipif(not CORPUS.is_dir(), reason="ChnSentiCorp is not on this machine")
@pytest.mark.parametrize(("name", "count"), [("train", 9600), ("dev", 1200), ("test", 1200)])
def test_no_row_of_chnsenticorp_is_lost(name: str, count: int) -> None:
    assert check_labelled_text(CORPUS / f"{name}.tsv") == count
