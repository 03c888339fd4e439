# SPDX-License-Identifier: Apache-2.0
"""Fuzz header, stream and manifest: bytes of any kind end in the one error of their format, or read back as they were.

PYTHONPATH=tests python tests/fuzz/fuzz_sealed.py -max_total_time=60 [corpus directory]
"""

from __future__ import annotations

import io
import sys
from contextlib import suppress

import atheris

with atheris.instrument_imports(include=["cloister"]):
    from cloister.errors import CloisterError, Code
    from cloister.sealed.format import Header
    from cloister.sealed.manifest import Manifest
    from cloister.sealed.stream import SealedReader
    from fakes.sealed_material import content, data_key, sealed_bytes

PLAIN = content(700)
SEALED = sealed_bytes(PLAIN, segment_size=128)
KEY = data_key()
# Damage may make the reader believe anything about the file, but never about the disk.
EXPECTED = {Code.SEALED_FILE_INVALID, Code.MANIFEST_INVALID}


def one_input(data: bytes) -> None:
    """Try one input on everything that parses."""
    source = atheris.FuzzedDataProvider(data)
    kind, position = source.ConsumeIntInRange(0, 3), source.ConsumeIntInRange(0, len(SEALED))
    rest = source.ConsumeBytes(len(data))
    try:
        match kind:
            case 0:
                header = Header.read(io.BytesIO(b"CLOISTER\0\1" + rest))
                assert header.to_bytes() == (b"CLOISTER\0\1" + rest)[: header.size]
            case 1:
                assert Manifest.parse(rest).to_bytes() == rest
            case 2:
                read(SEALED[:position] + rest)
            case _:
                read(SEALED[:position] + rest + SEALED[position + len(rest) :])
    except CloisterError as error:
        if error.code not in EXPECTED:
            raise


def read(sealed: bytes) -> None:
    """Read a mangled file: what comes out is what went in."""
    with SealedReader(io.BytesIO(sealed), data_key=KEY) as reader:
        assert reader.readall() == PLAIN


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()
