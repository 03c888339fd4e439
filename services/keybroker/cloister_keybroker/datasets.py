# SPDX-License-Identifier: Apache-2.0
"""Which version of a sealed data set is the newest, as its owner published it. Pure.

The publications of a key are a hash chain whose head stands in the key's record, and with it in the decision log: one
that is removed, changed or put back is noticed before it is used. `docs/sealed-format.md` says what a manifest is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from cloister.errors import CloisterError, Code
from cloister.release.blocks import Block
from cloister.secret import SecretBytes
from cloister.tlv import sha384, tlv

# Read and hashed at the first use after a change: 10,000 take some 30 ms and 4 MB.
MAX_PUBLICATIONS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Publication:
    """One version of one data set."""

    dataset_id: str
    version: int  # from 1
    manifest_digest: bytes  # SHA-384 of the manifest, 48 bytes
    data_key_digest: bytes = b""  # of the data key of its files (data_key_digest), 48 bytes once it is known

    def chained(self, head: bytes) -> bytes:
        """Return the head of the chain that ends with this publication (48 bytes)."""
        return sha384(
            tlv(
                "cloister-publication-v1",
                head,
                self.dataset_id,
                self.version,
                self.manifest_digest,
                self.data_key_digest,
            )
        )


class Registry:
    """The publications of one key, by data set and by data key."""

    __slots__ = ("_dataset_of", "_manifests", "_newest", "head", "size")

    def __init__(self, publications: Iterable[Publication] = ()) -> None:
        self._newest: dict[str, Publication] = {}
        self._dataset_of: dict[bytes, str] = {}
        self._manifests: set[tuple[str, bytes]] = set()
        self.head = b""
        self.size = 0
        for publication in publications:
            self.head = publication.chained(self.head)
            self.size += 1
            # Publications of a data set come in the order of their versions.
            self._newest[publication.dataset_id] = publication
            self._dataset_of[publication.data_key_digest] = publication.dataset_id
            self._manifests.add((publication.dataset_id, publication.manifest_digest))

    def newest(self, dataset_id: str) -> Publication | None:
        """Return the newest version of a data set."""
        return self._newest.get(dataset_id)

    def was_published(self, publication: Publication) -> bool:
        """Say whether its manifest is or was that of a version of its data set."""
        return (publication.dataset_id, publication.manifest_digest) in self._manifests

    def holder(self, data_key_digest: bytes) -> str | None:
        """Return the data set that a data key belongs to."""
        return self._dataset_of.get(data_key_digest)

    def demanded(self, secret: SecretBytes) -> Publication | None:
        """Return the newest version of the data set that this data key belongs to; None when none was published."""
        dataset_id = self._dataset_of.get(data_key_digest(secret))
        return None if dataset_id is None else self._newest[dataset_id]


def data_key_digest(secret: SecretBytes) -> bytes:
    """Return the name of a data key (48 bytes): the same however it is wrapped, and 32 random bytes stay hidden."""
    return sha384(tlv("cloister-data-key-name-v1", secret.reveal()))


def checked_successor(registry: Registry, publication: Publication, parent_digest: bytes) -> bool:
    """Say whether the publication is news; False when it is the newest version already.

    Raises CloisterError(DATASET_VERSION) when it does not follow the newest version, or its data key is another data
    set's.
    """
    newest = registry.newest(publication.dataset_id)
    if newest is not None and publication == newest:
        return False
    if newest is not None and (publication.version <= newest.version or parent_digest != newest.manifest_digest):
        raise _refused(
            publication.dataset_id,
            f"version {publication.version} after {_digest(parent_digest)} does not follow version {newest.version},"
            f" {_digest(newest.manifest_digest)}",
            "seal the next version from the newest one",
        )
    if registry.was_published(publication):
        # Else data would go back to an older version by publishing its manifest under a newer number.
        raise _refused(
            publication.dataset_id,
            f"its manifest {_digest(publication.manifest_digest)} was published before",
            "seal a new version: also one with the data of an older version has a manifest of its own",
        )
    holder = registry.holder(publication.data_key_digest)
    if holder not in (None, publication.dataset_id):
        raise _refused(
            publication.dataset_id,
            f"its data key is that of {holder}",
            "seal every data set with a data key of its own",
        )
    if registry.size >= MAX_PUBLICATIONS:
        raise CloisterError(
            Code.KEY_QUOTA,
            what=f"no further version of {publication.dataset_id} is published under this key",
            why=f"it has {MAX_PUBLICATIONS} publications, as many as a key can have",
            todo="seal the next version with another key",
        )
    return True


def _digest(digest: bytes) -> str:
    return f"sha384:{digest.hex()}" if digest else "no version"


def _refused(dataset_id: str, why: str, todo: str) -> CloisterError:
    return CloisterError(
        Code.DATASET_VERSION, what=f"this version of {dataset_id} is not published", why=why, todo=todo
    )


def version_block(demanded: Publication | None, manifests: Collection[bytes]) -> Block | None:
    """Return the check that the newest version is among the manifests (digests); None where none was published."""
    if demanded is None:
        return None
    wanted = f"version {demanded.version} of {demanded.dataset_id}, {_digest(demanded.manifest_digest)}"
    got = ", ".join(_digest(manifest) for manifest in manifests) or "no manifest"
    return Block("dataset.version", demanded.manifest_digest in manifests, wanted, got[:400])
