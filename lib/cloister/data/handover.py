# SPDX-License-Identifier: Apache-2.0
"""Hand a data key to a worker process that is being started, and to nothing else.

A forked worker has the key already. A spawned one gets its arguments pickled: secrets refuse that, rightly, because a
pickle may go anywhere. While multiprocessing starts a child, the key goes through an anonymous file in memory that
this child alone inherits, and that it clears.
"""

from __future__ import annotations

import os
import weakref
from multiprocessing import context
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any

from cloister.sealed.datakey import DATA_KEY_SIZE, DataKey
from cloister.secret import SecretBytes


def _reduce(key: DataKey) -> tuple[Any, tuple[Any, ...]]:
    child = context.get_spawning_popen()
    if child is None:
        raise TypeError("a data key goes to worker processes only, while they are being started")
    descriptor = os.memfd_create("cloister-key", os.MFD_CLOEXEC)
    weakref.finalize(child, os.close, descriptor)
    os.write(descriptor, key.secret.reveal())
    return _again, (DupFd(descriptor), key.wrapped, key.key_uri, key.key_version)


def _again(handed: Any, wrapped: bytes, key_uri: str, key_version: int) -> DataKey:
    descriptor = handed.detach()
    try:
        secret = os.pread(descriptor, DATA_KEY_SIZE, 0)
        os.pwrite(descriptor, bytes(DATA_KEY_SIZE), 0)
    finally:
        os.close(descriptor)
    return DataKey(SecretBytes(secret), wrapped, key_uri, key_version)


# Multiprocessing's own pickler only: everywhere else a data key still refuses to be pickled.
ForkingPickler.register(DataKey, _reduce)
