# SPDX-License-Identifier: Apache-2.0
"""Sealing and opening against AES-GCM itself, Tink, age and Fernet, side by side in one run; what counts is the ratio.

    python benchmarks/bench_sealed.py [--size-mib 1024] [--rounds 5]

Every candidate gets the same bytes, in memory, on one thread. Rounds interleave the candidates, so that a busy machine
slows all of them; the figure of each is its best round. "AES-256-GCM" is the cipher alone, from buffer to buffer;
"... to a file" is the cipher and the one copy that any program makes which reads or writes files. Then the same file
with one thread and with two, random reads, and a directory of 100,000 files. Needs `tink` and `pyrage`.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyrage
from cryptography.fernet import Fernet
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cloister.sealed.directory import SealedDirectory
from cloister.sealed.format import DATA_SEGMENT_SIZE, MODEL_SEGMENT_SIZE, AssociatedData
from cloister.sealed.manifest import MANIFEST_NAME, FileEntry, Manifest
from cloister.sealed.segments import Layout
from cloister.sealed.stream import SealedReader, SealedWriter
from fakes.sealed_material import KeepOpen, data_key, tink_primitive

ABOUT = AssociatedData("bench", "data")


class Sink(io.RawIOBase):
    """Takes everything and keeps it in memory that exists already."""

    def __init__(self, size: int) -> None:
        self.memory = memoryview(bytearray(size))
        self.at = 0

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def,override]
        self.memory[self.at : self.at + len(data)] = data
        self.at += len(data)
        return len(data)


def raw_seal(plain: memoryview, out: memoryview, segment: int) -> None:
    """AES-256-GCM and nothing else: the speed of light for a segmented format."""
    aead, size = AESGCM(bytes(32)), segment - 16
    for index, at in enumerate(range(0, len(plain), size)):
        piece = plain[at : at + size]
        aead.encrypt_into(index.to_bytes(12, "big"), piece, None, out[index * segment :][: len(piece) + 16])


def raw_open(sealed: memoryview, out: memoryview, segment: int, length: int) -> None:
    """Undo `raw_seal`."""
    aead, size = AESGCM(bytes(32)), segment - 16
    for index, at in enumerate(range(0, length, size)):
        target = out[at : min(at + size, length)]
        aead.decrypt_into(index.to_bytes(12, "big"), sealed[index * segment :][: len(target) + 16], None, target)


def file_seal(plain: memoryview, sink: Sink, scratch: memoryview, segment: int) -> None:
    """AES-256-GCM through the write of a file: the ciphertext is copied once, as in any program that writes files."""
    aead, size = AESGCM(bytes(32)), segment - 16
    for index, at in enumerate(range(0, len(plain), size)):
        piece = plain[at : at + size]
        out = scratch[: len(piece) + 16]
        aead.encrypt_into(index.to_bytes(12, "big"), piece, None, out)
        sink.write(out)


def file_open(source: io.BytesIO, out: memoryview, scratch: memoryview, segment: int) -> None:
    """Undo `file_seal`."""
    aead, size = AESGCM(bytes(32)), segment - 16
    for index, at in enumerate(range(0, len(out), size)):
        target = out[at : at + size]
        sealed = scratch[: len(target) + 16]
        source.readinto(sealed)
        aead.decrypt_into(index.to_bytes(12, "big"), sealed, None, target)


def candidates(plain: bytes, segment: int) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Return seal and open of each; each opens what it sealed."""
    size, view = len(plain), memoryview(plain)
    buffer = memoryview(bytearray(size))
    room = size + size // (segment - 16) * 16 + segment + 4096
    sink = Sink(room)
    raw = memoryview(bytearray(room))
    dek = data_key().secret.reveal()
    tink_file = KeepOpen()
    raw_sink, scratch = Sink(room), memoryview(bytearray(segment))

    def raw_file_seal() -> None:
        raw_sink.at = 0
        file_seal(view, raw_sink, scratch, segment)

    def raw_file_open() -> None:
        source = io.BytesIO(raw_sink.memory[: raw_sink.at])
        start = time.perf_counter()
        file_open(source, buffer, scratch, segment)
        raw_file_open.took = time.perf_counter() - start  # type: ignore[attr-defined]

    def ours_seal() -> None:
        sink.at = 0
        with SealedWriter(sink, data_key=data_key(), associated=ABOUT, segment_size=segment) as file:  # type: ignore[arg-type]
            file.write(view)

    def ours_open() -> None:
        source = io.BytesIO(sink.memory[: sink.at])
        start = time.perf_counter()
        with SealedReader(source, data_key=data_key()) as file:
            assert file.readinto(buffer) == size
        ours_open.took = time.perf_counter() - start  # type: ignore[attr-defined]  # without the copy into BytesIO

    def tink_seal() -> None:
        nonlocal tink_file
        tink_file = KeepOpen()
        with tink_primitive(dek, segment).new_encrypting_stream(tink_file, b"") as file:
            for at in range(0, size, 1 << 20):
                file.write(view[at : at + (1 << 20)])

    def tink_open() -> None:
        with tink_primitive(dek, segment).new_decrypting_stream(io.BytesIO(tink_file.content), b"") as file:
            while file.read(1 << 20):
                pass

    return {
        "cloister": (ours_seal, ours_open),
        "AES-256-GCM": (lambda: raw_seal(view, raw, segment), lambda: raw_open(raw, buffer, segment, size)),
        "... to a file": (raw_file_seal, raw_file_open),
        "tink": (tink_seal, tink_open),
    }


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    took = time.perf_counter() - start
    return float(getattr(function, "took", took))


