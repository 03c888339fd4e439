# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint on sealed files: sharded, asynchronous, resharded on load, never overwritten.

    <root>/<step, 12 digits>/__<rank>_<n>.distcp.sealed, .metadata.sealed     each a sealed file
    <root>/<step, 12 digits>/cloister-manifest.json                           written last: without it there is none

Every rank writes its own files under one data key; the coordinating rank opens them once more and binds them into a
manifest whose dataset name is that of these checkpoints and the step, so that neither a file nor a checkpoint can
stand in for another. `.metadata` is torch's pickle: it is read only from a manifest that holders of the key made.
"""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter

from cloister.atomicfile import file_error, sync_directory, write_atomically
from cloister.data import keyring
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory
from cloister.sealed.format import MODEL_SEGMENT_SIZE, SUFFIX, AssociatedData
from cloister.sealed.manifest import MANIFEST_NAME, FileEntry, Manifest
from cloister.sealed.stream import SealedReader, SealedWriter

_STEP: Final = re.compile(r"[0-9]{12}")
_TEMPORARY: Final = ".tmp"  # torch writes .metadata under this name first
_SPARE: Final = 64 * 1024 * 1024  # bytes that stay free on the disk: metadata, manifest, everybody else


class Checkpoints:
    """The checkpoints of one training run below one directory; all ranks make one of these with the same arguments."""

    def __init__(self, root: Path, *, name: str, data_key: DataKey | None = None, keep: int = 2) -> None:
        """`name` is the same for every run that may continue another's; `keep` older ones are removed after a save.

        Without `data_key` the process's keyring gives one to rank 0, and the same one to every other rank.
        """
        if keep < 1:
            raise CloisterError(Code.ARGUMENT_INVALID, what=f"cannot keep {keep} checkpoints", todo="keep at least 1")
        self.root = root
        self._name = name
        self._keep = keep
        self._data_key = data_key

    def save(self, state: dict[str, Any], step: int) -> Path:
        """Save a sharded state under a step that has no checkpoint yet; collective. Returns its directory.

        Raises CloisterError on every rank: DISK_FULL, IO_FAILED, FILE_EXISTS. Earlier checkpoints stay whole.
        """
        writer = self._writer(step)
        with _unwrapped():
            dcp.save(state, storage_writer=writer)
        return self._place(step)

    def save_async(self, state: dict[str, Any], step: int) -> Future[Any]:
        """Copy the state, then save it while training goes on; collective. The future raises what `save` raises."""
        writer = self._writer(step)
        saving: Future[Any] = cast("Future[Any]", dcp.async_save(state, storage_writer=writer))
        return _translated(saving)

    def load(self, state: dict[str, Any], step: int | None = None, *, manifest_digest: bytes | None = None) -> int:
        """Fill the state in place, resharded to what it is now; collective. Returns the step.

        Without a step the newest one that is whole. With `manifest_digest` (48 bytes, as it was announced when the
        checkpoint was written) only that very checkpoint. Raises CloisterError: FILE_NOT_FOUND without one.
        """
        found = self.latest() if step is None else step
        if found is None or not (self._place(found) / MANIFEST_NAME).exists():
            raise CloisterError(
                Code.FILE_NOT_FOUND,
                what=f"there is no checkpoint in {self.root}",
                why="none was written to its end" if found is None else f"step {found} has none",
                todo="begin at step 0, or name the directory of the run that is to be continued",
            )
        with _unwrapped():
            dcp.load(state, storage_reader=_Reader(self._open(found, manifest_digest)))
        return found

    def latest(self, *, newest_known: int | None = None) -> int | None:
        """Return the step of the newest checkpoint that was written to its end, or None.

        With `newest_known`, the step of which the coordinator heard last: raises CloisterError(CHECKPOINT_ROLLED_BACK)
        when the newest one here is older, because storage lost it or was put back.
        """
        steps = self.steps()
        newest = steps[-1] if steps else None
        if newest_known is not None and (newest is None or newest < newest_known):
            raise CloisterError(
                Code.CHECKPOINT_ROLLED_BACK,
                what=f"{self.root} has no checkpoint of step {newest_known} any more",
                why=f"the newest here is {'none' if newest is None else f'of step {newest}'}",
                todo="restore the directory, or begin from the older one on purpose by naming its step",
            )
        return newest

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that were written to their end, oldest first."""
        if not self.root.is_dir():
            return []
        whole = (path for path in self.root.iterdir() if _STEP.fullmatch(path.name))
        return sorted(int(path.name) for path in whole if (path / MANIFEST_NAME).exists())

    def digest(self, step: int) -> bytes:
        """Return the digest of a checkpoint's manifest (48 bytes), to be remembered elsewhere than beside it."""
        return SealedDirectory.peek(self._place(step)).manifest_digest

    def _writer(self, step: int) -> _Writer:
        if not 0 <= step < 10**12:
            raise CloisterError(Code.ARGUMENT_INVALID, what=f"step {step} cannot be saved", todo="count from 0")
        return _Writer(self._place(step), self._dataset(step), self._key(), after=self._prune)

    def _open(self, step: int, manifest_digest: bytes | None) -> SealedDirectory:
        place = self._place(step)
        peek = SealedDirectory.peek(place)
        data_key = self._data_key
        if data_key is None or data_key.wrapped != peek.wrapped:
            data_key = keyring.current().open(
                peek.key_uri,
                key_version=peek.key_version,
                wrapped=peek.wrapped,
                manifest_digest=peek.manifest_digest,
            )
        directory = SealedDirectory.open(place, data_key=data_key, manifest_digest=manifest_digest)
        if directory.manifest.dataset != self._dataset(step):
            raise CloisterError(
                Code.SEALED_DIRECTORY_MISMATCH,
                what=f"{place} is not the checkpoint its name says",
                why=f"it was sealed as {directory.manifest.dataset}",
                todo="put the checkpoints back where the job wrote them",
            )
        return directory

    def _key(self) -> DataKey:
        """Return the key of this run; the first save on all ranks agrees on it."""
        if self._data_key is None:
            self._data_key = _shared_key()
        return self._data_key

    def _prune(self) -> None:
        """Remove checkpoints that are not to be kept, manifest first: what is half removed is none.

        What is older than all that are kept and has no manifest was left by a process that was killed, and goes, too.
        """
        whole = self.steps()
        oldest = whole[-self._keep :][0]
        for path in list(self.root.iterdir()):
            if _STEP.fullmatch(path.name) and int(path.name) < oldest:
                (path / MANIFEST_NAME).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self.root / f"{step:012d}"

    def _dataset(self, step: int) -> str:
        return f"{self._name}/checkpoint/{step}"


