# SPDX-License-Identifier: Apache-2.0
"""Training data, tensors and model archives on sealed files; torch and numpy are imported only where they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from cloister.data.objects import load, save
from cloister.data.patch import EncryptedDataset, guard_plaintext, patch_encryption, unpatch_encryption

if TYPE_CHECKING:
    from cloister.data.checkpoints import Checkpoints
    from cloister.data.dataset import SealedDataset, SealedIterable

__all__ = [
    "Checkpoints",
    "EncryptedDataset",
    "SealedDataset",
    "SealedIterable",
    "guard_plaintext",
    "load",
    "patch_encryption",
    "save",
    "unpatch_encryption",
]

# What needs torch to be imported, and is imported when it is asked for.
_LATER: Final = {
    "Checkpoints": "cloister.data.checkpoints",
    "SealedDataset": "cloister.data.dataset",
    "SealedIterable": "cloister.data.dataset",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
