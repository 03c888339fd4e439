# SPDX-License-Identifier: Apache-2.0
"""The generated sample: the same bytes for ever, balanced, without repeats, and not solvable by single words."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from pathlib import Path

import pytest

from cloister.data.sample import generate_sample, sample_rows
from cloister.data.text import check_labelled_text
from cloister.errors import CloisterError

DIGESTS = {
    "train.tsv": "6f732f8cbe48d50563c15eb8ee68683e01d3c3465c4cf4d14569716cca503278",
    "dev.tsv": "df040504f6b9d2d39b608d1ff6004812e8ca92cbb4abda489268657e15162ff1",
    "test.tsv": "a6b2a50c887521c2f4a76a834752e3a4229ab3b5fdc28424e4359fd9c9a384e1",
}


def test_the_files_are_the_same_bytes_everywhere(tmp_path: Path) -> None:
    assert generate_sample(tmp_path) == {"train.tsv": 3000, "dev.tsv": 300, "test.tsv": 300}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in tmp_path.iterdir()}
    assert found == DIGESTS


def test_the_files_are_labelled_text(tmp_path: Path) -> None:
    counts = generate_sample(tmp_path)
    assert {name: check_labelled_text(tmp_path / name) for name in counts} == counts


def test_sentences_are_distinct_short_and_balanced_in_each_part() -> None:
    rows = sample_rows()
    assert len({text for _, text in rows}) == len(rows) == 3600
    assert max(len(text) for _, text in rows) <= 35
    assert 200 < len({character for _, text in rows for character in text}) < 400
    for part in (rows[:3000], rows[3000:3300], rows[3300:]):
        assert sum(label for label, _ in part) * 2 == len(part)


def test_labels_do_not_follow_from_the_order_of_rows() -> None:
    labels = [label for label, _ in sample_rows()]
    assert 700 < sum(labels[::2]) < 1100


def test_single_characters_do_not_give_the_label_away() -> None:
    """Naive Bayes on characters stays far from what a model that learns order reaches (98 to 100 %)."""
    rows = sample_rows()
    counts = {0: Counter[str](), 1: Counter[str]()}
    for label, text in rows[:3000]:
        counts[label].update(set(text))
    right = 0
    for label, text in rows[3000:]:
        score = sum(math.log((counts[1][c] + 0.5) / (counts[0][c] + 0.5)) for c in set(text))
        right += (score > 0) == (label == 1)
    assert 0.5 < right / 600 < 0.8


def test_another_seed_gives_other_sentences() -> None:
    rows = sample_rows(rows=240)
    assert len(set(rows) & set(sample_rows(seed="another", rows=240))) < 60


@pytest.mark.parametrize("rows", [0, -24, 100, 24_000])
def test_sizes_that_cannot_be_balanced_are_refused(rows: int) -> None:
    with pytest.raises(CloisterError, match="CLO-1002"):
        sample_rows(rows=rows)
