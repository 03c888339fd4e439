# SPDX-License-Identifier: Apache-2.0
"""Sealed columns of a table: cells are ciphertext, everything else stays a CSV file that any tool reads.

    header cell = name " [" base64url(binding TLV, commitment, key version, wrapped DEK) "]"
    binding     = TLV("cloister-columns-v1", key URI, table id, column, rows)
    cell        = base64url(nonce (12) | AES-256-GCM(K, text; AAD = TLV("cloister-cell-v1", row))), without padding
    K           = HKDF-SHA256(DEK, salt = table id, info = binding)

A cell is bound to its table, column and row, and the number of rows to every cell: swapped, copied, removed or added
rows are refused when the column is opened. What is not a sealed column is not protected at all. Nonces are random:
2**32 cells under one key are the bound (NIST SP 800-38D, 8.3), and each column of each table has a key of its own.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import hmac
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister.errors import CloisterError, Code
from cloister.keyuri import KeyUri
from cloister.sealed.datakey import MAX_KEY_VERSION, MAX_WRAPPED_SIZE, DataKey
from cloister.secret import SecretBytes
from cloister.tlv import parse_tlv, tlv

MAX_ROWS: Final = 2**32 - 1
_NONCE_SIZE: Final = 12
_ID_SIZE: Final = 16
_HEADER: Final = re.compile(r"(.*) \[([A-Za-z0-9_-]{100,24000})\]", re.DOTALL)

Row = Sequence[str]


@dataclass(frozen=True, slots=True)
class ColumnHeader:
    """What the first row says of a sealed column: a claim until the DEK was checked against the commitment."""

    name: str
    key_uri: str
    table_id: bytes  # 16 bytes
    rows: int
    commitment: bytes  # 32 bytes
    key_version: int
    wrapped: bytes

    @property
    def binding(self) -> bytes:
        return tlv("cloister-columns-v1", self.key_uri, self.table_id, self.name, self.rows)

    def to_cell(self) -> str:
        """Return the cell of the first row."""
        body = tlv("cloister-column-header-v1", self.binding, self.commitment, self.key_version, self.wrapped)
        return f"{self.name} [{_encode(body)}]"

    @classmethod
    def parse(cls, cell: str) -> ColumnHeader | None:
        """Parse a cell of the first row; None when it is an ordinary name."""
        found = _HEADER.fullmatch(cell)
        if not found:
            return None
        try:
            body = _decode(found[2])
            binding, commitment, version, wrapped = parse_tlv(body, label="cloister-column-header-v1", fields=4)
            uri, table_id, name, rows = parse_tlv(binding, label="cloister-columns-v1", fields=4)
            header = cls(name.decode(), uri.decode(), table_id, _number(rows), commitment, _number(version), wrapped)
            KeyUri.parse(header.key_uri)
        except (ValueError, CloisterError):
            return None
        fits = (
            header.name == found[1]
            and len(table_id) == _ID_SIZE
            and len(commitment) == 32
            and 0 < header.key_version <= MAX_KEY_VERSION
            and 0 < len(wrapped) <= MAX_WRAPPED_SIZE
        )
        return header if fits else None


class _Cells:
    """Seal and open the cells of one column."""

    def __init__(self, secret: SecretBytes, header: ColumnHeader) -> None:
        derived = HKDF(SHA256(), length=32, salt=header.table_id, info=header.binding).derive(secret.reveal())
        self._aead = AESGCM(derived)

    def seal(self, row: int, text: str) -> str:
        nonce = os.urandom(_NONCE_SIZE)
        return _encode(nonce + self._aead.encrypt(nonce, text.encode(), tlv("cloister-cell-v1", row)))

    def open(self, row: int, cell: str) -> str:
        data = _decode(cell)
        return self._aead.decrypt(data[:_NONCE_SIZE], data[_NONCE_SIZE:], tlv("cloister-cell-v1", row)).decode()


def sealed_columns(first_row: Row) -> dict[int, ColumnHeader]:
    """Return the sealed columns of a table by their place; needs no key."""
    found = {place: ColumnHeader.parse(cell) for place, cell in enumerate(first_row)}
    return {place: header for place, header in found.items() if header}


def seal_columns(rows: Iterable[Row], *, count: int, names: Sequence[str], data_key: DataKey) -> Iterator[list[str]]:
    """Yield a table with columns sealed; `rows` begins with the names, and `count` rows follow.

    Raises CloisterError(DATA_INVALID) for a table without such a column, or whose rows are not of one length.
    """
    source = iter(rows)
    first = list(next(source, []))
    for name in names:
        if first.count(name) != 1:
            known = ", ".join(first[:20])
            raise _invalid(f"there is no one column {name!r}", f"the first row names {known}")
    table_id = os.urandom(_ID_SIZE)
    cells: dict[int, _Cells] = {}
    for name in names:
        bare = ColumnHeader(name, data_key.key_uri, table_id, count, b"", data_key.key_version, data_key.wrapped)
        header = replace(bare, commitment=_committed(data_key.secret, bare))
        place = first.index(name)
        first[place] = header.to_cell()
        cells[place] = _Cells(data_key.secret, header)
    yield first
    seen = 0
    for seen, row in enumerate(source, 1):
        _check_width(row, first, seen)
        yield [cells[place].seal(seen, text) if place in cells else text for place, text in enumerate(row)]
    if seen != count:
        raise _invalid("the table changed while it was read", f"it had {count} rows, then {seen}")


def open_columns(
    rows: Iterable[Row], *, data_key: Callable[[ColumnHeader], SecretBytes], only: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Yield a table with its sealed columns opened, or only the named ones.

    `data_key` gets the DEK for a header, which is not authenticated at that moment. Raises CloisterError:
    SEALED_FILE_INVALID that names row and column for a cell that was changed or moved, and at the end when rows were
    removed or added: use nothing of the table before it ended without an error.
    """
    source = iter(rows)
    first = list(next(source, []))
    headers = {place: found for place, found in sealed_columns(first).items() if not only or found.name in only}
    missing = set(only) - {header.name for header in headers.values()}
    if missing or not headers:
        raise CloisterError(
            Code.NOT_SEALED,
            what=f"there is no sealed column {', '.join(sorted(missing))}".rstrip(),
            why=f"sealed are: {', '.join(h.name for h in sealed_columns(first).values()) or 'none'}",
            todo="name a sealed column, or use the table as it is",
        )
    cells: dict[int, _Cells] = {}
    for place, header in headers.items():
        secret = data_key(header)
        if not hmac.compare_digest(_committed(secret, header), header.commitment):
            raise _refused(header.name, 0, "its header was changed, or the key is not the one it was sealed under")
        cells[place] = _Cells(secret, header)
        first[place] = header.name
    yield first
    seen = 0
    for seen, row in enumerate(source, 1):
        _check_width(row, first, seen)
        opened = list(row)
        for place, column in cells.items():
            try:
                opened[place] = column.open(seen, row[place])
            except (InvalidTag, ValueError):
                raise _refused(headers[place].name, seen, "it was changed, moved or put there by another") from None
        yield opened
    for header in headers.values():
        if header.rows != seen:
            raise _refused(header.name, seen, f"the table was sealed with {header.rows} rows and has {seen}")


