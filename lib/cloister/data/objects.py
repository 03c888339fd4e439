# SPDX-License-Identifier: Apache-2.0
"""`cloister.data.save` and `load`: state dicts and nested objects of tensors in one sealed file, without pickle.

Inside of the sealed stream is an ordinary safetensors file: tensors by their path in the object, and in its metadata a
JSON skeleton of all the rest, which other readers pass over. Files that `torch.save` wrote are read, too, but only
what `weights_only=True` allows.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Final

from cloister.data import keyring
from cloister.data.skeleton import put_together, take_apart
from cloister.data.tensors import read_tensors, write_tensors
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.directory import SealedDirectory
from cloister.sealed.directorywriter import argument
from cloister.sealed.format import MODEL_SEGMENT_SIZE, SUFFIX, AssociatedData, Header, check_path
from cloister.sealed.storage import Storage
from cloister.sealed.stream import SealedReader, SealedWriter

_SKELETON: Final = "cloister.skeleton"
_ZIP: Final = b"PK\x03\x04"  # what torch.save writes


def save(
    obj: Any, path: str | PathLike[str], *, key: str = "", data_key: DataKey | None = None, dataset: str = "objects"
) -> None:
    """Seal a state dict, or a nested object of tensors, into one file that appears whole or not at all.

    The key is that of the job's output, or `key` (cloister-key://...), or `data_key`. Raises CloisterError:
    ARGUMENT_INVALID for what needs code to come back, DISK_FULL, KEYRING_MISSING.
    """
    target = Path(path)
    found = data_key or keyring.current().new(key)
    about = associated(dataset, target.name)
    with SealedWriter(target, data_key=found, associated=about, segment_size=MODEL_SEGMENT_SIZE) as file:
        tensors, skeleton = take_apart(obj)
        write_tensors(file, tensors, metadata={_SKELETON: skeleton})


def associated(dataset: str, name: str) -> AssociatedData:
    """Return what a single sealed file is bound to: its name, without the .sealed that says what it is.

    Raises CloisterError(ARGUMENT_INVALID) for a name that cannot be bound.
    """
    bare = name.removesuffix(SUFFIX) or name
    argument(check_path, bare)
    return AssociatedData(dataset, bare)


def load(path: str | PathLike[str], *, data_key: DataKey | None = None, map_location: Any = None) -> Any:
    """Return what `save` sealed, or what `torch.save` wrote into a sealed file and `weights_only=True` allows.

    Tensors are decrypted into memory of their own. Raises CloisterError: SEALED_FILE_INVALID, DATA_INVALID.
    """
    with open_sealed(Path(path), data_key=data_key) as file:
        beginning = file.read(len(_ZIP))
        file.seek(0)
        if beginning == _ZIP:
            return load_torch(file, map_location=map_location)
        tensors, metadata = read_tensors(file, file.name)
    if map_location is not None:
        tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
    return put_together(metadata[_SKELETON], tensors) if _SKELETON in metadata else tensors


def open_sealed(source: Path | BinaryIO, *, data_key: DataKey | None = None) -> SealedReader:
    """Open a sealed file for reading, with the key that the process's keyring finds for its header."""
    if data_key is not None:
        return SealedReader(source, data_key=data_key)

    def find(header: Header) -> Any:
        ring = keyring.current()
        return ring.open(header.key_uri, key_version=header.key_version, wrapped=header.wrapped).secret

    return SealedReader(source, data_key=find)


def open_directory(
    path: Path | Storage, *, data_key: DataKey | None = None, manifest_digest: bytes | None = None
) -> SealedDirectory:
    """Open a sealed directory with the key that the process's keyring finds for it, or with the one given."""
    if data_key is None:
        peek = SealedDirectory.peek(path)
        data_key = keyring.current().open(
            peek.key_uri,
            key_version=peek.key_version,
            wrapped=peek.wrapped,
            manifest_digest=peek.manifest_digest,
        )
        # Once more by digest: what the key was asked for is what is opened.
        manifest_digest = manifest_digest or peek.manifest_digest
    return SealedDirectory.open(path, data_key=data_key, manifest_digest=manifest_digest)


def load_torch(file: SealedReader, *, map_location: Any = None) -> Any:
    """Unpickle what `weights_only=True` allows; raise CloisterError(DATA_INVALID) for anything else."""
    from pickle import UnpicklingError  # noqa: TID251 - the name of an error, nothing is unpickled with it

    import torch

    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    except (UnpicklingError, RuntimeError) as error:
        raise CloisterError(
            Code.DATA_INVALID,
            what=f"{file.name} does not load",
            why=f"it was written with torch.save and is damaged, or needs code to load: {str(error)[:300]}",
            todo="save state_dict()s with cloister.data.save",
        ) from None
