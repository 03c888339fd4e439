# SPDX-License-Identifier: Apache-2.0
"""The demo's data: where it comes from, and the proof that none of it lies in the clear where ranks can read."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cloister.cli.sealing import check_rows
from cloister.errors import CloisterError, Code

SPLITS: Final = ("train.tsv", "dev.tsv", "test.tsv")
_HEAD: Final = 12  # bytes of a text that are looked for: chance finds them once in 2**96 positions


@dataclass(frozen=True, slots=True)
class DemoData:
    """Plaintext to seal. `own` is True when the demo made it and may remove it."""

    directory: Path
    rows: dict[str, int]
    preset: str  # of the built-in job script
    own: bool

    def texts(self) -> list[bytes]:
        """Return every text as it stands in the files."""
        found = []
        for name in SPLITS:
            lines = (self.directory / name).read_bytes().splitlines()[1:]
            found += [line.partition(b"\t")[2].strip() for line in lines]
        return [text for text in found if text]

    def remove(self) -> None:
        """Remove the plaintext that the demo made; what the user brought is never touched."""
        if self.own:
            shutil.rmtree(self.directory)


def prepare(data: Path | None, scratch: Path, *, rows: int) -> DemoData:
    """Return the user's data, checked, or a sample generated below `scratch`."""
    if data is None:
        from cloister.data.sample import generate_sample

        directory = scratch / "plaintext"
        directory.mkdir(mode=0o700, parents=True)
        generate_sample(directory, rows=rows)
        return DemoData(directory, check_rows(directory), "sample", own=True)
    missing = [name for name in SPLITS if not (data / name).is_file()]
    if missing:
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"{data} lacks {', '.join(missing)}",
            why="the demo trains on train.tsv and measures on dev.tsv and test.tsv",
            todo="name a directory with the three files, each row LABEL<TAB>TEXT below a header line",
        )
    return DemoData(data.resolve(), check_rows(data), "chnsenticorp", own=False)


def require_only_ciphertext(directory: Path, texts: Sequence[bytes]) -> int:
    """Search every byte of every file for the beginning of every text; return the bytes searched.

    Raises CloisterError when a file is not one of the sealed form, or holds a text.
    """
    searched = 0
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        searched += len(content)
        found = _first_text_in(content, texts)
        if found is not None or not (path.suffix == ".sealed" or path.name == "cloister-manifest.json"):
            raise CloisterError(
                Code.NOT_SEALED,
                what=f"{path} is not ciphertext",
                why=f"it holds the text that begins {found[:_HEAD].hex()}" if found else "it is not a sealed file",
                todo="seal the directory again into a new one",
            )
    return searched


def _first_text_in(content: bytes, texts: Iterable[bytes]) -> bytes | None:
    heads = {text[:_HEAD]: text for text in texts if len(text) >= _HEAD}
    for start in range(len(content) - _HEAD + 1):
        if content[start : start + _HEAD] in heads:
            return heads[content[start : start + _HEAD]]
    # A shorter text than this, of two or three characters, would be found by chance in any ciphertext.
    return None