def _shared_key() -> DataKey:
    """Get a data key on rank 0 and, by its wrapped form, on all others: no key goes through a collective."""
    ring = keyring.current()
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ring.new()
    made = ring.new() if dist.get_rank() == 0 else None
    parts: list[Any] = [(made.key_uri, made.key_version, made.wrapped) if made else None]
    dist.broadcast_object_list(parts, src=0)
    uri, version, wrapped = parts[0]
    return made or ring.open(uri, key_version=version, wrapped=wrapped)


class _SealedFileSystem(FileSystem):  # type: ignore[misc]  # torch is not typed
    """Torch's file system with a seal on every file."""

    def __init__(self, data_key: DataKey, dataset: str, directory: SealedDirectory | None = None) -> None:
        self._data_key = data_key
        self._dataset = dataset
        self._directory = directory  # to read from

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        name = Path(path).name
        if mode == "rb":
            if self._directory is None:
                raise ValueError("this file system is for writing")
            with self._directory.open_file(name) as reader:
                yield _View(reader)
            return
        about = AssociatedData(self._dataset, name.removesuffix(_TEMPORARY))
        with SealedWriter(
            _sealed(path), data_key=self._data_key, associated=about, segment_size=MODEL_SEGMENT_SIZE
        ) as writer:
            try:
                yield writer
            except Exception:
                # Torch reports a failed write as a wrong position; what failed first is what is wrong.
                writer.raise_failure()
                raise

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        _sealed(path).rename(_sealed(new_path))

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return _sealed(path).exists()

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        _sealed(path).unlink()


