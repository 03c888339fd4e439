# SPDX-License-Identifier: Apache-2.0
"""Model archives: a TorchServe .mar that holds a handler in the clear and a model under seal, and nothing else.

    MAR-INF/MANIFEST.json           torch-model-archiver's
    <handler>.py                    one module; its digest is measured before a key is released
    model/cloister-manifest.json    the sealed directory as it is
    model/**/*.sealed

A .mar is a zip file that anybody may have made, so it is read with suspicion: a closed list of names, no zip64, no
compression of what should be ciphertext, every size bounded before a byte is unpacked. The sealed files themselves
need no trust: whoever changes one makes it unreadable.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from cloister.atomicfile import AtomicFile, file_error, is_partial
from cloister.errors import CloisterError, Code
from cloister.sealed.format import SUFFIX, Header, check_path
from cloister.sealed.manifest import MANIFEST_NAME

MODEL_DIRECTORY: Final = "model"
MAR_MANIFEST: Final = "MAR-INF/MANIFEST.json"
DEFAULT_HANDLER_NAME: Final = "text_classifier.py"
_HANDLER_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}\.py")
_MODEL_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")  # model_archiver's own rule
_RUNTIMES: Final = frozenset({"python", "python3"})
_EPOCH: Final = (1980, 1, 1, 0, 0, 0)  # of zip files: the same content gives the same bytes
_CHUNK: Final = 1 << 20
_END_SIZE: Final = 22  # end of central directory record without a comment (APPNOTE 4.3.16)
_ENCRYPTED: Final = 0x1
# What zipfile raises on bytes that no zip program wrote.
_MALFORMED: Final = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, RuntimeError, OverflowError)


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may hold."""

    archive_bytes: int = (4 << 30) - (16 << 20)  # without zip64; BERT large is 1.3 GB
    entries: int = 1024  # a sharded model has some dozens
    directory_bytes: int = 1 << 20  # the zip's table of contents is read into memory whole
    handler_bytes: int = 1 << 20  # source text
    manifest_bytes: int = 64 << 10  # MAR-INF/MANIFEST.json
    sealed_manifest_bytes: int = 16 << 20  # a few hundred bytes for each file


