# SPDX-License-Identifier: Apache-2.0
"""Which version of a sealed data set is the newest, as its owner published it. Pure.

The publications of a key are a hash chain whose head stands in the key's record, and with it in the decision log: one
that is removed, changed or put back is noticed before it is used. `docs/sealed-format.md` says what a manifest is.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from cloister.tlv import sha384, tlv

# Read and hashed at the first use after a change: 10,000 take some 30 ms and 4 MB.
MAX_PUBLICATIONS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of one data set."""

    dataset_id: str
    version: int  # from 1
    manifest_digest: bytes  # SHA-384 of the manifest, 48 bytes
    wrapped_digest: bytes  # SHA-384 of the wrapped data key of its files, 48 bytes

    def chained(self, head: bytes) -> bytes:
        """Return the head of the chain that ends with this publication (48 bytes)."""
        return sha384(
            tlv(
                "cloister-publication-v1",
                head,
                self.dataset_id,
                self.version,
                self.manifest_digest,
                self.wrapped_digest,
            )
        )


class Registry:
    """The publications of one key, by data set and by wrapped data key."""

    __slots__ = ("_dataset_of", "_newest", "head", "size")

    def __init__(self, publications: Iterable[Publication] = ()) -> None:
        self._newest: dict[str, Publication] = {}
        self._dataset_of: dict[bytes, str] = {}
        self.head = b""
        self.size = 0
        for publication in publications:
            self.head = publication.chained(self.head)
            self.size += 1
            # Publications of a data set come in the order of their versions.
            self._newest[publication.dataset_id] = publication
            self._dataset_of[publication.wrapped_digest] = publication.dataset_id

    def newest(self, dataset_id: str) -> Publication | None:
        """Return the newest version of a data set."""
        return self._newest.get(dataset_id)

    def demanded(self, wrapped_digest: bytes) -> Publication | None:
        """Return the newest version of the data set that this data key belongs to; None when none was published."""
        dataset_id = self._dataset_of.get(wrapped_digest)
        return None if dataset_id is None else self._newest[dataset_id]
