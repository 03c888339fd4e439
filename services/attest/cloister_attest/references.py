# SPDX-License-Identifier: Apache-2.0
"""Reference sets from files: signed by those whom the configuration names, and never older than what was in force."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from cloister.appraisal.references import ReferenceSet, open_reference_set
from cloister.errors import CloisterError, Code
from cloister.guest.measure import read_measured
from cloister.runtime.marks import Mark, Marks
from cloister_attest.config import ReferenceEntry

_MARK = "reference-set/"


async def load_references(entries: Iterable[ReferenceEntry], marks: Marks) -> Sequence[ReferenceSet]:
    """Return the configured sets, and remember their versions; raise CloisterError that names the file."""
    found = [(entry, await asyncio.to_thread(_open, entry)) for entry in entries]
    known = await marks.of(_MARK + references.name for _, references in found)
    for entry, references in found:
        mark = known.get(_MARK + references.name)
        if mark is not None:
            _require_not_older(entry, references, mark)
    await marks.put({_MARK + one.name: Mark(one.version, one.digest.hex()) for _, one in found})
    return [references for _, references in found]


def _open(entry: ReferenceEntry) -> ReferenceSet:
    data = read_measured(entry.path).data
    try:
        return open_reference_set(data, name=entry.name, signers=entry.signers, threshold=entry.threshold)
    except CloisterError as error:
        raise CloisterError(error.code, what=f"{entry.path}: {error.what}", why=error.why, todo=error.todo) from None


def _require_not_older(entry: ReferenceEntry, references: ReferenceSet, mark: Mark) -> None:
    if references.version > mark.number or mark == Mark(references.version, references.digest.hex()):
        return
    same = references.version == mark.number
    raise CloisterError(
        Code.REFERENCES_REJECTED,
        what=f"{entry.path}: the reference set {references} {'has changed' if same else 'is older than one seen here'}",
        why=f"version {mark.number}, sha384:{mark.detail}, was in force; this is sha384:{references.digest.hex()}",
        todo="have changes signed under the next version; to go back, have the old values signed as a new version",
    )
