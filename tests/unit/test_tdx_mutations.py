# SPDX-License-Identifier: Apache-2.0
"""Claims about malformed input: whatever is done to a quote or a log, it ends in that format's one error.

`tests/fuzz/fuzz_tdx.py` looks for the same with coverage guidance, for as long as one likes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.tdx.collateral import Collateral
from cloister.tdx.crl import to_der
from cloister.tdx.eventlog import EventLog, EventLogRejected
from cloister.tdx.quote import Quote, QuoteRejected
from cloister.tdx.verifier import Verifier
from cloister.tdx.verify import TrustRoot, verify_quote
from cloister.tdx.workload import read_workload
from fakes.forged_collateral import World
from fakes.forged_quotes import LEAF, NOW, SGX, ForgedPlatform, sgx_extension

VECTORS = Path(__file__).parents[1] / "vectors" / "tdx"
QUOTE = (VECTORS / "quote.bin").read_bytes()
LOG = (VECTORS / "eventlog.json").read_bytes()
ROOT = TrustRoot.from_pem((VECTORS / "root.pem").read_bytes(), simulated=True)
VERIFIED_AT = datetime.fromisoformat(json.loads((VECTORS / "expected.json").read_text())["verification_time"])
PARTS = [field.name for field in dataclasses.fields(Collateral) if field.init]
INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\n", b"-", b"\x30\x80")


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes after one to four edits; mostly the size stays, so that deeper checks are reached."""
    changed = bytearray(data)
    edits = 3 if rng.randrange(3) else 6
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(changed) + 1)
        size = rng.choice((1, 2, 4, 8, 32, 64, 256))
        run = changed[at : at + size]
        match rng.randrange(edits):
            case 0 if run:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + size] = bytes(len(run))
            case 2:
                changed[at : at + size] = rng.randbytes(len(run))
            case 3:
                changed[at:at] = rng.choice(INTERESTING)
            case 4:
                changed[at : at + size] = b""
            case _:
                changed[at:at] = run
    return bytes(changed)


def test_ten_thousand_mutated_quotes_are_all_refused_and_nothing_else_happens() -> None:
    rng = random.Random(20_261_122)
    rows: Counter[str] = Counter()
    for _ in range(10_000):
        data = mutated(QUOTE, rng)
        if data.rstrip(b"\0") == QUOTE.rstrip(b"\0"):
            continue
        try:
            verify_quote(data, roots=[ROOT], now=VERIFIED_AT)
        except QuoteRejected as error:
            rows[error.check] += 1
        else:
            pytest.fail(f"a mutated quote verified: {data.hex()}")
    # The mutations reach every layer, not just the first length check.
    assert {"H2", "H8", "D3", "P1", "P2", "E1", "E3", "E4"} <= rows.keys()


def mutate_collateral(world: World, rng: random.Random) -> None:
    """Change one part of the collateral, or one signed document before it is signed."""
    name = rng.choice(PARTS)
    document = rng.choice(("tcb_info", "qe_identity"))
    if rng.randrange(3):
        honest = getattr(world.collateral(), name)
        world.parts = {name: mutated(honest, rng)}
    else:
        world.text = {document: lambda text: mutated(text, rng)}


def judge_mutations(count: int, seed: int) -> Counter[str]:
    """Verify mutated quotes and mutated collateral; return which rows refused them."""
    rng = random.Random(seed)
    rows: Counter[str] = Counter()
    worlds = [World(), World().of_enclave(), World().of_module(current=b"\5\1")]
    honest = [(world.quote(), world.collateral()) for world in worlds]
    verifier = Verifier([world.platform.trust_root for world in worlds])
    for number in range(count):
        which = rng.randrange(len(worlds))
        world, (quote, collateral) = worlds[which], honest[which]
        if number % 4:
            data = mutated(quote, rng)
            # The last newline of a chain may be a NUL instead.
            same = data.rstrip(b"\0\n") == quote.rstrip(b"\0\n")
        else:
            mutate_collateral(world, rng)
            data, collateral, same = quote, world.collateral(), True
            world.parts, world.text = {}, {}
        try:
            verifier.verify(data, collateral, now=world.now)
        except QuoteRejected as error:
            rows[error.check] += 1
        else:
            assert same, f"a mutated quote verified: {data.hex()}"
            rows["accepted"] += 1
    return rows


