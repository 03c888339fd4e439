# SPDX-License-Identifier: Apache-2.0
"""Fuzz everything that is read of the decision log: any bytes end in one error, or prove what the originals prove.

Run: python tests/fuzz/fuzz_transparency.py
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["cloister.transparency", "cloister.strictjson", "cloister.merkle"]):
    from cloister.errors import CloisterError, Code
    from cloister.protocol import ReceiptClaims
    from cloister.transparency.checkpoint import Checkpoint
    from cloister.transparency.documents import GrowthDocument, ReceiptDocument
    from cloister.transparency.entry import EntryInvalid, LoggedEntry, Outline
    from cloister.transparency.logfile import LogFile
    from cloister.transparency.note import NoteInvalid, NoteKey
    from cloister.transparency.start import Start

from fakes.log_case import Case

CASE = Case()
KEY = CASE.key.note_key
SEEDS = (
    CASE.document().to_bytes(),
    CASE.growth().to_bytes(),
    CASE.log_file(),
    CASE.after,
    str(KEY).encode(),
    CASE.proven(CASE.key.start_index).data,
    CASE.proven(CASE.place.index).data,
    CASE.message(),
)


def one_input(data: bytes) -> None:
    """Read bytes as they are, and written into one of the originals."""
    read(data)
    if len(data) > 4:
        seed = SEEDS[data[0] % len(SEEDS)]
        place = int.from_bytes(data[1:3], "big") % len(seed)
        read(seed[:place] + data[4:] + seed[place + data[3] :])


def read(data: bytes) -> None:
    """Raise for anything but the errors that these readers have."""
    try:
        entry = LoggedEntry.parse(data)
        if entry.to_bytes() != data:
            raise AssertionError("an entry that reads back as another")
        Outline.parse(data)
        Start.of(entry)
    except EntryInvalid:
        pass
    try:
        note = Checkpoint.open(data, KEY)
        if note.size > 11:
            raise AssertionError("a checkpoint that nobody signed")
        NoteKey.parse(data.decode("latin-1"))
    except NoteInvalid:
        pass
    with contextlib.suppress(ValueError):
        ReceiptClaims.parse(data)
    for reader in (
        lambda: ReceiptDocument.parse(data).check(KEY),
        lambda: GrowthDocument.parse(data).check(KEY),
        lambda: LogFile(io.BytesIO(data)).check(KEY),
    ):
        try:
            reader()
        except CloisterError as error:
            if error.code not in (Code.LOG_INVALID, Code.LOG_CONTRADICTED):
                raise


if __name__ == "__main__":
    for seed in SEEDS:
        read(seed)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
