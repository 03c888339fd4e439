# SPDX-License-Identifier: Apache-2.0
"""`patch_encryption()`: torch.save and torch.load that seal, for scripts that were written for BigDL Nano.

    patch_encryption()
    torch.save(model.state_dict(), "model.pt", encryption_key=key)      # sealed under a key of your own
    torch.load("model.pt", decryption_key=key)                          # reads old Fernet files, too
    torch.save(model.state_dict(), "model.pt")                          # in a job: sealed, the key is found by itself

Everything else of both functions is torch's own and passes through, `weights_only=True` by default included: what a
seal proves is who wrote a pickle, not what it does. `from torch import load` before the patch keeps the old function.

`guard_plaintext()` makes a `torch.save` of plaintext to a file an error; every rank runs under it.
"""

from __future__ import annotations

import base64
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Final

from cloister.data import keyring
from cloister.data.legacy import is_legacy, open_legacy
from cloister.data.objects import associated, open_sealed
from cloister.errors import CloisterError, Code
from cloister.sealed.datakey import DataKey
from cloister.sealed.format import MAGIC, MODEL_SEGMENT_SIZE
from cloister.sealed.stream import SealedReader, SealedWriter
from cloister.secret import SecretBytes

_RAW_URI: Final = "cloister-key://local/encryption-key"  # stands in headers of files under a key of the caller's own
_RAW_WRAPPED: Final = b"not wrapped: the caller holds the key"
_KEY_SIZE: Final = 32

# torch's own functions while they are replaced.
_originals: dict[str, Callable[..., Any]] = {}
_guarded: list[bool] = []

Key = str | bytes | SecretBytes | DataKey


def patch_encryption() -> None:
    """Replace torch.save and torch.load in this process; a second call changes nothing."""
    import torch

    if "save" not in _originals:
        _originals["save"], torch.save = torch.save, _save
    if "load" not in _originals:
        _originals["load"], torch.load = torch.load, _load


def unpatch_encryption() -> None:
    """Put torch's own functions back; under a guard, saving plaintext stays an error."""
    import torch

    if "load" in _originals:
        torch.load = _originals.pop("load")
    if "save" in _originals and not _guarded:
        torch.save = _originals.pop("save")


def guard_plaintext() -> None:
    """Make torch.save to a file an error from now on, unless it seals: what a rank does before its script runs.

    Torch takes seconds to import, so where nobody has done so yet the guard waits until somebody does.
    """
    _guarded.append(True)
    if "torch" in sys.modules:
        _replace_save()
    else:
        sys.meta_path.insert(0, _AfterTorch())


def _replace_save() -> None:
    import torch

    if "save" not in _originals:
        _originals["save"], torch.save = torch.save, _save


class _AfterTorch(importlib.abc.MetaPathFinder):
    """Finds torch like everybody else, once, and puts the guard in when it has been imported."""

    def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _replace_save()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@contextmanager
def guarded() -> Iterator[None]:
    """Guard inside of the block."""
    import torch

    guard_plaintext()
    try:
        yield
    finally:
        _guarded.pop()
        if not _guarded and "load" not in _originals:
            torch.save = _originals.pop("save")


class EncryptedDataset:
    """A data set that was saved as one object, such as a list of examples: all of it in memory, by index.

    Reads what `torch.save` sealed and the Fernet files of BigDL Nano. `SealedDataset` reads row by row and is what new
    data should use.
    """

    def __init__(self, path: str | os.PathLike[str], key: Key | None = None, *, weights_only: bool = True) -> None:
        """`weights_only=False` runs whatever code the pickle holds: only for files that you wrote yourself."""
        loaded = load_encrypted(path, key, weights_only=weights_only)
        self.data = list(loaded.values()) if isinstance(loaded, dict) else list(loaded)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


def save_encrypted(obj: Any, f: str | os.PathLike[str] | IO[bytes], key: Key | None = None, **options: Any) -> None:
    """Seal what torch.save writes: under a key of the caller's own, or under the one that the job has.

    A path appears whole or not at all. Raises CloisterError, and what torch.save raises.
    """
    data_key = _data_key(key) if key is not None else keyring.current().new()
    name = Path(f).name if isinstance(f, str | os.PathLike) else "object"
    target: Path | IO[bytes] = Path(f) if isinstance(f, str | os.PathLike) else f
    about = associated("objects", name)
    with SealedWriter(target, data_key=data_key, associated=about, segment_size=MODEL_SEGMENT_SIZE) as file:  # type: ignore[arg-type]
        _own("save")(obj, file, **options)


