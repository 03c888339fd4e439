# SPDX-License-Identifier: Apache-2.0
"""Files about the log prove what they say, offline, to who has the log's key; change anything and they do not."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister.protocol import ReceiptClaims
from cloister.tlv import sha384
from cloister.transparency.documents import GrowthDocument, ReceiptDocument, SignedReceipt, format_of
from cloister.transparency.logfile import Leaf, LogFile, write_log
from cloister.transparency.note import NoteKey
from cloister.transparency.seen import Seen
from fakes.keybroker_harness import TENANT
from fakes.log_case import BINDING, Case
from fakes.log_material import Log, an_entry


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def refused(check: Callable[[], object], code: Code = Code.LOG_INVALID) -> str:
    with pytest.raises(CloisterError) as caught:
        check()
    assert caught.value.code is code
    return f"{caught.value.what}: {caught.value.why}"


# Receipts.


def test_a_receipt_proves_its_decision_to_who_has_the_logs_key(case: Case) -> None:
    document = ReceiptDocument.parse(case.document().to_bytes())
    assert document == case.document()
    checked = document.check(case.key.note_key)
    assert checked.claims == ReceiptClaims.parse(case.message())
    assert checked.claims.binding == BINDING
    assert (checked.logged.index, checked.logged.time_ms) == (case.place.index, 5)
    assert checked.checkpoint.size == 11


def test_a_receipt_of_another_log_or_key_is_refused(case: Case) -> None:
    other = Case()
    assert "not signed by" in refused(lambda: case.document().check(other.key.note_key))
    assert "another log" in refused(
        lambda: case.document(receipt=case.receipt(case.message(log_id=other.key.log_id))).check(case.key.note_key)
    )
    assert "signature" in refused(
        lambda: case.document(receipt=case.receipt(by=other.receipt_key)).check(case.key.note_key)
    )
    refused(lambda: case.document(start=other.proven(3)).check(case.key.note_key))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: {"receipt": SignedReceipt(c.message(), bytes(64))}, "signature"),
        (lambda c: {"receipt": SignedReceipt(b"", c.receipt_key.sign(b""))}, "TLV"),
        (lambda c: {"receipt": c.receipt(c.message(index=4))}, "another entry"),
        (lambda c: {"receipt": c.receipt(c.message(root=bytes(32)))}, "its root is not the log's"),
        (lambda c: {"receipt": c.receipt(c.message(dataclasses.replace(BINDING, key_version=2)))}, "something else"),
        (lambda c: {"receipt": c.receipt(c.message(dataclasses.replace(BINDING, purpose="serve")))}, "something else"),
        (lambda c: {"receipt": c.receipt(c.message(dataclasses.replace(BINDING, key_uri="x")))}, "something else"),
        (
            lambda c: {"receipt": c.receipt(c.message(dataclasses.replace(BINDING, wrapped_digest=sha384(b"x"))))},
            "something else",
        ),
        (
            lambda c: {"receipt": c.receipt(c.message(dataclasses.replace(BINDING, evidence_digest=sha384(b"x"))))},
            "something else",
        ),
        (lambda c: {"decision": c.proven(6)}, "another entry"),
        (lambda c: {"decision": dataclasses.replace(c.proven(5), index=6)}, "entry 6"),
        (lambda c: {"decision": dataclasses.replace(c.proven(5), proof=())}, "too short"),
        (lambda c: {"decision": dataclasses.replace(c.proven(5), data=c.proven(6).data)}, "another root"),
        (lambda c: {"start": c.proven(2)}, "not the start"),
        (lambda c: {"start": c.proven(6)}, "not the start"),
        (lambda c: {"growth": ()}, "its root is not the log's"),
        (lambda c: {"checkpoint": c.before}, "entry"),
        (lambda c: {"checkpoint": c.after.replace(b"\n11\n", b"\n12\n")}, "does not verify"),
    ],
)
def test_a_receipt_with_anything_changed_is_refused(
    case: Case, change: Callable[[Case], dict[str, Any]], why: str
) -> None:
    assert why in refused(lambda: case.document(**change(case)).check(case.key.note_key))


def test_a_receipt_from_before_its_keys_life_is_refused() -> None:
    """A later life of the broker cannot sign for decisions of an earlier one."""
    case = Case()
    key, later = case.log.begin_life()
    tree = case.log.proofs.newest()
    document = case.document(
        receipt=case.receipt(by=later),
        start=case.proven(key.start_index),
        checkpoint=key.checkpoint(size=tree.size, root=tree.root),
    )
    assert "before its key's life" in refused(lambda: document.check(key.note_key))


def a_denial(case: Case) -> ReceiptDocument:
    index = case.log.log.append(an_entry(granted=False, key_version=3), time_ms=1).index
    tree = case.log.proofs.newest()
    return case.document(
        receipt=case.receipt(case.message(index=index, root=tree.root)),
        decision=case.proven(index),
        start=case.proven(case.key.start_index),
        growth=(),
        checkpoint=case.note(),
    )


def test_a_denial_is_no_ground_for_a_receipt() -> None:
    case = Case()
    assert "something else" in refused(lambda: a_denial(case).check(case.key.note_key))


# Growth.


def test_growth_is_proven_and_nothing_else_is(case: Case) -> None:
    document = GrowthDocument.parse(case.growth().to_bytes())
    old, new = document.check(case.key.note_key)
    assert (old.size, new.size) == (6, 11)
    backwards = dataclasses.replace(document, old=case.after, new=case.before)
    assert "rolled back" in refused(lambda: backwards.check(case.key.note_key), Code.LOG_CONTRADICTED)
    unproven = dataclasses.replace(document, proof=())
    assert "rewritten" in refused(lambda: unproven.check(case.key.note_key), Code.LOG_CONTRADICTED)
    refused(lambda: document.check(Case().key.note_key))
    forked = dataclasses.replace(document, old=case.key.checkpoint(size=11, root=bytes(32)), proof=())
    assert "rewritten" in refused(lambda: forked.check(case.key.note_key), Code.LOG_CONTRADICTED)


# Exported logs.


def lines_of(data: bytes) -> list[bytes]:
    return data.splitlines(keepends=True)


def check(data: bytes, case: Case) -> object:
    return LogFile(io.BytesIO(data)).check(case.key.note_key)


def test_an_exported_log_adds_up(case: Case) -> None:
    roots = {0: b"", 6: b"", 11: b""}
    file = LogFile(io.BytesIO(case.log_file()))
    checked = file.check(case.key.note_key, at=roots)
    assert (checked.checkpoint.size, len(checked.starts)) == (11, 1)
    assert checked.entries < 11
    assert roots[6] == case.place.root
    assert roots[11] == checked.checkpoint.root


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ("delete an entry", "where entry 4 should be"),
        ("delete an entry and number the others anew", "says that it is entry"),
        ("reorder two", "where entry 4 should be"),
        ("reorder two and number them anew", "says that it is entry"),
        ("edit an entry", "entry 5"),
        ("edit a hash", "do not add up"),
        ("hide an entry behind another hash", "do not add up"),
        ("cut the end", "it was cut"),
        ("cut the end, keep the checkpoint", "do not add up"),
        ("put an older checkpoint under it", "do not add up"),
        ("add an entry", "do not add up"),
        ("add something behind the checkpoint", "more behind"),
        ("write a line that is no line", "not strict JSON"),
        ("give a leaf a member more", "unknown member"),
        ("drop the header", "its first line"),
    ],
)
def test_a_log_that_somebody_was_at_does_not_verify(case: Case, attack: str, why: str) -> None:
    whole = lines_of(case.log_file())
    header, leaves, end = whole[0], whole[1:-1], whole[-1]

    def numbered(changed: list[bytes]) -> list[bytes]:
        return [json.dumps(json.loads(line) | {"index": n}).encode() + b"\n" for n, line in enumerate(changed)]

    swapped = [*leaves[:4], leaves[5], leaves[4], *leaves[6:]]
    hashed = max(n for n, line in enumerate(leaves) if b'"hash"' in line)
    edited = json.loads(leaves[5])
    edited["entry"] = edited["entry"].replace(edited["entry"][-8:], "AAAAAAAA")
    other = json.dumps({"index": hashed, "hash": "A" * 43 + "="}).encode() + b"\n"
    hidden = json.dumps({"index": 5, "hash": "A" * 43 + "="}).encode() + b"\n"
    older = json.dumps({"checkpoint": case.before.decode()}).encode() + b"\n"
    attacks = {
        "delete an entry": [header, *leaves[:4], *leaves[5:], end],
        "delete an entry and number the others anew": [header, *numbered([*leaves[:4], *leaves[5:]]), end],
        "reorder two": [header, *swapped, end],
        "reorder two and number them anew": [header, *numbered(swapped), end],
        "edit an entry": [header, *leaves[:5], json.dumps(edited).encode() + b"\n", *leaves[6:], end],
        "edit a hash": [header, *leaves[:hashed], other, *leaves[hashed + 1 :], end],
        "hide an entry behind another hash": [header, *leaves[:5], hidden, *leaves[6:], end],
        "cut the end": [header, *leaves[:7]],
        "cut the end, keep the checkpoint": [header, *leaves[:7], end],
        "put an older checkpoint under it": [header, *leaves, older],
        "add an entry": [header, *leaves, *numbered([*leaves, leaves[hashed]])[-1:], end],
        "add something behind the checkpoint": [header, *leaves, end, b"\n"],
        "write a line that is no line": [header, *leaves[:3], b"?\n", *leaves[4:], end],
        "give a leaf a member more": [header, leaves[0].replace(b"}", b',"x":1}'), *leaves[1:], end],
        "drop the header": [*leaves, end],
    }
    found = refused(lambda: check(b"".join(attacks[attack]), case))
    assert why in found


def test_a_log_in_which_a_broker_saw_another_log_does_not_verify() -> None:
    """A store was rolled back under a broker that had signed for more: its start does not fit where it stands."""
    case = Case()
    other = Log.begin(entries=3)
    data, _ = case.log.proofs.entry(case.key.start_index)
    file = io.BytesIO()
    leaves = [Leaf(leaf.index, leaf.entry, leaf.hash) for leaf in other.proofs.leaves(TENANT, 0, 3)]
    write_log(file.write, case.key.note_key, [*leaves, Leaf(3, data, b"")], case.after)
    assert "saw another log" in refused(lambda: check(file.getvalue(), case))


# Parsing.


@given(st.binary(max_size=200))
def test_any_bytes_end_in_one_error(data: bytes) -> None:
    for read in (ReceiptDocument.parse, GrowthDocument.parse, lambda data: LogFile(io.BytesIO(data))):
        refused(lambda: read(data))  # type: ignore[operator]  # noqa: B023
    assert format_of(data) == ""


@given(st.data())
def test_a_receipt_file_with_a_byte_changed_is_refused_or_proves_the_same(data: st.DataObject) -> None:
    case = CASE
    whole = bytearray(case.document().to_bytes())
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 6))
    with contextlib.suppress(CloisterError):
        found = ReceiptDocument.parse(bytes(whole)).check(case.key.note_key)
        assert found.claims.binding == BINDING


CASE = Case()


def test_documents_say_what_they_are(case: Case) -> None:
    assert format_of(case.document().to_bytes()) == "cloister-receipt/v1"
    assert format_of(case.growth().to_bytes()) == "cloister-growth/v1"
    assert format_of(lines_of(case.log_file())[0]) == "cloister-log/v1"
    refused(lambda: ReceiptDocument.parse(case.growth().to_bytes()))


# What was seen.


def test_what_was_seen_is_remembered(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    assert Seen.load(path) is None
    Seen(case.key.note_key, case.after).save(path)
    found = Seen.load(path)
    assert found == Seen(case.key.note_key, case.after)
    assert found.checkpoint.size == 11
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [lambda d: d[:-3], lambda d: d.replace(b"\\n11\\n", b"\\n10\\n"), lambda d: b"{}", lambda d: b"x" * 200_000],
)
def test_a_damaged_memory_is_an_error_and_not_a_fresh_start(
    case: Case, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "seen.json"
    Seen(case.key.note_key, case.after).save(path)
    path.write_bytes(change(path.read_bytes()))
    refused(lambda: Seen.load(path), Code.CONFIG_INVALID)


def test_a_key_in_a_file_is_a_hint_and_decides_nothing(case: Case) -> None:
    other = NoteKey.of("cloister.test/keybroker/other", Ed25519PrivateKey.generate())
    document = ReceiptDocument.parse(case.document(log=other).to_bytes())
    assert document.log == other
    document.check(case.key.note_key)
    refused(lambda: document.check(other))
