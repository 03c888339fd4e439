# SPDX-License-Identifier: Apache-2.0
"""Read a sealed directory: a manifest that binds names, sizes, contents and version, and one sealed file per file."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

from cloister.atomicfile import file_error, is_partial
from cloister.errors import CloisterError, Code
from cloister.sealed.batches import SPREAD_SIZE
from cloister.sealed.datakey import DataKey
from cloister.sealed.directorywriter import SealedDirectoryWriter
from cloister.sealed.extraction import Extraction
from cloister.sealed.format import SUFFIX, Header, invalid
from cloister.sealed.journal import MARKER_NAME, REWRAP_NAME
from cloister.sealed.manifest import MANIFEST_NAME, FileEntry, Manifest, manifest_invalid
from cloister.sealed.sealing import Progress, seal_directory
from cloister.sealed.spread import Job, cores, spread
from cloister.sealed.storage import LocalStorage, Storage, shown
from cloister.sealed.stream import SealedReader

__all__ = ["Peek", "Progress", "SealedDirectory", "SealedDirectoryWriter", "open_directory", "seal_directory"]


# What may stand beside the files: nothing of it is ever read as data.
_BESIDES: Final = frozenset({MANIFEST_NAME, MARKER_NAME, REWRAP_NAME})


class Peek(NamedTuple):
    """What can be known of a sealed directory without a key. Claims: nothing of it is authenticated yet."""

    manifest_digest: bytes  # SHA-384, 48 bytes; of the bytes as they lie there
    key_uri: str
    key_version: int
    wrapped: bytes


class SealedDirectory:
    """A sealed directory whose manifest is authentic and whose files are the listed ones, neither more nor fewer.

    Each file's content is checked when it is opened and read. Safe for several threads; its readers are not. It lies
    in a directory of this machine, or in any other `Storage`: the checks are the same.
    """

    def __init__(self, storage: Storage, *, manifest: Manifest, data_key: DataKey) -> None:
        self.storage = storage
        self.manifest = manifest
        self._data_key = data_key
        self._entries = {entry.path: entry for entry in manifest.files}

    @classmethod
    def peek(cls, path: Path | Storage) -> Peek:
        """Read which key opens a directory, for whoever has to ask for that key first.

        Raises CloisterError: NOT_SEALED, MANIFEST_INVALID, SEALED_DIRECTORY_MISMATCH or SEALED_FILE_INVALID.
        """
        storage = _storage(path)
        manifest = Manifest.parse(storage.manifest(), name=shown(storage))
        entry = manifest.files[0]
        first, name = entry.path, shown(storage, entry.path + SUFFIX)
        try:
            source = storage.file(entry.path + SUFFIX)
            with source.open("rb") if isinstance(source, Path) else source as file:
                header = Header.read(file, name=name)
        except FileNotFoundError:
            raise _mismatch(storage, f"{first} is missing") from None
        except OSError as error:
            raise file_error(error, what=f"cannot read {name}") from error
        if header.key_uri != manifest.key_uri:
            raise _mismatch(storage, f"{first} is under another key than the manifest says")
        # Without this, another version's file in this place would be asked a key for, and the manifest be blamed.
        if header.associated.path != first or header.associated.file_id.hex() != entry.file_id:
            raise _mismatch(storage, f"{first} is not the file that the manifest lists: another version, or swapped")
        return Peek(manifest.digest, header.key_uri, header.key_version, header.wrapped)

    @classmethod
    def open(
        cls,
        path: Path | Storage,
        *,
        data_key: DataKey,
        manifest_digest: bytes | None = None,
        signers: Collection[str] = (),
    ) -> SealedDirectory:
        """Check the manifest, and the directory against it.

        `manifest_digest`, when given, is the only one accepted: what was measured is what is read. Of `signers`
        (did:key), when any are given, one must have signed it. A file that the manifest does not list is refused, as
        is one that is missing.
        """
        storage = _storage(path)
        name = shown(storage)
        manifest = Manifest.parse(storage.manifest(), name=name)
        if data_key.key_uri != manifest.key_uri:
            raise manifest_invalid(name, f"it is under {manifest.key_uri}, not under {data_key.key_uri}")
        manifest.verify(data_key.secret, name=name)
        if manifest_digest is not None and not hmac.compare_digest(manifest.digest, manifest_digest):
            raise _mismatch(
                storage, "its manifest is authentic, but not the one asked for: another version of the data"
            )
        if signers and manifest.signer not in signers:
            raise manifest_invalid(
                name, f"it was signed by {manifest.signer or 'nobody'}, not by {' or '.join(signers)}"
            )
        cls.check_outside(storage, manifest)
        return cls(storage, manifest=manifest, data_key=data_key)

    @property
    def data_key(self) -> DataKey:
        """The key it was opened with."""
        return self._data_key

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the files, sorted."""
        return tuple(self._entries)

    def entry(self, name: str) -> FileEntry:
        """Return what the manifest says of a file; raise FILE_NOT_FOUND for one it does not list."""
        entry = self._entries.get(name)
        if entry is None:
            listed = ", ".join(list(self._entries)[:10])
            raise CloisterError(
                Code.FILE_NOT_FOUND,
                what=f"{name} is not in the sealed directory {self.storage}",
                why=f"its manifest lists {listed}" + (" and more" if len(self._entries) > 10 else ""),
                todo="name one of these, or seal the data with the file in it",
            )
        return entry

    def open_file(self, name: str, *, workers: int = 0) -> SealedReader:
        """Open a file for reading and check that it is the one the manifest lists.

        `workers` threads serve large reads; 0 is one for each core.
        """
        entry = self.entry(name)
        place = shown(self.storage, name + SUFFIX)
        try:
            source = self.storage.file(name + SUFFIX)
        except OSError as error:
            raise file_error(error, what=f"cannot read {place}") from error
        reader = SealedReader(source, data_key=self._data_key, name=place, workers=workers, owned=True)
        try:
            if reader.header.associated.dataset != self.manifest.dataset or reader.header.associated.path != name:
                raise invalid(place, f"it was sealed as {reader.header.associated.path} and was renamed or swapped")
            if FileEntry.of(reader) != entry:
                raise invalid(place, "it is authentic but not the file of this manifest: an older or a newer version")
        except CloisterError:
            reader.close()
            raise
        return reader

    def read(self, name: str) -> bytes:
        """Return a file's whole content."""
        with self.open_file(name) as file:
            return file.readall()

    def verify(self, *, progress: Progress | None = None) -> None:
        """Read every segment of every file; raise for the first that is not authentic."""
        buffer = memoryview(bytearray(4 * SPREAD_SIZE))
        total, done = self.manifest.size, 0
        for entry in self.manifest.files:
            with self.open_file(entry.path) as file:
                while count := file.readinto(buffer):
                    done += count
                    if progress:
                        progress(done, total, entry.path)

    def extract(self, out: Path, *, progress: Progress | None = None, workers: int = 0) -> None:
        """Write all files in the clear below `out`. For the owner's own machine.

        `out` is empty or absent, or holds what an interrupted run left: files that are whole and unchanged since are
        kept. `workers` threads share the work; 0 is one for each core.
        """
        with Extraction(out, self.manifest, progress) as extraction:
            entries = extraction.remaining()
            large = [entry for entry in entries if entry.length >= SPREAD_SIZE]
            small = [entry for entry in entries if entry.length < SPREAD_SIZE]
            for entry in large:
                extraction.write(entry, self.open_file(entry.path, workers=workers))

            def worker() -> Job:
                def job(index: int) -> None:
                    extraction.write(small[index], self.open_file(small[index].path, workers=1))

                return job

            spread(len(small), worker, workers=workers or cores())
            extraction.finish()

    @staticmethod
    def check_outside(path: Path | Storage, manifest: Manifest) -> None:
        """Check what needs no key: that the directory holds the listed files, no more and no fewer."""
        storage = _storage(path)
        expected = {entry.path + SUFFIX for entry in manifest.files}
        try:
            for name, regular in storage.names():
                if name in expected:
                    if not regular:
                        raise _mismatch(storage, f"{name} is not a regular file")
                    expected.remove(name)
                elif name not in _BESIDES and not is_partial(name.rpartition("/")[2]):
                    raise _mismatch(storage, f"{name} was added: the manifest does not list it")
        except OSError as error:
            raise file_error(error, what=f"cannot list {storage}") from error
        if expected:
            missing = min(expected).removesuffix(SUFFIX)
            raise _mismatch(storage, f"{missing} is missing: it was removed or renamed")


def open_directory(source: Path, out: Path, *, data_key: DataKey, progress: Progress | None = None) -> Manifest:
    """Verify a sealed directory and write it in the clear below `out`; return its manifest.

    A run that was interrupted goes on when it is started again.
    """
    directory = SealedDirectory.open(source, data_key=data_key)
    directory.extract(out, progress=progress)
    return directory.manifest


def _storage(path: Path | Storage) -> Storage:
    return LocalStorage(path) if isinstance(path, Path) else path


def _mismatch(storage: Storage, why: str) -> CloisterError:
    return CloisterError(
        Code.SEALED_DIRECTORY_MISMATCH,
        what=f"{storage} does not hold what its manifest says",
        why=why,
        todo="fetch the directory again from where it was sealed, or seal the data anew",
    )
