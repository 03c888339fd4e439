# SPDX-License-Identifier: Apache-2.0
"""Sealed columns: the rest of the table stays readable, and no cell, row or header can be exchanged."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.sealed.columns import ColumnHeader, open_columns, read_rows, seal_columns, sealed_columns
from cloister.secret import SecretBytes
from fakes.sealed_material import data_key

TABLE = [
    ["id", "name", "diagnosis"],
    ["1", "王芳", "J45.9"],
    ["2", "Smith, Jo\n", ""],
    ["3", "x", "E11"],
]


def key(_header: ColumnHeader) -> SecretBytes:
    return data_key().secret


def sealed(*names: str, table: list[list[str]] = TABLE) -> list[list[str]]:
    return list(seal_columns(table, count=len(table) - 1, names=names or ("name", "diagnosis"), data_key=data_key()))


def refused(table: list[list[str]], *, only: tuple[str, ...] = ()) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        list(open_columns(table, data_key=key, only=only))
    return caught.value


def test_a_table_comes_back_as_it_was() -> None:
    assert list(open_columns(sealed(), data_key=key)) == TABLE


def test_only_the_named_columns_are_sealed() -> None:
    table = sealed("name")
    assert [row[0] for row in table] == [row[0] for row in TABLE]
    assert [row[2] for row in table] == [row[2] for row in TABLE]
    assert not any("王芳" in cell or "Smith" in cell for row in table for cell in row)


def test_it_is_still_a_csv_file() -> None:
    out = io.StringIO()
    csv.writer(out).writerows(sealed())
    assert list(open_columns(read_rows(io.StringIO(out.getvalue()), "t.csv"), data_key=key)) == TABLE


def test_one_column_of_several_can_be_opened() -> None:
    opened = list(open_columns(sealed(), data_key=key, only=("diagnosis",)))
    assert [row[2] for row in opened] == [row[2] for row in TABLE]
    assert [header.name for header in sealed_columns(opened[0]).values()] == ["name"]


def test_equal_cells_do_not_look_equal() -> None:
    table = [["a"], ["same"], ["same"]]
    cells = [row[0] for row in seal_columns(table, count=2, names=["a"], data_key=data_key())]
    assert cells[1] != cells[2]


def test_which_key_opens_a_column_can_be_read_without_it() -> None:
    (header,) = sealed_columns(sealed("name")[0]).values()
    assert (header.name, header.key_uri, header.rows) == ("name", data_key().key_uri, 3)
    assert (header.wrapped, header.key_version) == (data_key().wrapped, data_key().key_version)


@pytest.mark.parametrize("where", ["swap rows", "swap columns", "flip", "plaintext", "empty", "remove", "cut", "add"])
def test_a_table_that_was_changed_is_refused(where: str) -> None:
    table = sealed()
    match where:
        case "swap rows":
            table[1][1], table[2][1] = table[2][1], table[1][1]
        case "swap columns":
            table[1][1], table[1][2] = table[1][2], table[1][1]
        case "flip":
            table[1][1] = ("B" if table[1][1][20] == "A" else "A").join([table[1][1][:20], table[1][1][21:]])
        case "plaintext":
            table[1][1] = "Eve"
        case "empty":
            table[1][1] = ""
        case "remove":
            del table[2]
        case "cut":
            del table[3]
        case "add":
            table.append(list(table[3]))
    error = refused(table)
    assert error.code is Code.SEALED_FILE_INVALID
    assert "name" in error.what or "diagnosis" in error.what


def test_a_cell_of_another_table_is_refused() -> None:
    table, other = sealed(), sealed()
    table[1][1] = other[1][1]
    assert refused(table).code is Code.SEALED_FILE_INVALID


def test_a_header_that_was_changed_is_refused() -> None:
    table = sealed("name")
    header = ColumnHeader.parse(table[0][1])
    assert header
    for changed in (
        ColumnHeader("name", header.key_uri, header.table_id, 2, *_rest(header)),
        ColumnHeader("name", header.key_uri, bytes(16), 3, *_rest(header)),
        ColumnHeader("name", "cloister-key://hospital-a/other", header.table_id, 3, *_rest(header)),
    ):
        table[0][1] = changed.to_cell()
        assert refused(table).code is Code.SEALED_FILE_INVALID


def _rest(header: ColumnHeader) -> tuple[bytes, int, bytes]:
    return header.commitment, header.key_version, header.wrapped


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(CloisterError, match="the key is not the one"):
        list(open_columns(sealed(), data_key=lambda _: data_key("two").secret))


def test_a_table_without_the_column_is_refused() -> None:
    for names, table in ((("nome",), TABLE), (("a",), [["a", "a"], ["1", "2"]]), (("a",), [])):
        with pytest.raises(CloisterError, match="column") as caught:
            list(seal_columns(table, count=len(table) - 1, names=names, data_key=data_key()))
        assert caught.value.code is Code.DATA_INVALID
    assert refused(TABLE).code is Code.NOT_SEALED
    assert refused(sealed("name"), only=("diagnosis",)).code is Code.NOT_SEALED


def test_rows_of_another_length_are_refused_by_number() -> None:
    with pytest.raises(CloisterError, match="row 2"):
        list(seal_columns([["a", "b"], ["1", "2"], ["3"]], count=2, names=["a"], data_key=data_key()))


def test_a_table_that_grew_while_it_was_read_is_refused() -> None:
    with pytest.raises(CloisterError, match="changed while it was read"):
        list(seal_columns(TABLE, count=2, names=["name"], data_key=data_key()))


def test_a_file_that_is_no_table_is_refused() -> None:
    with pytest.raises(CloisterError, match="not a table"):
        list(read_rows(io.StringIO('a,b\n"1,2\n'), "t.csv"))


@given(st.text(max_size=400))
def test_any_text_in_a_first_row_is_a_name_or_a_header(text: str) -> None:
    ColumnHeader.parse(text)
    ColumnHeader.parse(f"{text} [{text}]")


@given(st.binary(min_size=75, max_size=300))
def test_any_bytes_in_a_header_cell_are_refused_quietly(data: bytes) -> None:
    import base64

    assert ColumnHeader.parse(f"n [{base64.urlsafe_b64encode(data).rstrip(b'=').decode()}]") is None


@given(st.lists(st.text(max_size=40), min_size=1, max_size=20))
def test_every_text_comes_back(cells: list[str]) -> None:
    table = [["a"], *([cell.encode("utf-8", "replace").decode()] for cell in cells)]
    done = seal_columns(table, count=len(cells), names=["a"], data_key=data_key())
    assert list(open_columns(list(done), data_key=key)) == table
