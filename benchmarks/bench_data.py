# SPDX-License-Identifier: Apache-2.0
"""Sealed data sets and state dicts against the same over plaintext, side by side in one run; what counts is the ratio.

    python benchmarks/bench_data.py [--rows 9600] [--rounds 5] [--shards 800] [--state-mib 2048]

Rows are short labelled Chinese sentences, as in ChnSentiCorp. The plaintext loader is the very same code over plain
files, so that what is compared is the seal and nothing else. "100 GB" are 800 shards of 128 MB: names that stand for a
few real files, so that the disk holds half a gigabyte and every access pattern is that of the whole. Rounds
interleave the candidates. Three ratios: of the best rounds, the median of all rounds, and the median by processor time,
which a busy machine disturbs least; with workers it would leave out theirs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cloister.data import load, save
from cloister.data.dataset import SealedDataset, SealedIterable
from cloister.data.sample import generate_sample
from cloister.sealed.directory import SealedDirectory, seal_directory
from fakes.sealed_material import data_key

SHARD_BYTES = 128_000_000
REAL_SHARDS = 4


class PlainFile(io.FileIO):
    """A plaintext file as the loaders of rows want one."""

    @property
    def size(self) -> int:
        return os.fstat(self.fileno()).st_size


class PlainDirectory(SealedDirectory):
    """The plaintext of a sealed directory in its place: everything that loads rows takes one for the other."""

    def __init__(self, sealed: SealedDirectory, plain: Path) -> None:
        super().__init__(sealed.storage, manifest=sealed.manifest, data_key=sealed.data_key)
        self._plain = plain

    def open_file(self, name: str, **_: Any) -> Any:
        return PlainFile(self._plain / name)


class Again(SealedIterable):
    """A directory of a few files whose names are asked for many times over."""

    def __init__(self, source: SealedDirectory, count: int) -> None:
        super().__init__(source)
        self.files = tuple(self.files[number % len(self.files)] for number in range(count))


def rates(loader: DataLoader[Any], limit: int) -> tuple[float, float]:
    """Take so many samples, in as many epochs as that takes; return samples for a second, and for one of this CPU.

    The first batch of an epoch is not counted: workers start and indexes are made then.
    """
    taken, wall, used = 0, 0.0, 0.0
    while taken < limit:
        stream = iter(loader)
        next(stream)
        start, began = time.perf_counter(), time.process_time()
        for batch in stream:
            taken += len(batch["text"])
            if taken >= limit:
                break
        wall, used = wall + time.perf_counter() - start, used + time.process_time() - began
    return taken / wall, taken / used


def compare(title: str, rounds: int, limit: int, sealed: Callable[[], Any], plain: Callable[[], Any]) -> None:
    """Print both rates and the medians of their ratios, by the clock and (without workers) by processor time."""
    best, clock, processor = {"sealed": 0.0, "plain": 0.0}, [], []
    for number in range(rounds):
        pair = [("sealed", sealed), ("plain", plain)]
        found = {}
        for name, make in pair if number % 2 else pair[::-1]:
            found[name] = rates(make(), limit)
            best[name] = max(best[name], found[name][0])
        clock.append(found["sealed"][0] / found["plain"][0])
        processor.append(found["sealed"][1] / found["plain"][1])
    by_processor = f"{statistics.median(processor):9.1%}" if "0 workers" in title else f"{'':9}"
    print(
        f"{title:46}{best['sealed']:12,.0f}{best['plain']:12,.0f}{best['sealed'] / best['plain']:9.1%}"
        f"{statistics.median(clock):9.1%}{by_processor}",
        flush=True,
    )


def loaders(base: Path, rows: int, rounds: int, shards: int) -> None:
    """Compare every way of loading."""
    print(f"\n{'DataLoader, samples/s':46}{'sealed':>12}{'plaintext':>12}{'best':>9}{'median':>9}{'CPU':>9}")
    source = base / "sentences"
    source.mkdir()
    lines = sentences(base, rows)
    (source / "train.jsonl").write_text("".join(lines))
    seal_directory(source, base / "sealed", data_key=data_key(), dataset="bench")
    directory = SealedDirectory.open(base / "sealed", data_key=data_key())
    plain = PlainDirectory(directory, source)

    def loader(data: Any, workers: int, shuffle: bool | None) -> Any:
        return DataLoader(data, batch_size=32, num_workers=workers, shuffle=shuffle)

    everything = 5 * rows
    for workers in (0, 2):
        for memory, name in ((1 << 30, "in memory"), (0, "a segment each")):
            if memory or not workers:
                ours, theirs = SealedDataset(directory, memory=memory), SealedDataset(plain, memory=memory)
                compare(
                    f"sentences, shuffled, {name}, {workers} workers",
                    rounds,
                    everything,
                    lambda: loader(ours, workers, True),  # noqa: B023
                    lambda: loader(theirs, workers, True),  # noqa: B023
                )
        compare(
            f"sentences, streamed, {workers} workers",
            rounds,
            everything,
            lambda: loader(SealedIterable(directory), workers, None),  # noqa: B023
            lambda: loader(SealedIterable(plain), workers, None),  # noqa: B023
        )
    big = base / "shards"
    big.mkdir()
    text = "".join(lines).encode()
    for number in range(REAL_SHARDS):
        with (big / f"{number:04}.jsonl").open("wb") as file:
            for _ in range(SHARD_BYTES // len(text)):
                file.write(text)
    seal_directory(big, base / "sealed-shards", data_key=data_key(), dataset="shards")
    huge = SealedDirectory.open(base / "sealed-shards", data_key=data_key())
    for workers in (0, 2):
        compare(
            f"{shards} shards of 128 MB, streamed, {workers} workers",
            rounds,
            20 * rows,
            lambda: loader(Again(huge, shards), workers, None),  # noqa: B023
            lambda: loader(Again(PlainDirectory(huge, big), shards), workers, None),  # noqa: B023
        )


def sentences(base: Path, rows: int) -> list[str]:
    """Return so many different rows as JSON lines."""
    (base / "sample").mkdir()
    generate_sample(base / "sample", rows=rows)
    found = []
    for name in ("train", "dev", "test"):
        for line in (base / "sample" / f"{name}.tsv").read_text().splitlines()[1:]:
            label, text = line.split("\t")
            # Reviews are longer than the sample's sentences: about 100 characters.
            found.append(json.dumps({"label": int(label), "text": text * 4}, ensure_ascii=False) + "\n")
    return found


def peak_memory(base: Path, mib: int) -> None:
    """Print the peak of memory of saving and of loading a state dict, as a multiple of its size."""
    size = mib << 20
    path = base / "state.sealed"

    def state() -> dict[str, torch.Tensor]:
        return {f"layer.{number}": torch.empty(size // 32 // 4, dtype=torch.float32).normal_() for number in range(32)}

    def measured(what: str, before: Callable[[], Any], work: Callable[[Any], Any], held: int) -> None:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # a process of its own, so that its memory is its own
            given = before()
            # Linux resets the peak on this word; what is resident now, the state among it, is what counts as before.
            Path("/proc/self/clear_refs").write_text("5")
            start_kib = _status("VmRSS")
            start = time.perf_counter()
            kept = work(given)
            took = time.perf_counter() - start
            os.write(write, f"{(_status('VmHWM') - start_kib) * 1024 + held} {took}".encode())
            del kept
            os._exit(0)
        os.waitpid(child, 0)
        peak, took = os.read(read, 100).split()
        bound = 1.1 * size + (64 << 20)
        print(
            f"{what} {mib} MiB: peak {int(peak) / size:.3f}x ({int(peak) >> 20} MiB; bound {int(bound) >> 20} MiB), "
            f"{size / float(took) / 1e9:.2f} GB/s",
            flush=True,
        )

    print()
    measured("save", state, lambda given: save(given, path, data_key=data_key()), size)
    measured("load", lambda: None, lambda _: load(path, data_key=data_key()), 0)


def _status(name: str) -> int:
    """Return a size of this process from /proc, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=9600, help="sentences; ChnSentiCorp trains on 9,600")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shards", type=int, default=800)
    parser.add_argument("--state-mib", type=int, default=2048)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        loaders(Path(directory), arguments.rows, arguments.rounds, arguments.shards)
    with tempfile.TemporaryDirectory() as directory:
        peak_memory(Path(directory), arguments.state_mib)


if __name__ == "__main__":
    main()
