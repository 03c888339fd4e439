# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: tar files in which the files of one sample share their name up to the first dot.

https://github.com/webdataset/webdataset#the-webdataset-format  A sample is a dict of bytes by extension, and its name
as `__key__`, as WebDataset itself gives it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import Any, cast

from cloister.data.rowfiles import Opener, broken, part_of


class TarRows:
    """The samples of one shard; the index holds names and places, contents are read when they are asked for."""

    def __init__(self, name: str, open_file: Opener) -> None:
        self._reader = open_file()
        self._samples: list[tuple[str, dict[str, tuple[int, int]]]] = []  # offset and size by extension
        try:
            with tarfile.open(fileobj=cast(io.BufferedReader, self._reader), mode="r:") as archive:
                for member in archive:
                    if member.isfile():
                        self._add(member)
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise broken(name, str(error)[:300]) from None

    def _add(self, member: tarfile.TarInfo) -> None:
        folder, slash, file = member.name.rpartition("/")
        stem, _, extension = file.partition(".")
        key = f"{folder}{slash}{stem}"
        if not self._samples or self._samples[-1][0] != key:
            self._samples.append((key, {}))
        self._samples[-1][1][extension.lower()] = member.offset_data, member.size

    def __len__(self) -> int:
        return len(self._samples)

    def row(self, index: int) -> Any:
        key, places = self._samples[index]
        sample: dict[str, Any] = {"__key__": key}
        for extension, (offset, size) in places.items():
            content = bytearray(size)
            self._reader.seek(offset)
            self._reader.readinto(content)
            sample[extension] = bytes(content)
        return sample

    def stream(self, part: int, parts: int) -> Iterator[Any]:
        return map(self.row, part_of(len(self), part, parts))
