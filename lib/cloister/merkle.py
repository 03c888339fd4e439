# SPDX-License-Identifier: Apache-2.0
"""Merkle trees over append-only logs: RFC 6962, section 2.1, with SHA-256.

A log keeps its `Frontier` (one digest per set bit of its size) to append and to know its root, and the hashes of its
perfect subtrees (less than two a leaf) to prove in O(log n). Everything here is a pure function of its arguments;
hashes are 32 bytes.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

HASH_SIZE: Final = 32
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()
_MAX_PROOF: Final = 64  # a tree of 2**64 leaves is 64 levels high


class MerkleError(Exception):
    """A proof that does not prove, or a frontier that is none."""


def leaf_hash(entry: bytes) -> bytes:
    """Return SHA-256(0x00 || entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Return SHA-256(0x01 || left || right): the prefix keeps a node from being passed off as a leaf."""
    return hashlib.sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Frontier:
    """The right edge of a tree: the roots of its perfect subtrees, largest first."""

    size: int = 0
    peaks: tuple[bytes, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.peaks) != self.size.bit_count():
            raise MerkleError(f"a frontier of {self.size} leaves cannot have {len(self.peaks)} peaks")
        if any(len(peak) != HASH_SIZE for peak in self.peaks):
            raise MerkleError("a peak is not 32 bytes")

    def appended(self, leaf: bytes) -> Frontier:
        """Return the frontier with one more leaf hash; O(log n)."""
        return self.extended(leaf)[0]

    def extended(self, leaf: bytes) -> tuple[Frontier, tuple[bytes, ...]]:
        """Return the frontier with one more leaf hash, and the perfect subtrees that it completes: itself first."""
        peaks, size, completed = list(self.peaks), self.size, [leaf]
        while size & 1:  # two perfect subtrees of equal height make one of the next
            completed.append(node_hash(peaks.pop(), completed[-1]))
            size >>= 1
        return Frontier(self.size + 1, (*peaks, completed[-1])), tuple(completed)

    def root(self) -> bytes:
        """Return the Merkle tree hash."""
        if not self.peaks:
            return EMPTY_ROOT
        *rest, node = self.peaks
        for peak in reversed(rest):
            node = node_hash(peak, node)
        return node

    def to_bytes(self) -> bytes:
        """Return the peaks in order, 32 bytes each; the size is kept beside them."""
        return b"".join(self.peaks)

    @classmethod
    def from_bytes(cls, size: int, data: bytes) -> Frontier:
        """Return what `to_bytes` encoded; raise MerkleError when it does not fit the size."""
        return cls(size, tuple(data[i : i + HASH_SIZE] for i in range(0, len(data), HASH_SIZE)))


def root_of(leaves: Iterable[bytes]) -> bytes:
    """Return the root over leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier = frontier.appended(leaf)
    return frontier.root()


# Returns the hash of the perfect subtree over the leaves [number << level, (number + 1) << level): level 0 is a leaf.
Nodes: TypeAlias = Callable[[int, int], bytes]


def stored_position(level: int, number: int) -> int:
    """Return the place of a perfect subtree's hash in the sequence of all of them, in the order they come about.

    A leaf is followed by every subtree that it completes, so that a store of them is only ever appended to.
    """
    last_leaf = ((number + 1) << level) - 1
    return 2 * last_leaf - last_leaf.bit_count() + level


def range_root(nodes: Nodes, begin: int, end: int) -> bytes:
    """Return the Merkle tree hash over leaves [begin, end) as part of a tree; O(log n) nodes are asked for.

    `begin` is a multiple of the smallest power of two that is no less than end - begin.
    """
    if begin == end:
        return EMPTY_ROOT
    peaks = []
    while begin < end:
        level = (end - begin).bit_length() - 1
        peaks.append(nodes(level, begin >> level))
        begin += 1 << level
    node = peaks.pop()
    while peaks:
        node = node_hash(peaks.pop(), node)
    return node


def inclusion_proof(nodes: Nodes, *, index: int, size: int) -> tuple[bytes, ...]:
    """Return PATH(index, D[size]), from the leaf's sibling up to the root's child (RFC 6962, 2.1.1)."""
    if not 0 <= index < size:
        raise MerkleError(f"there is no leaf {index} in a tree of {size}")
    path = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _split(end - begin)
        if index < middle:
            path.append(range_root(nodes, middle, end))
            end = middle
        else:
            path.append(range_root(nodes, begin, middle))
            begin = middle
    return tuple(reversed(path))


def consistency_proof(nodes: Nodes, *, old_size: int, new_size: int) -> tuple[bytes, ...]:
    """Return PROOF(old_size, D[new_size]): that the first old_size leaves are a prefix (RFC 6962, 2.1.2).

    A tree is consistent with itself and with the empty tree by an empty proof.
    """
    if not 0 <= old_size <= new_size:
        raise MerkleError(f"a tree of {new_size} never had {old_size} leaves")
    if old_size in (0, new_size):
        return ()
    path = []
    begin, end = 0, new_size
    while old_size < end:
        middle = begin + _split(end - begin)
        if old_size <= middle:
            path.append(range_root(nodes, middle, end))
            end = middle
        else:
            path.append(range_root(nodes, begin, middle))
            begin = middle
    if begin:  # otherwise this is the old tree itself, whose root the verifier has
        path.append(range_root(nodes, begin, end))
    return tuple(reversed(path))


def verify_inclusion(*, leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Raise MerkleError unless `leaf` (a hash) stands at `index` of the tree of this size and root."""
    if not 0 <= index < size:
        raise MerkleError(f"there is no leaf {index} in a tree of {size}")
    take = _taker(proof)
    node, first, last = leaf, index, size - 1
    while last:
        if first & 1:
            node = node_hash(take(), node)
        elif first < last:
            node = node_hash(node, take())
        # else: the node is the last of an odd level and rises unchanged
        first, last = first >> 1, last >> 1
    _finish(take, node, root, "the proof leads to another root")


def verify_consistency(
    *, old_size: int, old_root: bytes, new_size: int, new_root: bytes, proof: Sequence[bytes]
) -> None:
    """Raise MerkleError unless the log of new_size continues the log of old_size (RFC 9162, 2.1.4.2)."""
    if not 0 <= old_size <= new_size:
        raise MerkleError("a log never shrinks")
    take = _taker(proof)
    if old_size == 0:
        _finish(take, old_root, EMPTY_ROOT, "the old root is not the empty tree's")
        return
    if old_size == new_size:
        _finish(take, old_root, new_root, "two roots for one size")
        return
    first, last = old_size - 1, new_size - 1
    while first & 1:
        first, last = first >> 1, last >> 1
    # When the old tree is perfect its root is the first node; otherwise the proof starts with that node.
    old = new = take() if first else old_root
    while last:
        if first & 1:
            sibling = take()
            old, new = node_hash(sibling, old), node_hash(sibling, new)
        elif first < last:
            new = node_hash(new, take())
        first, last = first >> 1, last >> 1
    if not hmac.compare_digest(old, old_root):
        raise MerkleError("the proof leads to another old root")
    _finish(take, new, new_root, "the proof leads to another new root")


def _split(size: int) -> int:
    """Return the largest power of two below size (size >= 2)."""
    return 1 << ((size - 1).bit_length() - 1)


def _taker(proof: Sequence[bytes]) -> Callable[[], bytes]:
    """Return a function that gives the proof's nodes one by one and refuses to give more than there are."""
    if len(proof) > _MAX_PROOF + 1:
        raise MerkleError("the proof is longer than any tree is high")
    if any(len(node) != HASH_SIZE for node in proof):
        raise MerkleError("a node of the proof is not 32 bytes")
    nodes = iter(proof)

    def take() -> bytes:
        node = next(nodes, None)
        if node is None:
            raise MerkleError("the proof is too short")
        return node

    return take


def _finish(take: Callable[[], bytes], got: bytes, wanted: bytes, why: str) -> None:
    """Raise unless the proof is used up and the digest is the wanted one."""
    try:
        take()
    except MerkleError:
        if not hmac.compare_digest(got, wanted):
            raise MerkleError(why) from None
        return
    raise MerkleError("the proof is too long")
