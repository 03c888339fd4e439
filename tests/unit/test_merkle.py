# SPDX-License-Identifier: Apache-2.0
"""The Merkle tree is RFC 6962's: known roots, a brute-force oracle, and proofs that prove nothing else."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.merkle import (
    EMPTY_ROOT,
    Frontier,
    MerkleError,
    Nodes,
    consistency_proof,
    inclusion_proof,
    leaf_hash,
    node_hash,
    range_root,
    root_of,
    stored_position,
    verify_consistency,
    verify_inclusion,
)

# Test data of the Certificate Transparency reference implementation (merkletree tests): leaves, then roots by size.
CT_LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
CT_ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(bytes([i])) for i in range(70)]


def nodes_of(leaves: list[bytes]) -> Nodes:
    """Give perfect subtrees of these leaves from a store that was only ever appended to."""
    stored: list[bytes] = []
    frontier = Frontier()
    for leaf in leaves:
        frontier, completed = frontier.extended(leaf)
        stored.extend(completed)
    return lambda level, number: stored[stored_position(level, number)]


def oracle(leaves: list[bytes]) -> bytes:
    """MTH written straight from the RFC, splitting by search."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return node_hash(oracle(leaves[:k]), oracle(leaves[k:]))


@pytest.mark.parametrize("size", range(1, 9))
def test_roots_are_those_of_certificate_transparency(size: int) -> None:
    assert root_of([leaf_hash(bytes.fromhex(leaf)) for leaf in CT_LEAVES[:size]]).hex() == CT_ROOTS[size - 1]


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert Frontier().root() == EMPTY_ROOT == oracle([])


@given(st.integers(0, 70))
def test_the_frontier_gives_the_oracles_root_at_every_size(size: int) -> None:
    frontier = Frontier()
    for leaf in LEAVES[:size]:
        frontier = frontier.appended(leaf)
    assert frontier.root() == oracle(LEAVES[:size])
    assert Frontier.from_bytes(size, frontier.to_bytes()) == frontier


@given(st.integers(0, 2**20), st.binary(max_size=320))
def test_a_frontier_that_does_not_fit_its_size_is_refused(size: int, data: bytes) -> None:
    if len(data) == 32 * size.bit_count():
        return
    with pytest.raises(MerkleError):
        Frontier.from_bytes(size, data)


@given(st.data())
def test_an_inclusion_proof_proves_its_leaf_and_no_other(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 70))
    index = data.draw(st.integers(0, size - 1))
    leaves, root = LEAVES[:size], oracle(LEAVES[:size])
    proof = inclusion_proof(nodes_of(LEAVES), index=index, size=size)
    verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=root)
    other = data.draw(st.integers(0, size - 1).filter(lambda i: i != index)) if size > 1 else None
    if other is not None:
        with pytest.raises(MerkleError):
            verify_inclusion(leaf=leaves[other], index=index, size=size, proof=proof, root=root)
        with pytest.raises(MerkleError):
            verify_inclusion(leaf=leaves[index], index=other, size=size, proof=proof, root=root)
        with pytest.raises(MerkleError):
            verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof[:-1], root=root)
    with pytest.raises(MerkleError):
        verify_inclusion(leaf=leaves[index], index=index, size=size, proof=(*proof, root), root=root)
    with pytest.raises(MerkleError):
        verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=bytes(32))


@given(st.integers(0, 70), st.integers(0, 70))
def test_a_consistency_proof_proves_every_prefix(a: int, b: int) -> None:
    old, new = min(a, b), max(a, b)
    verify_consistency(
        old_size=old,
        old_root=oracle(LEAVES[:old]),
        new_size=new,
        new_root=oracle(LEAVES[:new]),
        proof=consistency_proof(nodes_of(LEAVES), old_size=old, new_size=new),
    )


@given(st.integers(1, 69), st.integers(2, 70), st.integers(0, 69))
def test_a_log_rewritten_behind_an_old_root_has_no_proof(old: int, new: int, changed: int) -> None:
    if old >= new or changed >= old:
        return
    rewritten = [*LEAVES[:changed], leaf_hash(b"rewritten"), *LEAVES[changed + 1 : new]]
    with pytest.raises(MerkleError):
        verify_consistency(
            old_size=old,
            old_root=oracle(LEAVES[:old]),
            new_size=new,
            new_root=oracle(rewritten),
            proof=consistency_proof(nodes_of(rewritten), old_size=old, new_size=new),
        )


@given(st.integers(0, 40), st.integers(0, 40), st.lists(st.binary(min_size=31, max_size=33), max_size=8))
def test_invented_proofs_end_in_one_error_or_prove_an_equal_root(old: int, new: int, proof: list[bytes]) -> None:
    try:
        verify_consistency(old_size=old, old_root=oracle(LEAVES[:old]), new_size=new, new_root=bytes(32), proof=proof)
    except MerkleError:
        return
    assert old == 0  # anything continues the empty log
    assert proof == []


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(MerkleError):
        inclusion_proof(nodes_of(LEAVES), index=3, size=3)
    with pytest.raises(MerkleError):
        consistency_proof(nodes_of(LEAVES), old_size=4, new_size=3)
    with pytest.raises(MerkleError):
        verify_consistency(old_size=4, old_root=bytes(32), new_size=3, new_root=bytes(32), proof=())
    with pytest.raises(MerkleError):
        verify_inclusion(leaf=LEAVES[0], index=0, size=1, proof=[bytes(32)] * 70, root=LEAVES[0])


@given(st.integers(0, 6), st.integers(0, 70))
def test_every_perfect_subtree_stands_where_it_is_looked_for(level: int, number: int) -> None:
    begin, end = number << level, (number + 1) << level
    if end <= 70:
        assert nodes_of(LEAVES)(level, number) == oracle(LEAVES[begin:end])


def test_stored_positions_are_the_sequence_in_which_subtrees_come_about() -> None:
    came = []
    for leaf in range(64):
        level = 0
        while (leaf + 1) % (1 << level) == 0:
            came.append(stored_position(level, leaf >> level))
            level += 1
    assert came == list(range(len(came)))


@given(st.integers(0, 70))
def test_the_root_at_any_size_comes_from_subtrees(size: int) -> None:
    assert range_root(nodes_of(LEAVES), 0, size) == oracle(LEAVES[:size])


@given(st.integers(1, 2**40), st.data())
def test_a_proof_asks_for_few_nodes_of_a_large_tree(size: int, data: st.DataObject) -> None:
    asked = []

    def nodes(level: int, number: int) -> bytes:
        asked.append((level, number))
        assert (number + 1) << level <= size  # only what is complete is stored
        return bytes(32)

    inclusion_proof(nodes, index=data.draw(st.integers(0, size - 1)), size=size)
    assert len(asked) <= 2 * size.bit_length()
    asked.clear()
    consistency_proof(nodes, old_size=data.draw(st.integers(0, size)), new_size=size)
    assert len(asked) <= 2 * size.bit_length()