LIMITS: Final = ArchiveLimits()


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that was checked; the sealed files are still in it."""

    model_name: str
    handler_name: str
    handler_source: bytes
    mar_manifest: bytes  # JSON, as it stands in the archive
    sealed_files: tuple[str, ...]  # below MODEL_DIRECTORY, the sealed manifest included
    unpacked_bytes: int


def build_archive(
    sealed_model_dir: Path,
    out_path: Path,
    *,
    handler_source: bytes,
    handler_name: str = DEFAULT_HANDLER_NAME,
    model_name: str = "model",
) -> bytes:
    """Pack a sealed model directory and a handler into a .mar and return its SHA-384 (48 bytes).

    The same content gives the same bytes. Raises CloisterError: NOT_SEALED for a directory that is not sealed,
    ARCHIVE_INVALID for what could not be served, PREREQUISITE_MISSING without torch-model-archiver.
    """
    if not (sealed_model_dir / MANIFEST_NAME).is_file():
        raise CloisterError(
            Code.NOT_SEALED,
            what=f"{sealed_model_dir} is not a sealed model directory",
            why=f"it has no {MANIFEST_NAME}",
            todo="give the model directory that a training job wrote",
        )
    mar_manifest = _mar_manifest(model_name, handler_name)
    with AtomicFile(out_path, mode=0o644) as file:
        target = _HashingTarget(file)
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as packed:  # type: ignore[call-overload]
            packed.writestr(_entry(MAR_MANIFEST), mar_manifest)
            packed.writestr(_entry(handler_name), handler_source)
            for path in _files_of(sealed_model_dir):
                entry = _entry(f"{MODEL_DIRECTORY}/{path.relative_to(sealed_model_dir).as_posix()}")
                entry.file_size = path.stat().st_size
                with path.open("rb") as source, packed.open(entry, "w") as sink:
                    while chunk := source.read(_CHUNK):
                        sink.write(chunk)
    with out_path.open("rb") as written:
        try:
            read_archive(written)
        except CloisterError:
            out_path.unlink()
            raise
    return target.digest()


def read_archive(file: BinaryIO, *, limits: ArchiveLimits = LIMITS) -> Archive:
    """Check an archive of any origin and return what it is; raise CloisterError(ARCHIVE_INVALID) otherwise."""
    size = _check_end(file, limits)
    try:
        with zipfile.ZipFile(file) as packed:
            entries = {entry.filename: entry for entry in packed.infolist()}
            _check_entries(packed.infolist(), size, limits)
            mar_manifest = _read(packed, entries, MAR_MANIFEST, limits.manifest_bytes)
            model_name, handler_name = _parse_manifest(mar_manifest)
            sealed = tuple(sorted(_sealed_name(name) for name in entries if name not in {MAR_MANIFEST, handler_name}))
            handler_source = _read(packed, entries, handler_name, limits.handler_bytes)
            _check_sealed(packed, entries, sealed, limits)
    except _MALFORMED as error:
        raise _invalid(f"it is not a zip file that can be read: {str(error)[:200]}") from None
    unpacked = sum(entry.file_size for entry in entries.values())
    return Archive(model_name, handler_name, handler_source, mar_manifest, sealed, unpacked)


def extract_sealed(file: BinaryIO, archive: Archive, directory: Path) -> None:
    """Write the sealed directory of a checked archive into a directory that is there and empty.

    Raises CloisterError: ARCHIVE_INVALID, or DISK_FULL and IO_FAILED for what the disk says.
    """
    try:
        with zipfile.ZipFile(file) as packed:
            for name in archive.sealed_files:
                entry = packed.getinfo(f"{MODEL_DIRECTORY}/{name}")
                target = directory / name
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                _copy(packed, entry, target)
    except KeyError:
        raise _invalid("it changed while it was unpacked") from None
    except _MALFORMED as error:
        raise _invalid(f"a file in it is damaged: {str(error)[:200]}") from None
    except OSError as error:
        raise file_error(error, what="the model archive cannot be unpacked") from error


def sealed_manifest(file: BinaryIO) -> bytes:
    """Return the manifest of the sealed directory in an archive that was checked; raise CloisterError."""
    try:
        with zipfile.ZipFile(file) as packed:
            entries = {entry.filename: entry for entry in packed.infolist()}
            return _read(packed, entries, f"{MODEL_DIRECTORY}/{MANIFEST_NAME}", LIMITS.sealed_manifest_bytes)
    except _MALFORMED as error:
        raise _invalid(f"it is not a zip file that can be read: {str(error)[:200]}") from None


class _HashingTarget:
    """Where zipfile writes: no seeking, so that the digest is of exactly what was written."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file
        self._digest = hashlib.sha384()

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """Do nothing: the file is synced once, at its end."""

    def digest(self) -> bytes:
        return self._digest.digest()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.external_attr = (stat.S_IFREG | 0o644) << 16
    return entry


def _files_of(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise _invalid(f"{path.name} is neither a file nor a directory")
        if path.is_file() and not is_partial(path.name):
            yield path


def _mar_manifest(model_name: str, handler_name: str) -> bytes:
    # Its manifest only: the archiver's copying goes through a directory of a predictable name in the shared
    # temporary directory, which it deletes first, and its zip holds the time of day.
    try:
        from model_archiver.model_archiver_config import ModelArchiverConfig
        from model_archiver.model_packaging_utils import ModelExportUtils
    except ImportError:
        raise CloisterError(
            Code.PREREQUISITE_MISSING,
            what="the package torch-model-archiver is not installed",
            why="model archives carry its manifest",
            todo="pip install 'cloister[serve]'",
        ) from None
    config = ModelArchiverConfig(model_name=model_name, version="1.0", handler=handler_name, runtime="python")
    document = json.loads(ModelExportUtils.generate_manifest_json(config))
    del document["createdOn"]
    return json.dumps(document, indent=2).encode()


def _check_end(file: BinaryIO, limits: ArchiveLimits) -> int:
    """Check the zip's last record before zipfile reads the table of contents it points to; return the file's size."""
    size = file.seek(0, io.SEEK_END)
    if size > limits.archive_bytes:
        raise _invalid(f"it is {size} bytes long; at most {limits.archive_bytes} are taken")
    # One record more: a zip64 locator would stand right before the end record and override it.
    file.seek(max(0, size - _END_SIZE - 20))
    tail = file.read(_END_SIZE + 20)
    end = tail[-_END_SIZE:]
    if len(end) < _END_SIZE or end[:4] != b"PK\x05\x06" or end[-2:] != b"\0\0":
        raise _invalid("it does not end like a zip file without a comment")
    if tail.startswith(b"PK\x06\x07"):
        raise _invalid("it is a zip64 file, which no archive below 4 GiB needs")
    entries, directory_bytes = struct.unpack_from("<HI", end, 10)
    if entries > limits.entries or directory_bytes > limits.directory_bytes:
        raise _invalid(f"it claims {entries} files; at most {limits.entries} are taken")
    return size


def _check_entries(entries: list[zipfile.ZipInfo], size: int, limits: ArchiveLimits) -> None:
    if len(entries) > limits.entries:
        raise _invalid(f"it holds more than {limits.entries} files")
    if len({entry.filename for entry in entries}) != len(entries):
        raise _invalid("it holds a name twice")
    for entry in entries:
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if entry.is_dir() or kind not in {0, stat.S_IFREG}:
            raise _invalid(f"{_shown(entry.filename)} is not a regular file")
        if entry.flag_bits & _ENCRYPTED or entry.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise _invalid(f"{_shown(entry.filename)} is packed in a way that is not taken")
        # Ciphertext does not shrink: a sealed file that would unpack to much more is a bomb.
        if entry.filename.endswith(SUFFIX) and entry.file_size > 2 * entry.compress_size + 1024:
            raise _invalid(f"{_shown(entry.filename)} would unpack to {entry.file_size} bytes")
    # Entries that overlap are the other kind of bomb.
    if sum(entry.compress_size for entry in entries) > size:
        raise _invalid("its files are together longer than it is")


def _parse_manifest(data: bytes) -> tuple[str, str]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        raise _invalid(f"{MAR_MANIFEST} is not JSON") from None
    match document:
        case {"runtime": str(runtime), "model": {"modelName": str(name), "handler": str(handler)}} if (
            runtime in _RUNTIMES and _MODEL_NAME.fullmatch(name)
        ):
            if _HANDLER_NAME.fullmatch(handler):
                return name, handler
            raise _invalid(f"its handler {_shown(handler)} is not the name of one Python module in the archive")
    raise _invalid(f"{MAR_MANIFEST} does not name a model, a handler and runtime python")


def _sealed_name(name: str) -> str:
    """Return the name below the model directory; refuse every name that has no business in an archive."""
    inner = name.removeprefix(f"{MODEL_DIRECTORY}/")
    if inner != name:
        if inner == MANIFEST_NAME:
            return inner
        try:
            check_path(inner.removesuffix(SUFFIX))
        except ValueError as error:
            raise _invalid(f"the name {_shown(name)} is not allowed: {error}") from None
        if inner.endswith(SUFFIX):
            return inner
    raise _invalid(
        f"{_shown(name)} does not belong in it: only the handler and sealed files below {MODEL_DIRECTORY}/ do"
    )


def _check_sealed(
    packed: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], sealed: tuple[str, ...], limits: ArchiveLimits
) -> None:
    if MANIFEST_NAME not in sealed or len(sealed) < 2:
        raise _invalid(f"it holds no sealed model: {MODEL_DIRECTORY}/{MANIFEST_NAME} and the files it lists")
    if entries[f"{MODEL_DIRECTORY}/{MANIFEST_NAME}"].file_size > limits.sealed_manifest_bytes:
        raise _invalid(f"{MANIFEST_NAME} is longer than {limits.sealed_manifest_bytes} bytes")
    for name in sealed:
        if name != MANIFEST_NAME:
            with packed.open(f"{MODEL_DIRECTORY}/{name}") as member:
                try:
                    Header.read(member, name=name)  # type: ignore[arg-type]  # ZipExtFile reads like a BinaryIO
                except CloisterError as error:
                    raise _invalid(f"{_shown(name)} is not sealed: {error.why}") from None


def _read(packed: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], name: str, limit: int) -> bytes:
    if name not in entries:
        raise _invalid(f"{_shown(name)} is missing")
    if entries[name].file_size > limit:
        raise _invalid(f"{_shown(name)} is longer than {limit} bytes")
    return packed.read(name)


def _copy(packed: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as sink, packed.open(entry) as member:
        while chunk := member.read(_CHUNK):
            sink.write(chunk)


def _shown(name: str) -> str:
    return repr(name[:200])


def _invalid(why: str) -> CloisterError:
    return CloisterError(
        Code.ARCHIVE_INVALID,
        what="this is not a model archive that can be served",
        why=why,
        todo="build it with `cloister model deploy` or cloister.data.archive.build_archive from a sealed model",
    )
