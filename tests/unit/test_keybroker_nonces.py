# SPDX-License-Identifier: Apache-2.0
"""A nonce of BeginRelease works once, for a minute, for the one caller, key and purpose it was given for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from cloister.identity import SpiffeId
from cloister.release.keys import Purpose
from cloister_keybroker.nonces import LIFE, MAX_PER_CALLER, MAX_TOTAL, NonceBook
from fakes.keybroker_harness import KEY, OTHER_KEY, RANK, TENANT, TRUST_DOMAIN

NOW = datetime(2026, 11, 1, tzinfo=UTC)
OTHER = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job="j-1", rank=0)


def test_a_nonce_works_once() -> None:
    book = NonceBook()
    nonce = book.give(RANK, (KEY, Purpose.TRAIN), NOW)
    assert len(nonce) == 32
    assert book.take(nonce, RANK, (KEY, Purpose.TRAIN), NOW) == ""
    assert "used before" in book.take(nonce, RANK, (KEY, Purpose.TRAIN), NOW)


def test_an_invented_nonce_does_not_work() -> None:
    assert NonceBook().take(bytes(32), RANK, (KEY, Purpose.TRAIN), NOW)


def test_a_nonce_lives_for_a_minute() -> None:
    book = NonceBook()
    first, second = (book.give(RANK, (KEY, Purpose.TRAIN), NOW) for _ in range(2))
    assert book.take(first, RANK, (KEY, Purpose.TRAIN), NOW + LIFE - timedelta(milliseconds=1)) == ""
    assert "expired" in book.take(second, RANK, (KEY, Purpose.TRAIN), NOW + LIFE)


def test_a_nonce_is_for_its_key_and_purpose_and_is_used_up_by_a_wrong_try() -> None:
    book = NonceBook()
    for key, purpose in ((OTHER_KEY, Purpose.TRAIN), (KEY, Purpose.EVALUATE)):
        nonce = book.give(RANK, (KEY, Purpose.TRAIN), NOW)
        assert "another key or purpose" in book.take(nonce, RANK, (key, purpose), NOW)
        assert "used before" in book.take(nonce, RANK, (KEY, Purpose.TRAIN), NOW)


def test_a_nonce_of_someone_else_does_not_work_and_stays_theirs() -> None:
    book = NonceBook()
    nonce = book.give(RANK, (KEY, Purpose.TRAIN), NOW)
    assert "not given to this caller" in book.take(nonce, OTHER, (KEY, Purpose.TRAIN), NOW)
    assert book.take(nonce, RANK, (KEY, Purpose.TRAIN), NOW) == ""


def test_one_caller_cannot_push_out_anothers_nonces() -> None:
    book = NonceBook()
    mine = book.give(RANK, (KEY, Purpose.TRAIN), NOW)
    flood = [book.give(OTHER, (KEY, Purpose.TRAIN), NOW) for _ in range(10 * MAX_PER_CALLER)]
    assert len(book) == 1 + MAX_PER_CALLER
    assert book.take(mine, RANK, (KEY, Purpose.TRAIN), NOW) == ""
    assert book.take(flood[0], OTHER, (KEY, Purpose.TRAIN), NOW)
    assert book.take(flood[-1], OTHER, (KEY, Purpose.TRAIN), NOW) == ""


def test_the_book_is_bounded_and_forgets_what_has_expired() -> None:
    book = NonceBook()
    for job in range(MAX_TOTAL // MAX_PER_CALLER + 2):
        caller = SpiffeId.of_rank(TRUST_DOMAIN, tenant=TENANT, job=f"j-{job}", rank=0)
        for _ in range(MAX_PER_CALLER):
            book.give(caller, (KEY, Purpose.TRAIN), NOW)
    assert len(book) == MAX_TOTAL
    book.give(RANK, (KEY, Purpose.TRAIN), NOW + LIFE)
    assert len(book) == 1
