# SPDX-License-Identifier: Apache-2.0
"""`cloister://`: sealed directories as a file system for pandas, pyarrow, Hugging Face data sets and all of fsspec.

    cloister:///data/sealed/train.jsonl                          a file in the sealed directory /data/sealed
    cloister://train.jsonl::s3://bucket/sealed                   the same on any fsspec target
    cloister://bucket/sealed/train.jsonl   target_protocol="s3"  the same, the target as an option

Read-only. The directory is opened once, with all checks of `SealedDirectory`, and the key that the process's keyring
finds; files are decrypted as they are read. Plaintext is not written to disks: `get` takes tmpfs and memfd only.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, NoReturn, cast

import fsspec
from fsspec.callbacks import DEFAULT_CALLBACK
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import isfilelike

from cloister.data import keyring
from cloister.data.objects import open_directory
from cloister.data.scratch import check_plaintext_target, plaintext_file
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory
from cloister.sealed.manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, manifest_invalid
from cloister.sealed.storage import LocalStorage, Storage

_BUFFER: Final = 64 * 1024  # bytes of plaintext; a segment of data
_CHUNK: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class FsspecStorage:
    """A directory of ciphertext on an fsspec file system."""

    filesystem: Any  # fsspec is not typed
    root: str  # as the file system names it, without a slash at its end

    def __str__(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.root))

    def manifest(self) -> bytes:
        place = f"{self.root}/{MANIFEST_NAME}"
        if not self.filesystem.isfile(place):
            raise _not_sealed(str(self))
        # One byte more than allowed is enough to know, whatever size the storage claims.
        data = bytes(self.filesystem.cat_file(place, start=0, end=MAX_MANIFEST_SIZE + 1))
        if len(data) > MAX_MANIFEST_SIZE:
            raise manifest_invalid(place, f"it has more than {MAX_MANIFEST_SIZE} bytes")
        return data

    def names(self) -> Iterator[tuple[str, bool]]:
        self.filesystem.invalidate_cache(self.root)
        for place, info in self.filesystem.find(self.root, detail=True).items():
            name = place[len(self.root) :].lstrip("/")
            if name:  # some stores list the directory itself
                yield name, info["type"] == "file" and not info.get("islink", False)

    def file(self, name: str) -> BinaryIO:
        return cast(BinaryIO, self.filesystem.open(f"{self.root}/{name}", "rb"))


class _Tree:
    """An opened directory by its folders."""

    def __init__(self, ring: keyring.Keyring, directory: SealedDirectory) -> None:
        self.ring = ring  # that gave the key
        self.directory = directory
        self.entries = {entry.path: entry for entry in directory.manifest.files}
        self.folders: dict[str, set[str]] = {"": set()}  # names in each folder
        for path in self.entries:
            for one in _ancestors(path):
                folder, _, name = one.rpartition("/")
                self.folders.setdefault(folder, set()).add(name)


@dataclass(frozen=True, slots=True)
class _Place:
    """What a path names."""

    tree: _Tree
    prefix: str  # of the sealed directory in the path; empty where there is one directory for all paths
    inner: str  # path in the directory; empty for the directory itself

    def describe(self, inner: str) -> dict[str, Any] | None:
        """Return what fsspec wants to know of a file or folder, or None when there is no such."""
        name = f"{self.prefix}/{inner}".rstrip("/") if self.prefix else inner
        if inner in self.tree.folders:
            return {"name": name, "size": 0, "type": "directory"}
        entry = self.tree.entries.get(inner)
        if entry is None:
            return None
        # The etag stands for this content: another act of sealing has another one.
        return {"name": name, "size": entry.length, "type": "file", "etag": entry.file_id}


class SealedFile(io.BufferedReader):
    """A file of a sealed directory, opened for reading."""

    def __init__(self, raw: Any, path: str) -> None:
        super().__init__(raw, _BUFFER)
        self.path = path
        self.size = raw.size  # bytes of plaintext


class SealedFileSystem(fsspec.AbstractFileSystem):  # type: ignore[misc]  # fsspec is not typed
    """The file system of the protocol `cloister`.

    Opened directories are kept for as long as the keyring is the same; `invalidate_cache` forgets them.
    """

    protocol: ClassVar[str] = "cloister"
    root_marker: ClassVar[str] = ""

    def __init__(
        self,
        fo: str = "",
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        """`fo` is one sealed directory in which all paths are; without it a path names directory and file."""
        super().__init__(fo=fo, target_protocol=target_protocol, target_options=target_options, **options)
        if fo and "://" in fo and target_protocol is None:
            target_protocol = fo.partition("://")[0]
        self._target = fsspec.filesystem(target_protocol or "file", **(target_options or {}))
        self._root = self._target._strip_protocol(fo).rstrip("/") if fo else None
        self._trees: dict[str, _Tree] = {}

    # -- where things are

    def _locate(self, path: str) -> _Place:
        """Return where a path is; raise NOT_SEALED when it is in no sealed directory."""
        path = self._strip_protocol(path)
        if self._root is not None:
            return _Place(self._tree(self._root), "", path.strip("/"))
        # Local paths are absolute, with or without the third slash, which Hugging Face drops on the way.
        local = isinstance(self._target, LocalFileSystem)
        whole = self._target._strip_protocol("/" + path.lstrip("/") if local else path).rstrip("/")
        above = list(_ancestors(whole))
        roots = [root for root in above if root in self._trees]
        roots += [root for root in above if not roots and self._target.isfile(f"{root}/{MANIFEST_NAME}")]
        if not roots:
            raise _not_sealed(self._target.unstrip_protocol(whole))
        inner = whole[len(roots[0]) :].strip("/")
        return _Place(self._tree(roots[0]), path.rstrip("/").removesuffix(inner).rstrip("/"), inner)

    def _tree(self, root: str) -> _Tree:
        ring = keyring.current()
        known = self._trees.get(root)
        if known is None or known.ring is not ring:
            known = self._trees[root] = _Tree(ring, open_directory(_storage(self._target, root)))
        return known

    # -- what fsspec asks for

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        place = self._locate(path)
        found = place.describe(place.inner)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return found

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        place = self._locate(path)
        below = place.tree.folders.get(place.inner)
        if below is not None:
            listed = [place.describe(f"{place.inner}/{name}" if place.inner else name) for name in sorted(below)]
        else:
            listed = [self.info(path)]
        return [one if detail else one["name"] for one in listed if one]

    def exists(self, path: str, **_: Any) -> bool:
        # Not as fsspec does it: that a directory was changed, or that no key is there, must not look like absence.
        return self._type(path) != ""

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        return self._type(path) == "directory"

    def _type(self, path: str) -> str:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return ""
        except CloisterError as error:
            if error.code is Code.NOT_SEALED:
                return ""
            raise

    def _open(self, path: str, mode: str = "rb", **_: Any) -> SealedFile:
        if mode != "rb":
            self._read_only(path)
        place = self._locate(path)
        if place.inner not in place.tree.entries:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return SealedFile(place.tree.directory.open_file(place.inner), path)

    def get_file(self, rpath: str, lpath: Any, callback: Any = DEFAULT_CALLBACK, outfile: Any = None, **_: Any) -> None:
        """Copy to tmpfs, a memfd or a BytesIO; raise CloisterError(PLAINTEXT_REFUSED) for anything else."""
        target = lpath if isfilelike(lpath) else outfile
        if self.isdir(rpath):
            if target is None:
                Path(lpath).mkdir(parents=True, exist_ok=True)
            return
        with self._open(rpath) as source:
            callback.set_size(source.size)
            if target is None:
                with plaintext_file(lpath) as file:
                    _copy(source, file, callback)
            else:
                check_plaintext_target(target)
                _copy(source, target, callback)

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget opened directories: what storage holds now is opened and checked anew."""
        self._trees.clear()
        super().invalidate_cache(path)

    # -- what it refuses: a sealed directory never changes

    def _read_only(self, path: Any = "", *_: Any, **__: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    mkdir = makedirs = rmdir = rm = rm_file = _rm = mv = cp_file = touch = pipe_file = put_file = _read_only


def open_url(url: str, *, data_key: DataKey | None = None, **options: Any) -> SealedDirectory:
    """Open a sealed directory by its fsspec URL, such as s3://bucket/sealed: also for SealedDataset and its workers."""
    target, root = fsspec.core.url_to_fs(url, **options)
    return open_directory(_storage(target, root.rstrip("/")), data_key=data_key)


def _storage(target: Any, root: str) -> Storage:
    return LocalStorage(Path(root)) if isinstance(target, LocalFileSystem) else FsspecStorage(target, root)


def _ancestors(path: str) -> Iterator[str]:
    """Yield a path and what is above it, the innermost first; nothing for an empty one."""
    while path:
        yield path
        path = path.rpartition("/")[0]


def _copy(source: SealedFile, target: Any, callback: Any) -> None:
    while piece := source.read(_CHUNK):
        target.write(piece)
        callback.relative_update(len(piece))


def _not_sealed(name: str) -> CloisterError:
    return CloisterError(
        Code.NOT_SEALED,
        what=f"{name} is not a sealed directory, and in none",
        why=f"there is no {MANIFEST_NAME} in it or above it",
        todo="seal the data with `cloister seal`, and name the directory it wrote",
    )
