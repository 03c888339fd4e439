# SPDX-License-Identifier: Apache-2.0
"""Tink is the oracle: what it writes we read, what we write it reads, at every length where segments begin or end."""

from __future__ import annotations

import io

import pytest

from cloister.sealed.format import AssociatedData, Header
from fakes.sealed_material import (
    boundary_lengths,
    content,
    data_key,
    opened,
    recipe,
    sealed_bytes,
    tink_decrypt,
    tink_encrypt,
)

SEGMENT_SIZES = [64, 100, 256, 4096, 65536]


@pytest.mark.parametrize("segment_size", SEGMENT_SIZES)
def test_tink_reads_what_we_write(segment_size: int) -> None:
    for length in boundary_lengths(segment_size):
        plain = content(length)
        file = io.BytesIO(sealed_bytes(plain, segment_size=segment_size))
        header = Header.read(file)
        read = tink_decrypt(
            file, dek=data_key().secret.reveal(), segment_size=segment_size, associated_data=header.binding
        )
        assert read == plain, length


@pytest.mark.parametrize("segment_size", SEGMENT_SIZES)
def test_we_read_what_tink_writes(segment_size: int) -> None:
    header = Header.make(data_key(), AssociatedData("reviews", "train.tsv"), segment_size=segment_size)
    for length in boundary_lengths(segment_size):
        plain = content(length)
        stream = tink_encrypt(
            plain, dek=data_key().secret.reveal(), segment_size=segment_size, associated_data=header.binding
        )
        assert opened(header.to_bytes() + stream) == plain, length


def test_tink_reads_a_model_of_megabyte_segments() -> None:
    plain = content(2_500_000)
    file = io.BytesIO(sealed_bytes(plain, segment_size=1 << 20))
    header = Header.read(file)
    assert (
        tink_decrypt(file, dek=data_key().secret.reveal(), segment_size=1 << 20, associated_data=header.binding)
        == plain
    )


def test_the_documented_recipe_opens_a_file() -> None:
    open_sealed = recipe()["open_sealed"]
    for length in (0, 1, 1000, 200_000):
        file = io.BytesIO(sealed_bytes(content(length), segment_size=65536))
        with open_sealed(file, data_key().secret.reveal()) as stream:  # type: ignore[operator]
            assert stream.read() == content(length)


def test_the_documented_recipe_refuses_another_key() -> None:
    open_sealed = recipe()["open_sealed"]
    with pytest.raises(AssertionError, match="not the key of this file"):
        open_sealed(io.BytesIO(sealed_bytes(b"x")), data_key("two").secret.reveal())  # type: ignore[operator]


def test_the_documented_recipe_refuses_a_changed_file() -> None:
    open_sealed = recipe()["open_sealed"]
    sealed = bytearray(sealed_bytes(content(1000)))
    sealed[-1] ^= 1
    from tink import TinkError

    with (
        pytest.raises((TinkError, OSError)),
        open_sealed(io.BytesIO(sealed), data_key().secret.reveal()) as stream,  # type: ignore[operator]
    ):
        stream.read()
