# SPDX-License-Identifier: Apache-2.0
"""Put another wrapped DEK into the headers of sealed files: a newer key version, and not a byte of data moved.

What changes stands at the end of the header, behind everything that is bound to the content, and the padding takes up
the difference: the header keeps its size and is written over in place. A machine that loses power in the middle of
that leaves a header whose end does not parse; its beginning holds all that is needed to mend it. A directory's marker
holds the wrapped DEK that goes in, so that an interrupted run is finished with the very same one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cloister.atomicfile import AtomicFile, file_error, is_partial, sync_directory, write_atomically
from cloister.errors import CloisterError, Code
from cloister.sealed.batches import BATCH_SIZE
from cloister.sealed.datakey import MAX_KEY_VERSION, MAX_WRAPPED_SIZE
from cloister.sealed.format import SUFFIX, Header
from cloister.sealed.journal import REWRAP_NAME
from cloister.sealed.manifest import MANIFEST_NAME, Manifest, read_manifest
from cloister.tlv import parse_tlv, tlv

_LABEL: Final = "cloister-rewrap-v1"

# From key URI, key version and wrapped DEK to the newest key version and the same DEK wrapped under it.
Rewrap = Callable[[str, int, bytes], tuple[int, bytes]]


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What a re-wrap did."""

    key_uri: str
    key_version: int  # that the headers name now
    files: int  # headers that were changed


def rewrap_directory(
    path: Path, rewrap: Rewrap, *, progress: Callable[[int, int, str], None] | None = None
) -> Rewrapped:
    """Put the newest key version into every header of a sealed directory, or finish doing so.

    The manifest and its digest stay. Raises CloisterError; a run that ended early is finished by another.
    """
    manifest = Manifest.parse(read_manifest(path), name=str(path / MANIFEST_NAME))
    marker = path / REWRAP_NAME
    first = path / (manifest.files[0].path + SUFFIX)
    try:
        if marker.exists():
            version, wrapped = _read_marker(marker)
        else:
            header = _read_header(first)
            version, wrapped = _ask(rewrap, header, first)
            write_atomically(marker, tlv(_LABEL, version, wrapped), mode=0o644)
        changed = 0
        for index, entry in enumerate(manifest.files):
            changed += _replace(path / (entry.path + SUFFIX), version, wrapped)
            if progress:
                progress(index + 1, len(manifest.files), entry.path)
        for left in [found for found in path.rglob("*") if is_partial(found.name)]:
            left.unlink(missing_ok=True)
        marker.unlink(missing_ok=True)
        sync_directory(path)
    except OSError as error:
        raise file_error(error, what=f"cannot re-wrap {path}") from error
    return Rewrapped(manifest.key_uri, version, changed)


def rewrap_file(path: Path, rewrap: Rewrap) -> Rewrapped:
    """Put the newest key version into the header of one sealed file."""
    try:
        header = _read_header(path)
        version, wrapped = _ask(rewrap, header, path)
        return Rewrapped(header.key_uri, version, int(_replace(path, version, wrapped)))
    except OSError as error:
        raise file_error(error, what=f"cannot re-wrap {path}") from error


def _read_header(path: Path) -> Header:
    with path.open("rb") as file:
        return Header.read(file, name=str(path))


def _ask(rewrap: Rewrap, header: Header, path: Path) -> tuple[int, bytes]:
    version, wrapped = rewrap(header.key_uri, header.key_version, header.wrapped)
    return _in_bounds(version, wrapped, path)


def _in_bounds(version: int, wrapped: bytes, path: Path) -> tuple[int, bytes]:
    if not (0 < version <= MAX_KEY_VERSION and 0 < len(wrapped) <= MAX_WRAPPED_SIZE):
        raise CloisterError(
            Code.WRAPPED_KEY_INVALID,
            what=f"cannot re-wrap {path}",
            why=f"the wrapped key that should go into its header is out of bounds (version {version}, "
            f"{len(wrapped)} bytes)",
            todo="ask the key broker again; nothing was changed",
        )
    return version, wrapped


def _replace(path: Path, key_version: int, wrapped: bytes) -> bool:
    """Write another header in front of the stream; say whether it is another one."""
    with path.open("r+b", buffering=0) as file:
        try:
            header = Header.read(file, name=str(path))
        except CloisterError:
            # Cut short by a loss of power, perhaps; anything worse is refused here.
            file.seek(0)
            changed: Header | None = Header.recover(file, key_version=key_version, wrapped=wrapped, name=str(path))
        else:
            if (header.key_version, header.wrapped) == (key_version, wrapped):
                return False
            changed = header.rewrapped(key_version, wrapped)
        if changed:
            os.pwrite(file.fileno(), changed.to_bytes(), 0)
            os.fsync(file.fileno())
            return True
        # A wrapped key so much longer that the padding cannot take it: the stream moves, as it is.
        with AtomicFile(path, mode=0o644) as out:
            out.write(replace(header, key_version=key_version, wrapped=wrapped).padded().to_bytes())
            while piece := file.read(BATCH_SIZE):
                out.write(piece)
    return True


def _read_marker(marker: Path) -> tuple[int, bytes]:
    try:
        version, wrapped = parse_tlv(marker.read_bytes(), label=_LABEL, fields=2)
        if len(version) != 8:
            raise ValueError("a version has 8 bytes")
    except ValueError:
        raise CloisterError(
            Code.SEALED_DIRECTORY_MISMATCH,
            what=f"{marker} is damaged",
            why="it does not name the wrapped key that an interrupted re-wrap was putting in",
            todo="remove it and re-wrap again",
        ) from None
    return _in_bounds(int.from_bytes(version, "big"), wrapped, marker)