def test_ten_thousand_mutated_quotes_and_collateral_end_in_one_error() -> None:
    rows = judge_mutations(10_000, seed=20_261_122)
    # What the mutations reach: form, chain, lists, documents and signatures.
    assert {"H8", "D3", "P1", "P3", "R2", "R6", "T1", "T2", "T10", "Q1", "E1", "E3", "E4"} <= rows.keys()


def spelling(name: str, part: bytes) -> bytes:
    """Return a part without what may differ in how it is written: hex in either case, the end of a PEM chain."""
    if name.endswith("_crl"):
        return to_der(part, name)
    return part.lower() if name.endswith("_signature") else part.rstrip(b"\n\0")


def test_a_changed_part_of_the_collateral_is_refused_or_says_the_same() -> None:
    rng = random.Random(99)
    world = World()
    quote, honest = world.quote(), world.collateral()
    verifier = Verifier([world.platform.trust_root])
    for _ in range(4_000):
        name = rng.choice(PARTS)
        part = mutated(getattr(honest, name), rng)
        with contextlib.suppress(QuoteRejected):
            verifier.verify(quote, dataclasses.replace(honest, **{name: part}), now=world.now)
            assert spelling(name, part) == spelling(name, getattr(honest, name))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif("CLOISTER_SLOW" not in os.environ, reason="minutes; set CLOISTER_SLOW")
def test_a_hundred_thousand_mutations_end_in_one_error() -> None:
    rows = judge_mutations(100_000, seed=int(os.environ["CLOISTER_SLOW"] or "1"))
    print(dict(rows.most_common()))
    assert rows.total() == 100_000


def test_mutated_certificates_that_are_signed_again_end_in_one_error() -> None:
    """Mutate the SGX extension before it is signed: the only parser of ours behind a valid signature."""
    rng = random.Random(7)
    for _ in range(300):
        platform = ForgedPlatform(leaf=LEAF.changed(SGX, mutated(sgx_extension(), rng)))
        with contextlib.suppress(QuoteRejected):
            verify_quote(platform.quote(), roots=[platform.trust_root], now=NOW)


def test_three_thousand_mutated_logs_end_in_one_error() -> None:
    rng = random.Random(3)
    for _ in range(3_000):
        with contextlib.suppress(EventLogRejected):
            read_workload(EventLog.parse(mutated(LOG, rng)))


@given(st.binary(max_size=2000))
@settings(deadline=None)  # other processes share these cores
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(QuoteRejected):
        verify_quote(data, roots=[ROOT], now=VERIFIED_AT)
    with pytest.raises(QuoteRejected):
        verify_quote(QUOTE[:636] + data, roots=[ROOT], now=VERIFIED_AT)


@given(st.binary(max_size=2000), st.integers(0, len(QUOTE)), st.integers(0, len(QUOTE)))
@settings(deadline=None)  # other processes share these cores
def test_what_parses_is_written_as_it_was_read(splice: bytes, start: int, stop: int) -> None:
    data = QUOTE[:start] + splice + QUOTE[stop:]
    try:
        quote = Quote.parse(data)
    except QuoteRejected:
        return
    assert quote.to_bytes() == data


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(("imr", "event_type", "digest", "event", "event_payload"), JSON))))
@settings(deadline=None)  # other processes share these cores
def test_any_json_in_the_members_of_events_ends_in_one_error(events: list[object]) -> None:
    with contextlib.suppress(EventLogRejected):
        EventLog.parse(json.dumps(events).encode())


@given(st.binary(max_size=500))
@settings(deadline=None)  # other processes share these cores
def test_random_bytes_are_no_log(data: bytes) -> None:
    with contextlib.suppress(EventLogRejected):
        assert EventLog.parse(data).events == ()
