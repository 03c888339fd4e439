# SPDX-License-Identifier: Apache-2.0
"""Data sets for torch's DataLoader over sealed directories: by index, or streamed.

    SealedDataset("sealed/reviews", ["train.jsonl"])      row by row, any order, len(); shuffle=True works
    SealedIterable("sealed/reviews", shuffle=10_000)      every rank and worker reads its own part, ahead of its use

Both work in DataLoader workers, forked and spawned. The key comes from the process's keyring unless it is given.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

import cloister.data.handover  # noqa: F401 - lets data keys reach spawned workers
from cloister.data.objects import open_directory
from cloister.data.rowfiles import KINDS, RowFile, open_rows
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory

KEPT_IN_MEMORY: Final = 256 * 1024 * 1024  # bytes of plaintext of line files, together

Source = str | os.PathLike[str] | SealedDirectory
Transform = Callable[[Any], Any]


class SealedDataset(Dataset[Any]):  # type: ignore[misc]  # torch is not typed
    """The rows of sealed files, by index: files in the order of their names, rows in the order of the file.

    Small files of lines are kept in memory (256 MiB together); of larger ones a row costs the decryption of one
    segment. Indexes live in memory only. Not for several threads at once; worker processes are what it is for.
    """

    def __init__(
        self,
        source: Source,
        files: Sequence[str] = (),
        *,
        transform: Transform | None = None,
        data_key: DataKey | None = None,
        memory: int = KEPT_IN_MEMORY,
    ) -> None:
        """`files` are names or patterns such as "train-*.jsonl"; none means all files of rows.

        Raises CloisterError: FILE_NOT_FOUND, DATA_INVALID, and what opening the directory raises.
        """
        self._directory = _opened(source, data_key)
        self.files = _chosen(self._directory, files)
        self._transform = transform
        self._memory = memory
        self._rows = self._open()
        self._starts = [0, *accumulate(map(len, self._rows))]

    def _open(self) -> list[RowFile]:
        left, rows = self._memory, []
        for name in self.files:
            size = self._directory.entry(name).length
            rows.append(_row_file(self._directory, name, memory=max(0, left)))
            left -= size if size <= left else 0
        return rows

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        place = index % len(self)
        number = bisect_right(self._starts, place) - 1
        row = self._rows[number].row(place - self._starts[number])
        return self._transform(row) if self._transform else row

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in {"_directory", "_rows"}}
        return state | _directory_state(self._directory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._directory = _directory_again(state)
        self.__dict__.update(state)
        self._rows = self._open()


class SealedIterable(IterableDataset[Any]):  # type: ignore[misc]  # torch is not typed
    """The rows of sealed files as a stream, cut into one part for every worker of every rank.

    Each reads its own part only, and ahead of its use. `shuffle` is the size of the buffer that rows are drawn from;
    the order of parts changes with the epoch as well. Parts differ by a few rows: ranks that must take the same number
    of steps use torch's Join, or `itertools.islice`.
    """

    def __init__(
        self,
        source: Source,
        files: Sequence[str] = (),
        *,
        transform: Transform | None = None,
        shuffle: int = 0,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        data_key: DataKey | None = None,
    ) -> None:
        """`rank` and `world_size` are those of torch.distributed where it runs, otherwise 0 and 1."""
        self._directory = _opened(source, data_key)
        self.files = _chosen(self._directory, files)
        self._transform = transform
        self._shuffle = shuffle
        self._seed = seed
        self._epoch = 0
        self._rank, self._world_size = _position(rank, world_size)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle another way from the next iteration on; call it before each epoch, as of DistributedSampler."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        part, parts = self._rank, self._world_size
        if worker is not None:
            part, parts = part * worker.num_workers + worker.id, parts * worker.num_workers
        rows = self._stream(part, parts)
        if self._shuffle:
            generator = torch.Generator().manual_seed((self._seed << 20) + (self._epoch << 8) + part)
            rows = _shuffled(rows, self._shuffle, generator)
        return map(self._transform, rows) if self._transform else rows

    def _stream(self, part: int, parts: int) -> Iterator[Any]:
        names = list(self.files)
        if self._shuffle:
            generator = torch.Generator().manual_seed((self._seed << 20) + self._epoch)
            names = [names[at] for at in torch.randperm(len(names), generator=generator).tolist()]
        if len(names) >= parts:
            # Whole files where there are enough: fewer opens. What does not come out even is cut.
            even = len(names) - len(names) % parts
            for name in names[part:even:parts]:
                yield from _row_file(self._directory, name, memory=0).stream(0, 1)
            names = names[even:]
        for name in names:
            yield from _row_file(self._directory, name, memory=0).stream(part, parts)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_directory"}
        return state | _directory_state(self._directory)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._directory = _directory_again(state)
        self.__dict__.update(state)


def _opened(source: Source, data_key: DataKey | None) -> SealedDirectory:
    return source if isinstance(source, SealedDirectory) else open_directory(Path(source), data_key=data_key)


def _chosen(directory: SealedDirectory, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return the files that are meant; every name and every pattern has to find something."""
    if isinstance(patterns, str):
        patterns = [patterns]
    found = [name for name in directory.files if name.rpartition(".")[2].lower() in KINDS]
    if patterns:
        found = [name for name in directory.files if any(fnmatch(name, pattern) for pattern in patterns)]
    missing = [pattern for pattern in patterns if not any(fnmatch(name, pattern) for name in found)]
    if missing or not found:
        listed = ", ".join(directory.files[:10])
        raise CloisterError(
            Code.FILE_NOT_FOUND,
            what=f"there is no {missing[0] if missing else 'file of rows'} in {directory.storage}",
            why=f"its manifest lists {listed}" + (" and more" if len(directory.files) > 10 else ""),
            todo=f"name files that are there; rows come from {', '.join(KINDS)}",
        )
    return tuple(found)


def _row_file(directory: SealedDirectory, name: str, *, memory: int) -> RowFile:
    return open_rows(name, lambda: directory.open_file(name, workers=1), memory=memory)


def _directory_state(directory: SealedDirectory) -> dict[str, Any]:
    return {
        "_storage": directory.storage,
        "_key": directory.data_key,
        "_digest": directory.manifest.digest,
    }


def _directory_again(state: dict[str, Any]) -> SealedDirectory:
    storage, key, digest = (state.pop(name) for name in ("_storage", "_key", "_digest"))
    return SealedDirectory.open(storage, data_key=key, manifest_digest=digest)


def _position(rank: int | None, world_size: int | None) -> tuple[int, int]:
    import torch.distributed as dist

    if (rank is None) != (world_size is None):
        raise CloisterError(Code.ARGUMENT_INVALID, what="rank and world_size go together", todo="give both or none")
    if rank is not None and world_size is not None:
        if not 0 <= rank < world_size:
            raise CloisterError(Code.ARGUMENT_INVALID, what=f"there is no rank {rank} of {world_size}")
        return rank, world_size
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _shuffled(rows: Iterator[Any], size: int, generator: torch.Generator) -> Iterator[Any]:
    buffer: list[Any] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        at = int(torch.randint(size, (1,), generator=generator))
        yield buffer[at]
        buffer[at] = row
    for at in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[at]
