# SPDX-License-Identifier: Apache-2.0
"""Seal files and directories into a sealed directory, with all cores, and go on after an interruption."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.atomicfile import file_error
from cloister.sealed.batches import SPREAD_SIZE
from cloister.sealed.datakey import DataKey
from cloister.sealed.directorywriter import SealedDirectoryWriter, argument, unusable, walk
from cloister.sealed.format import DATA_SEGMENT_SIZE, check_path
from cloister.sealed.manifest import Manifest
from cloister.sealed.spread import Job, cores, spread

# Called with bytes of plaintext done, bytes in total, and the file at hand; what it raises ends the work.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class _Source:
    name: str  # path in the sealed directory
    place: Path
    size: int  # bytes when it was listed
    modified_ns: int


def seal_directory(
    source: Path | Sequence[Path],
    out: Path,
    *,
    data_key: DataKey,
    dataset: str,
    version: int = 1,
    parent: bytes = b"",
    segment_size: int = DATA_SEGMENT_SIZE,
    signing_key: Ed25519PrivateKey | None = None,
    progress: Progress | None = None,
    workers: int = 0,
) -> Manifest:
    """Seal a directory, or files and directories side by side, into a new directory; return the manifest.

    Every file below a source is sealed, hidden ones too. Symbolic links and special files are refused by name
    before anything is written, and so is a file that changes while it is read. A run that was interrupted goes on
    when it is started again with the same data key; with another one it starts anew. A finished directory is never
    overwritten (FILE_EXISTS). `workers` threads share the work; 0 is one for each core.
    """
    sources = _list([source] if isinstance(source, Path) else list(source), out)
    workers = workers or cores()
    counted = _Counted(sum(file.size for file in sources), progress)
    with SealedDirectoryWriter(
        out,
        data_key=data_key,
        dataset=dataset,
        version=version,
        parent=parent,
        segment_size=segment_size,
        signing_key=signing_key,
    ) as writer:
        # A large file keeps all threads busy by itself; small ones are handed out.
        large = [file for file in sources if file.size >= SPREAD_SIZE]
        small = [file for file in sources if file.size < SPREAD_SIZE]
        for file in large:
            _seal(writer, file, counted, workers=workers)

        def worker() -> Job:
            return lambda index: _seal(writer, small[index], counted, workers=1)

        spread(len(small), worker, workers=workers)
        return writer.finish()


class _Counted:
    """Adds up what several threads did."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total, name)


def _seal(writer: SealedDirectoryWriter, file: _Source, counted: _Counted, *, workers: int) -> None:
    if writer.finished(file.name, size=file.size, modified_ns=file.modified_ns):
        counted.add(file.size, file.name)
        return
    with writer.open(file.name, workers=workers) as sealed, _unchanging(file) as descriptor:
        sealed.write_from(descriptor, file.size, progress=lambda count: counted.add(count, file.name))
    writer.note(file.name, size=file.size, modified_ns=file.modified_ns)
    if not file.size:
        counted.add(0, file.name)


def _list(sources: Sequence[Path], out: Path) -> list[_Source]:
    """Return the files to seal, sorted by name; refuse what cannot be sealed faithfully."""
    found: dict[str, _Source] = {}
    for source in sources:
        # The content of the only directory; several sources keep their own names.
        prefix = "" if len(sources) == 1 else f"{source.resolve().name}/"
        try:
            places = _below(source, prefix)
            if out.resolve().is_relative_to(source.resolve()):
                raise unusable(f"cannot seal {source} into {out}", "the output lies inside what is to be sealed")
            for name, place, regular in places:
                argument(check_path, name)
                if not regular:
                    kind = "a symbolic link" if place.is_symlink() else "not a regular file"
                    raise unusable(f"cannot seal {place}", f"it is {kind}, and only files are sealed")
                if name in found:
                    raise unusable(f"cannot seal {place}", f"{found[name].place} has the same name, {name}")
                status = place.stat()
                found[name] = _Source(name, place, status.st_size, status.st_mtime_ns)
        except OSError as error:
            raise file_error(error, what=f"cannot read {source}") from error
    if not found:
        raise unusable(f"cannot seal {' '.join(map(str, sources))}", "there is no file in it")
    return [found[name] for name in sorted(found)]


def _below(source: Path, prefix: str) -> list[tuple[str, Path, bool]]:
    if source.is_file():
        return [(source.name, source.resolve(), True)]
    return [(prefix + name, source / name, regular) for name, regular in walk(source)]


@contextmanager
def _unchanging(file: _Source) -> Iterator[int]:
    """Open a source file; refuse it when it is another after reading than before."""
    try:
        descriptor = os.open(file.place, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            before = os.fstat(descriptor)
            yield descriptor
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise file_error(error, what=f"cannot read {file.place}") from error
    if not stat.S_ISREG(before.st_mode) or _state(before) != _state(after) or before.st_size != file.size:
        raise unusable(f"cannot seal {file.place}", "it was changed while it was read")


def _state(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino
