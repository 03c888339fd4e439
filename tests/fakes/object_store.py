# SPDX-License-Identifier: Apache-2.0
"""An object store behind fsspec: ranged reads of at most so many bytes, cached listings, entries for folders."""

from __future__ import annotations

from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile

OBJECTS: dict[str, bytes] = {}


class _Object(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.reads.append((start, end))
        return OBJECTS[self.path][start:end]


class ObjectStore(fsspec.AbstractFileSystem):
    """Buckets that live as long as the test; `bucket://name/key`."""

    protocol: ClassVar[str] = "bucket"
    reads: ClassVar[list[tuple[int, int]]] = []

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path).strip("/")
        found: dict[str, dict[str, Any]] = {}
        for key, data in OBJECTS.items():
            if key == path:
                found[key] = {"name": key, "size": len(data), "type": "file"}
            elif key.startswith(f"{path}/"):
                first = f"{path}/{key[len(path) + 1 :].split('/')[0]}"
                folder = first != key
                found[first] = {
                    "name": first,
                    "size": 0 if folder else len(data),
                    "type": "directory" if folder else "file",
                }
        if not found:
            raise FileNotFoundError(path)
        return list(found.values()) if detail else list(found)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> _Object:
        if path not in OBJECTS:
            raise FileNotFoundError(path)
        return _Object(self, path, mode, block_size=4096)


fsspec.register_implementation("bucket", ObjectStore, clobber=True)
