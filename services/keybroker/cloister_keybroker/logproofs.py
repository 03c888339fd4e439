# SPDX-License-Identifier: Apache-2.0
"""What proves the log to somebody else, from stored subtrees, in O(log n) of them.

Every proof is verified here before it leaves: stored subtrees are not authenticated one by one, the head is. A size
before the present one is only ever signed after its root was proven to be a prefix of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apsw

from cloister.errors import CloisterError, Code
from cloister.merkle import (
    MerkleError,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    range_root,
    stored_position,
    verify_consistency,
    verify_inclusion,
)
from cloister_keybroker.log import DecisionLog
from cloister_keybroker.logcheck import damaged


@dataclass(frozen=True, slots=True)
class Tree:
    """The log at one size."""

    size: int
    root: bytes  # 32 bytes


@dataclass(frozen=True, slots=True)
class Proven:
    """A proof, and the tree it leads to."""

    tree: Tree
    proof: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf as one tenant sees it: the entry when it is its own or nobody's, otherwise its hash."""

    index: int
    hash: bytes
    entry: bytes  # empty for another tenant's


class LogProofs:
    """Proofs about the log, while a transaction is open."""

    def __init__(self, connection: apsw.Connection, log: DecisionLog) -> None:
        self._connection = connection
        self._log = log

    def newest(self) -> Tree:
        """Return the log as it is now."""
        head = self._log.head()
        return Tree(head.size, head.root())

    def tree(self, size: int) -> Tree:
        """Return the log as it was at a size, 0 for now; raise ARGUMENT_INVALID for one it has not reached."""
        now = self.newest()
        if size in (0, now.size):
            return now
        if size > now.size:
            raise _too_long(size, now)
        return self._prefix(size, now).tree

    def inclusion(self, index: int, *, size: int = 0) -> tuple[bytes, Proven]:
        """Return the leaf hash of an entry and its proof; raise DECISION_NOT_FOUND when there is none."""
        tree = self.tree(size)
        if index >= tree.size:
            raise decision_not_found(index, tree.size)
        leaf = self._node(0, index)
        proof = inclusion_proof(self._node, index=index, size=tree.size)
        try:
            verify_inclusion(leaf=leaf, index=index, size=tree.size, proof=proof, root=tree.root)
        except MerkleError:
            raise damaged(f"entry {index} does not lead to its root") from None
        return leaf, Proven(tree, proof)

    def entry(self, index: int) -> tuple[bytes, Proven]:
        """Return an entry's bytes, proven; raise DECISION_NOT_FOUND when there is none."""
        leaf, proven = self.inclusion(index)
        row = self._connection.execute("SELECT entry FROM entries WHERE idx = ?", (index,)).fetchone()
        if row is None or leaf_hash(row[0]) != leaf:
            raise damaged(f"entry {index} is missing or was changed")
        return bytes(row[0]), proven

    def consistency(self, old_size: int, *, new_size: int = 0) -> Proven:
        """Return the proof that the log only grew; raise ARGUMENT_INVALID for sizes it did not have."""
        new = self.tree(new_size)
        if old_size > new.size:
            raise _too_long(old_size, new)
        return Proven(new, self._prefix(old_size, new).proof)

    def leaves(self, tenant: str, begin: int, end: int) -> Iterator[Leaf]:
        """Yield leaves [begin, end) as a tenant sees them. They are verified by who adds them up to the root."""
        entries = dict(
            self._connection.execute(
                "SELECT idx, entry FROM decisions JOIN entries USING (idx)"
                " WHERE idx >= ? AND idx < ? AND tenant IN (?, '')",
                (begin, end, tenant),
            )
        )
        nodes = dict(
            self._connection.execute(
                "SELECT position, hash FROM log_nodes WHERE position BETWEEN ? AND ?",
                (stored_position(0, begin), stored_position(0, end)),
            )
        )
        for index in range(begin, end):
            node = nodes.get(stored_position(0, index))
            if node is None:
                raise damaged(f"the hash of entry {index} is missing")
            yield Leaf(index, node, entries.get(index, b""))

    def _prefix(self, size: int, new: Tree) -> Proven:
        """Return the smaller tree of this size, and the proof that the new one continues it."""
        proof = consistency_proof(self._node, old_size=size, new_size=new.size)
        root = range_root(self._node, 0, size)
        try:
            verify_consistency(old_size=size, old_root=root, new_size=new.size, new_root=new.root, proof=proof)
        except MerkleError:
            raise damaged(f"its first {size} entries do not lead to its root") from None
        return Proven(Tree(size, root), proof)

    def _node(self, level: int, number: int) -> bytes:
        position = stored_position(level, number)
        row = self._connection.execute("SELECT hash FROM log_nodes WHERE position = ?", (position,)).fetchone()
        if row is None:
            raise damaged("the hash of a subtree is missing")
        return bytes(row[0])


def _too_long(size: int, now: Tree) -> CloisterError:
    return CloisterError(
        Code.ARGUMENT_INVALID,
        what=f"the log never had {size} entries",
        why=f"it has {now.size}",
        todo="if it had that many when you last looked, it was rolled back: keep the checkpoint that shows it",
    )


def decision_not_found(index: int, size: int) -> CloisterError:
    """Return the error for an entry that is not there, or another tenant's: the very same for both."""
    return CloisterError(
        Code.DECISION_NOT_FOUND,
        what=f"there is no decision {index} for you",
        why=f"the log has {size} entries, and you see those of your tenant",
        todo="list yours with: cloister audit tail",
    )