def load_encrypted(f: str | os.PathLike[str] | IO[bytes], key: Key | None = None, **options: Any) -> Any:
    """Load what was sealed, or what BigDL Nano encrypted with this key.

    Raises CloisterError: NOT_SEALED for plaintext, SEALED_FILE_INVALID or DATA_INVALID for another key or a changed
    file.
    """
    if options.get("mmap"):
        raise CloisterError(
            Code.ARGUMENT_INVALID,
            what="a sealed file cannot be mapped",
            why="mmap would hand out bytes that nobody has authenticated",
            todo="leave mmap out: a sealed file is read record by record, without a copy of the whole",
        )
    path = Path(f) if isinstance(f, str | os.PathLike) else None
    beginning = _beginning(f)
    load = _own("load")
    if beginning == MAGIC:
        with _reader(f, key) as file:
            return load(file, **options)
    if is_legacy(beginning):
        if key is None:
            raise CloisterError(
                Code.ARGUMENT_INVALID,
                what=f"{path or 'this file'} needs the key it was encrypted with",
                why="it is a Fernet file of BigDL Nano",
                todo="give decryption_key=, or bring it over with: cloister import bigdl",
            )
        token = path.read_bytes() if path else f.read()  # type: ignore[union-attr]
        plain = open_legacy(token, _fernet_key(key), name=str(path or "the file"))
        return load(io.BytesIO(plain), **options)
    raise CloisterError(
        Code.NOT_SEALED,
        what=f"{path or 'this file'} is not encrypted",
        why="it begins neither like a sealed file nor like a Fernet token",
        todo="leave decryption_key out if plaintext is what you expect",
    )


def _save(obj: Any, f: Any, *args: Any, encryption_key: Key | None = None, **options: Any) -> None:
    patched = "load" in _originals
    if encryption_key is not None or (patched and keyring.is_active() and _leaves_memory(f)):
        if args:
            names = ("pickle_module", "pickle_protocol", "_use_new_zipfile_serialization")
            options |= dict(zip(names, args, strict=False))
        save_encrypted(obj, f, encryption_key, **options)
        return
    if _guarded and _leaves_memory(f):
        raise CloisterError(
            Code.PLAINTEXT_REFUSED,
            what="torch.save would write plaintext to a file",
            why="what leaves a trust domain unsealed is no secret any more",
            todo="use cloister.data.save(obj, path), or call cloister.data.patch_encryption() first",
        )
    _own("save")(obj, f, *args, **options)


def _load(f: Any, *args: Any, decryption_key: Key | None = None, **options: Any) -> Any:
    if decryption_key is not None or _beginning(f) == MAGIC:
        if args:
            options |= dict(zip(("map_location", "pickle_module"), args, strict=False))
        return load_encrypted(f, decryption_key, **options)
    return _own("load")(f, *args, **options)


def _own(name: str) -> Callable[..., Any]:
    """Return torch's own function."""
    import torch

    return _originals.get(name) or getattr(torch, name)


def _leaves_memory(f: Any) -> bool:
    """Say whether saving there writes plaintext out of this process: memory and sealed files do not."""
    return not isinstance(f, io.BytesIO | SealedWriter)


def _beginning(f: Any) -> bytes:
    """Return the first bytes of a file and leave its position; empty when it cannot be looked at."""
    if isinstance(f, str | os.PathLike):
        try:
            with Path(f).open("rb") as file:
                return file.read(len(MAGIC))
        except OSError:
            return b""  # torch's own error says it best
    if isinstance(f, SealedReader) or not (hasattr(f, "seek") and hasattr(f, "tell")):
        return b""
    at = f.tell()
    beginning = f.read(len(MAGIC))
    f.seek(at)
    return bytes(beginning)


def _reader(f: Any, key: Key | None) -> SealedReader:
    if key is None:
        return open_sealed(Path(f)) if isinstance(f, str | os.PathLike) else open_sealed(f)
    return SealedReader(Path(f) if isinstance(f, str | os.PathLike) else f, data_key=_data_key(key))


def _data_key(key: Key) -> DataKey:
    if isinstance(key, DataKey):
        return key
    raw = base64.urlsafe_b64decode(_fernet_key(key).reveal())
    return DataKey(SecretBytes(raw), _RAW_WRAPPED, _RAW_URI, 1)


def _fernet_key(key: Key) -> SecretBytes:
    """Return a key as base64url of 32 bytes; raise CloisterError(ARGUMENT_INVALID) that does not repeat it."""
    if isinstance(key, DataKey):
        return SecretBytes(base64.urlsafe_b64encode(key.secret.reveal()))
    data = key.reveal() if isinstance(key, SecretBytes) else key.encode() if isinstance(key, str) else key
    if len(data) == _KEY_SIZE:
        return SecretBytes(base64.urlsafe_b64encode(data))
    try:
        text = data.strip().replace(b"+", b"-").replace(b"/", b"_")
        if len(base64.urlsafe_b64decode(text)) == _KEY_SIZE:
            return SecretBytes(text)
    except ValueError:
        pass
    raise CloisterError(
        Code.ARGUMENT_INVALID,
        what="this is no key to encrypt with",
        why=f"a key is {_KEY_SIZE} bytes, raw or in base64",
        todo="make one with cryptography.fernet.Fernet.generate_key(), or leave it out in a job",
    ) from None