def throughput(plain: bytes, segment: int, rounds: int) -> None:
    """Print GB/s of each candidate and ours as a multiple of it."""
    size = len(plain)
    runs = candidates(plain, segment)
    fernet, small = Fernet(Fernet.generate_key()), plain[: max(1, size // 16)]
    tokens: list[bytes] = []
    identity = pyrage.x25519.Identity.generate()
    boxes: list[bytes] = []
    recipient = [identity.to_public()]
    best: dict[tuple[str, str], float] = {}

    def note(name: str, what: str, seconds: float, done: int) -> None:
        best[name, what] = max(best.get((name, what), 0.0), done / seconds / 1e9)

    for _ in range(rounds):
        for name, (seal, open_) in runs.items():
            note(name, "seal", timed(seal), size)
            note(name, "open", timed(open_), size)
        # Fernet and age are one call over everything, and slow: a sixteenth of the bytes is enough to time.
        note("Fernet", "seal", timed(lambda: tokens.append(fernet.encrypt(small))), len(small))
        note("Fernet", "open", timed(lambda: fernet.decrypt(tokens.pop())), len(small))
        note("age", "seal", timed(lambda: boxes.append(pyrage.encrypt(small, recipient))), len(small))
        note("age", "open", timed(lambda: pyrage.decrypt(boxes.pop(), [identity])), len(small))
    print(f"\n{size >> 20} MiB, segments of {segment >> 10} KiB, one thread, best of {rounds}")
    print(f"{'':14}{'seal GB/s':>10}{'ours is':>10}{'open GB/s':>11}{'ours is':>10}")
    for name in [*runs, "age", "Fernet"]:
        cells = [(best[name, what], best["cloister", what] / best[name, what]) for what in ("seal", "open")]
        print(f"{name:14}" + "".join(f"{speed:{10 + i}.3f}{ratio:9.2f}x" for i, (speed, ratio) in enumerate(cells)))


def threads(plain: bytes, directory: Path, rounds: int) -> None:
    """Print what a second thread brings, from and to a file that is in the page cache."""
    path, buffer = directory / "threads", bytearray(len(plain))
    best: dict[tuple[str, int], float] = {}
    for segment in (DATA_SEGMENT_SIZE, MODEL_SEGMENT_SIZE):
        best.clear()
        for _ in range(rounds):
            for workers in (1, 2):
                writer = SealedWriter(
                    path, data_key=data_key(), associated=ABOUT, segment_size=segment, workers=workers
                )
                start = time.perf_counter()
                writer.write(plain)
                best["seal", workers] = max(best.get(("seal", workers), 0), len(plain) / (time.perf_counter() - start))
                writer.close()
                with SealedReader(path, data_key=data_key(), workers=workers) as reader:
                    start = time.perf_counter()
                    reader.readinto(buffer)
                    speed = len(plain) / (time.perf_counter() - start)
                best["open", workers] = max(best.get(("open", workers), 0), speed)
        for what in ("seal", "open"):
            one, two = best[what, 1] / 1e9, best[what, 2] / 1e9
            print(f"{segment >> 10:5} KiB {what}: one thread {one:.2f} GB/s, two {two:.2f} GB/s, {two / one:.2f}x")


def many_files(directory: Path, count: int) -> None:
    """Print how long it takes to open a directory of many files, and the memory it takes."""
    entries = []
    for number in range(count):
        folder = directory / f"{number // 1000:03}"
        folder.mkdir(exist_ok=True)
        name = f"{folder.name}/{number:06}.jsonl"
        (directory / f"{name}.sealed").touch()
        length = Layout(DATA_SEGMENT_SIZE).stream_length(100)
        header = "28" + secrets.token_hex(39)
        entries.append(FileEntry(name, 100, length, DATA_SEGMENT_SIZE, 1, secrets.token_hex(16), header))
    manifest = Manifest("bench", 1, b"", data_key().key_uri, tuple(entries)).signed(data_key().secret)
    (directory / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    del entries, manifest
    child = os.fork()
    if child == 0:  # a process of its own, so that its memory is its own
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        SealedDirectory.open(directory, data_key=data_key())
        took = time.perf_counter() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(
            f"\n{count:,} files: manifest and listing checked in {took:.2f} s, {grown:.0f} MB more than before",
            flush=True,
        )
        os._exit(0)
    os.waitpid(child, 0)


def random_reads(plain: bytes, directory: Path, rounds: int) -> None:
    """Print the time of opening a file, and of reading 4 KiB somewhere in it."""
    print(f"\n{'on disk (cached)':18}{'open ms':>10}{'4 KiB read us':>15}{'plain read us':>15}")
    (directory / "plain").write_bytes(plain)
    for segment in (DATA_SEGMENT_SIZE, MODEL_SEGMENT_SIZE):
        path = directory / f"{segment}"
        with SealedWriter(path, data_key=data_key(), associated=ABOUT, segment_size=segment) as file:
            file.write(plain)
        opening, ours, theirs = [], [], []
        buffer = bytearray(4096)
        with (directory / "plain").open("rb", buffering=0) as raw:
            for _ in range(rounds * 100):
                start = time.perf_counter()
                reader = SealedReader(path, data_key=data_key())
                opening.append(time.perf_counter() - start)
                at = secrets.randbelow(len(plain) - 4096)
                for file_object, times in ((reader, ours), (raw, theirs)):
                    start = time.perf_counter()
                    file_object.seek(at)
                    file_object.readinto(buffer)  # type: ignore[attr-defined]
                    times.append(time.perf_counter() - start)
                reader.close()
        name = f"{segment >> 10} KiB segments"
        medians = [statistics.median(times) for times in (opening, ours, theirs)]
        print(f"{name:18}{medians[0] * 1e3:10.3f}{medians[1] * 1e6:15.1f}{medians[2] * 1e6:15.1f}")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    plain = os.urandom(arguments.size_mib << 20)
    for segment in (DATA_SEGMENT_SIZE, MODEL_SEGMENT_SIZE):
        throughput(plain, segment, arguments.rounds)
    with tempfile.TemporaryDirectory() as directory:
        print(f"\n{arguments.size_mib} MiB from and to a file, best of {arguments.rounds}")
        threads(plain, Path(directory), arguments.rounds)
        random_reads(plain, Path(directory), arguments.rounds)
    with tempfile.TemporaryDirectory() as directory:
        many_files(Path(directory), 100_000)


if __name__ == "__main__":
    main()
