# SPDX-License-Identifier: Apache-2.0
"""Training data, tensors and model archives on sealed files; torch and numpy are imported only where they are used."""

from __future__ import annotations

from cloister.data.objects import load, save
from cloister.data.patch import EncryptedDataset, guard_plaintext, patch_encryption, unpatch_encryption

__all__ = ["EncryptedDataset", "guard_plaintext", "load", "patch_encryption", "save", "unpatch_encryption"]
