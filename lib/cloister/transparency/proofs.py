# SPDX-License-Identifier: Apache-2.0
"""What can be concluded about the log from checkpoints, entries and proofs; no network, no clock, no trust but a key.

Every function raises CloisterError: LOG_INVALID for what does not verify, LOG_CONTRADICTED for a log that is not the
one that was seen before. The log's key is the caller's: remembered from verified evidence, or given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from cloister.errors import CloisterError, Code
from cloister.merkle import MerkleError, leaf_hash, verify_consistency, verify_inclusion
from cloister.transparency.checkpoint import Checkpoint
from cloister.transparency.entry import EntryInvalid, LoggedEntry
from cloister.transparency.note import NoteInvalid, NoteKey
from cloister.transparency.start import Start


@dataclass(frozen=True, slots=True)
class ProvenEntry:
    """The bytes of an entry, its place, and its way up to the root of some checkpoint."""

    index: int
    data: bytes
    proof: tuple[bytes, ...]


def open_checkpoint(note: bytes, key: NoteKey) -> Checkpoint:
    """Return what the log's key signed."""
    try:
        return Checkpoint.open(note, key)
    except NoteInvalid as error:
        _invalid("the checkpoint", str(error))


def check_entry(found: ProvenEntry, checkpoint: Checkpoint) -> LoggedEntry:
    """Return an entry that stands in the log of this checkpoint."""
    try:
        verify_inclusion(
            leaf=leaf_hash(found.data),
            index=found.index,
            size=checkpoint.size,
            proof=found.proof,
            root=checkpoint.root,
        )
        logged = LoggedEntry.parse(found.data)
    except (MerkleError, EntryInvalid) as error:
        _invalid(f"entry {found.index}", str(error))
    if logged.index != found.index:
        _invalid(f"entry {found.index}", f"it says that it is entry {logged.index}")
    return logged


def check_start(found: ProvenEntry, checkpoint: Checkpoint, key: NoteKey) -> Start:
    """Return what a broker's life began with: it stands in the log, and its receipt key endorses this log's key."""
    logged = check_entry(found, checkpoint)
    try:
        start = Start.of(logged)
    except EntryInvalid as error:
        _invalid(f"entry {found.index}", str(error))
    if start.log != key:
        _invalid(f"entry {found.index}", f"it is about the log {start.log.name}")
    return start


def check_continues(old: Checkpoint, new: Checkpoint, proof: Sequence[bytes]) -> None:
    """Raise LOG_CONTRADICTED unless the proof shows that the newer log begins with all of the older one."""
    if new.size < old.size:
        _contradicted(f"it had {old.size} entries and has {new.size}", "rolled back")
    try:
        verify_consistency(old_size=old.size, old_root=old.root, new_size=new.size, new_root=new.root, proof=proof)
    except MerkleError as error:
        _contradicted(f"its first {old.size} entries are not those of the log that was seen ({error})", "rewritten")


def check_same_log(seen: NoteKey, found: NoteKey) -> None:
    """Raise LOG_CONTRADICTED when another log stands where one was seen before."""
    if seen != found:
        _contradicted(f"it is {found.name}, not {seen.name}", "replaced")


def _invalid(what: str, why: str) -> NoReturn:
    raise CloisterError(
        Code.LOG_INVALID,
        what=f"{what} does not verify",
        why=why,
        todo="compare it with another copy, and with what others hold of this log",
    )


def _contradicted(why: str, how: str) -> NoReturn:
    raise CloisterError(
        Code.LOG_CONTRADICTED,
        what="the broker's decision log is not the one that was seen before",
        why=f"{why}: it was {how}",
        todo="keep what you have of it; trust the broker again only after its operator explained this (a restored "
        "backup?), then: cloister audit forget",
    )