class _View(io.RawIOBase):
    """A sealed file whose `readinto` is all that torch uses of it; kept apart because torch closes what it reads."""

    def __init__(self, reader: SealedReader) -> None:
        self._reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._reader.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._reader.seek(offset, whence)

    def tell(self) -> int:
        return self._reader.tell()


class _Writer(FileSystemWriter):  # type: ignore[misc]  # torch is not typed
    def __init__(self, place: Path, dataset: str, data_key: DataKey, *, after: Any) -> None:
        super().__init__(place, sync_files=False, overwrite=False)  # a sealed writer syncs by itself
        self.fs = _SealedFileSystem(data_key, dataset)
        self._data_key = data_key
        self._dataset = dataset
        self._after = after

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        place = Path(self.path)
        if (place / MANIFEST_NAME).exists():
            raise CloisterError(
                Code.FILE_EXISTS,
                what=f"there is a checkpoint in {place}",
                why="a checkpoint is never overwritten",
                todo="save under another step",
            )
        if is_coordinator and place.exists():
            for path in place.iterdir():
                path.unlink()  # what was not written to its end; nobody has begun to write into it yet
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def write_data(self, plan: Any, planner: Any) -> Any:
        wanted = sum(_size(item) for item in plan.items)
        status = os.statvfs(self.path)
        free = status.f_bavail * status.f_frsize
        if free < wanted + _SPARE:
            raise CloisterError(
                Code.DISK_FULL,
                what=f"the checkpoint does not fit into {self.path}",
                why=f"it takes {wanted} bytes, and {free} are free",
                todo="free some space, or keep fewer checkpoints; earlier ones are whole",
            )
        return super().write_data(plan, planner)

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        place = Path(self.path)
        try:
            entries = []
            for path in place.iterdir():
                with SealedReader(path, data_key=self._data_key) as reader:
                    entries.append(FileEntry.of(reader))
            manifest = Manifest(self._dataset, 1, b"", self._data_key.key_uri, tuple(entries))
            sync_directory(place)
            write_atomically(place / MANIFEST_NAME, manifest.signed(self._data_key.secret).to_bytes(), mode=0o644)
            sync_directory(place.parent)
            self._after()
        except OSError as error:
            raise file_error(error, what=f"cannot finish the checkpoint in {place}") from error


class _Reader(FileSystemReader):  # type: ignore[misc]  # torch is not typed
    def __init__(self, directory: SealedDirectory) -> None:
        super().__init__(str(directory.storage))
        self.fs = _SealedFileSystem(directory.data_key, directory.manifest.dataset, directory)


def _sealed(path: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(path)}{SUFFIX}")


def _size(item: Any) -> int:
    if item.tensor_data is None:
        return 0
    count = 1
    for length in item.tensor_data.chunk.sizes:
        count *= length
    return count * int(torch.empty(0, dtype=item.tensor_data.properties.dtype).element_size())


@contextmanager
def _unwrapped() -> Iterator[None]:
    """Raise the error that a rank met, not torch's collection of them."""
    try:
        yield
    except CheckpointException as error:
        raise _first(error) from None


def _first(error: CheckpointException) -> BaseException:
    failures: Mapping[int, Any] = error.failures
    causes = [failure[0] if isinstance(failure, tuple) else failure for _, failure in sorted(failures.items())]
    ours = [cause for cause in causes if isinstance(cause, CloisterError)]
    return ours[0] if ours else error


def _translated(saving: Future[Any]) -> Future[Any]:
    done: Future[Any] = Future()

    def pass_on(finished: Future[Any]) -> None:
        error = finished.exception()
        if isinstance(error, CheckpointException):
            error = _first(error)
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(finished.result())

    saving.add_done_callback(pass_on)
    return done
