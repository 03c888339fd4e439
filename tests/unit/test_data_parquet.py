# SPDX-License-Identifier: Apache-2.0
"""Parquet modular encryption: keys from the keyring, nothing readable in the file, every change refused."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.data import keyring, parquet
from cloister.errors import CloisterError, Code
from cloister.tlv import parse_tlv
from fakes.rings import Ring
from fakes.sealed_material import KEY_URI, data_key

OTHER = "cloister-key://hospital-a/datasets/names"
TABLE = pa.table({"id": list(range(1000)), "name": [f"confidential {n}" for n in range(1000)], "code": ["J45"] * 1000})


def refused(action: Any) -> CloisterError:
    with pytest.raises(CloisterError) as caught:
        action()
    return caught.value


def written(path: Path, **options: Any) -> Ring:
    """Write the table; return the ring that knows its keys."""
    ring = Ring()
    with keyring.using(ring):
        parquet.write_table(TABLE, path, key=KEY_URI, **options)
    return ring


def test_a_table_comes_back_and_nothing_of_it_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    ring = written(path)
    data = path.read_bytes()
    assert data[:4] == data[-4:] == b"PARE"  # an encrypted footer
    assert b"confidential" not in data
    assert b"name" not in data
    with keyring.using(ring):
        assert parquet.read_table(path).equals(TABLE)
        assert parquet.read_table(path, columns=["id"], filters=[("id", "<", 3)])["id"].to_pylist() == [0, 1, 2]
    with pytest.raises((OSError, ValueError)):
        pq.read_table(path)


def test_the_wrapped_key_names_key_version_and_wrapped_data_key() -> None:
    import base64

    fields = parse_tlv(base64.b64decode(parquet.wrap(data_key(), b"k" * 32)), label="cloister-parquet-key-v1", fields=5)
    key = data_key()
    assert fields[:3] == (key.key_uri.encode(), key.key_version.to_bytes(8, "big"), key.wrapped)


def test_columns_have_keys_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    ring = written(path, columns={OTHER: ["name"]})
    assert b"confidential" not in path.read_bytes()
    with keyring.using(ring):
        assert parquet.read_table(path).equals(TABLE)

    class Half(Ring):
        """May open the footer's key only."""

        def open(self, key_uri: str, **rest: Any) -> Any:
            if key_uri == OTHER:
                raise CloisterError(Code.RELEASE_DENIED, what="not this one", why="policy")
            return ring.open(key_uri, **rest)

    with keyring.using(Half()):
        assert parquet.read_table(path, columns=["id", "code"]).num_rows == 1000
        assert refused(lambda: parquet.read_table(path)).code is Code.RELEASE_DENIED


def test_other_keys_do_not_open_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    ring = written(path)

    class Wrong(Ring):
        """Gives out another data key under the same name."""

        def open(self, key_uri: str, **rest: Any) -> Any:
            return data_key("two")

    with keyring.using(Wrong()):
        assert refused(lambda: parquet.read_table(path)).code is Code.SEALED_FILE_INVALID
    with keyring.using(Ring()):
        assert refused(lambda: parquet.read_table(path)).code is Code.RELEASE_DENIED
    assert refused(lambda: parquet.read_table(path)).code is Code.KEYRING_MISSING
    with keyring.using(ring):
        parquet.read_table(path)


def test_without_a_keyring_nothing_is_written(tmp_path: Path) -> None:
    error = refused(lambda: parquet.write_table(TABLE, tmp_path / "t.parquet", key=KEY_URI))
    assert error.code is Code.KEYRING_MISSING
    assert not (tmp_path / "t.parquet").exists()


def test_no_changed_byte_changes_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    ring = written(path, row_group_size=250)
    original = path.read_bytes()
    footer = len(original) - 8 - int.from_bytes(original[-8:-4], "little")
    steps = [*range(4, footer, 97), *range(footer, len(original), 7), len(original) - 6, len(original) - 1]
    harmless = 0
    with keyring.using(ring):
        for at in steps:
            changed = bytearray(original)
            changed[at] ^= 1
            with suppress(CloisterError):
                assert parquet.read_table(io.BytesIO(bytes(changed))).equals(TABLE), at
                harmless += 1  # a page index, which this read has no use for
        assert harmless < len(steps) // 10
        for cut in (0, 7, footer, len(original) - 1):
            assert refused(lambda: parquet.read_table(io.BytesIO(original[:cut]))).code is Code.SEALED_FILE_INVALID  # noqa: B023
        assert parquet.read_table(io.BytesIO(original)).equals(TABLE)


def test_a_footer_or_a_column_of_another_file_is_refused(tmp_path: Path) -> None:
    """Both files are under the same keys; Parquet's associated data keeps their parts apart."""
    ring = Ring()
    files = []
    with keyring.using(ring):
        for _ in range(2):
            out = io.BytesIO()
            parquet.write_table(TABLE, out, key=KEY_URI, compression="none", use_dictionary=False)
            files.append(out.getvalue())
        one, two = files
        assert len(one) == len(two)
        footer = len(one) - 8 - int.from_bytes(one[-8:-4], "little")
        for mixed in (one[:footer] + two[footer:], one[: footer // 2] + two[footer // 2 :]):
            error = refused(lambda: parquet.read_table(io.BytesIO(mixed)))  # noqa: B023
            assert error.code is Code.SEALED_FILE_INVALID


def test_a_data_set_of_many_files_is_written_and_read(tmp_path: Path) -> None:
    ring = Ring()
    with keyring.using(ring):
        import pyarrow.parquet.encryption as pe

        for number in range(3):
            parquet.write_table(TABLE.slice(number * 300, 300), tmp_path / f"{number}.parquet", key=KEY_URI)
        config = ds.ParquetDecryptionConfig(
            parquet.crypto_factory(), pe.KmsConnectionConfig(), pe.DecryptionConfiguration()
        )
        options = ds.ParquetFragmentScanOptions(decryption_config=config)
        found = ds.dataset(tmp_path, format=ds.ParquetFileFormat(default_fragment_scan_options=options))
        assert found.count_rows(filter=ds.field("id") >= 300) == 600


@pytest.mark.parametrize("name", ["a,b", "a;b", "a:b", "a b", ""])
def test_columns_that_parquet_cannot_name_are_refused(name: str) -> None:
    assert refused(lambda: parquet.configuration(KEY_URI, columns={KEY_URI: [name]})).code is Code.ARGUMENT_INVALID


def test_what_is_no_key_uri_is_refused() -> None:
    assert refused(lambda: parquet.configuration("nonsense")).code is Code.KEY_URI_INVALID


@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda data: data.hex())))
def test_any_text_for_a_wrapped_key_ends_in_the_one_error(text: str) -> None:
    assert refused(lambda: parquet.unwrap(text, lambda *_: data_key().secret)).code is Code.SEALED_FILE_INVALID


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_no_bit_of_a_wrapped_key_can_be_changed(place: int, bit: int) -> None:
    import base64

    data = bytearray(base64.b64decode(parquet.wrap(data_key(), b"k" * 32)))
    assert parquet.unwrap(base64.b64encode(data).decode(), lambda *_: data_key().secret) == b"k" * 32
    data[place % len(data)] ^= 1 << bit
    error = refused(lambda: parquet.unwrap(base64.b64encode(data).decode(), lambda *_: data_key().secret))
    assert error.code is Code.SEALED_FILE_INVALID