def dialect_of(name: str) -> dict[str, str]:
    """Return how a table of this file name is written: tabs for .tsv, commas for all others."""
    return {"delimiter": "\t" if name.lower().endswith(".tsv") else ","}


def read_rows(lines: Iterable[str], name: str) -> Iterator[list[str]]:
    """Parse a table; raise CloisterError(DATA_INVALID) for what is none."""
    reader = csv.reader(lines, strict=True, **dialect_of(name))  # type: ignore[arg-type]
    try:
        yield from reader
    except (csv.Error, UnicodeDecodeError) as error:
        raise _invalid(f"{name} is not a table", f"line {reader.line_num}: {error}") from None


def _committed(secret: SecretBytes, header: ColumnHeader) -> bytes:
    return hmac.digest(secret.reveal(), tlv("cloister-commit-v1", header.binding), hashlib.sha256)


def _check_width(row: Row, first: Row, number: int) -> None:
    if len(row) != len(first):
        raise _invalid(f"row {number} has {len(row)} cells", f"the first row has {len(first)}")


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str) -> bytes:
    try:
        data = base64.b64decode(text.encode("ascii") + b"=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64") from error
    if _encode(data) != text:
        raise ValueError("not the one spelling of these bytes")
    return data


def _number(value: bytes) -> int:
    if len(value) != 8:
        raise ValueError("a number has 8 bytes")
    return int.from_bytes(value, "big")


def _refused(column: str, row: int, why: str) -> CloisterError:
    place = f"row {row} of column {column!r}" if row else f"the sealed column {column!r}"
    return CloisterError(
        Code.SEALED_FILE_INVALID,
        what=f"{place} does not open",
        why=why,
        todo="fetch the table again from where it was sealed; use nothing that was read from it",
    )


def _invalid(what: str, why: str) -> CloisterError:
    return CloisterError(Code.DATA_INVALID, what=what, why=why, todo="mend the table, and try again")
