# SPDX-License-Identifier: Apache-2.0
"""The job as a script sees it, and the built-in script's own arithmetic."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

import cloister.train
from cloister.errors import CloisterError, Code
from cloister.train.job import Job, Progress
from cloister.train.scripts import text_classifier as script


class Heard:
    """Keeps what is reported."""

    cancelled = False

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def message(self, phase: str, text: str, elapsed_s: float) -> None:
        self.sent.append((phase, text, elapsed_s))

    def progress(self, progress: Progress) -> None:
        self.sent.append(progress)

    def metrics(self, values: Mapping[str, float], *, step: int, final: bool) -> None:
        self.sent.append((dict(values), step, final))

    def artifact(self, name: str, uri: str, manifest_digest: bytes) -> None:
        self.sent.append(name)


def job(rank: int = 0, world_size: int = 2, **fields: Any) -> Job:
    values: dict[str, Any] = {"seed": 1, "args": (), "inputs": {}, "reporter": Heard(), "join": lambda: None}
    return Job(rank=rank, world_size=world_size, **{**values, **fields})


def test_a_script_that_is_not_a_rank_is_told_how_to_become_one() -> None:
    with pytest.raises(CloisterError) as caught:
        cloister.train.context()
    assert "cloister train submit" in caught.value.todo


def test_an_input_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(CloisterError) as caught:
        job(inputs={"reviews": None}).input("review")
    assert "reviews" in caught.value.why


def test_the_sole_input_is_found_and_two_are_one_too_many() -> None:
    assert job(inputs={"reviews": None, "pert": None}).sole_input(besides="pert") == "reviews"
    for inputs in ({}, {"a": None, "b": None}):
        with pytest.raises(CloisterError):
            job(inputs=inputs).sole_input()


def test_only_rank_0_writes_and_logs() -> None:
    with pytest.raises(CloisterError, match="rank 1 cannot write"):
        _ = job(rank=1).output
    heard = Heard()
    job(rank=1, reporter=heard).log_metrics({"x": 1.0}, step=1)
    assert heard.sent == []


def test_the_time_to_go_comes_from_the_steps_of_this_run() -> None:
    times = iter([100.0, 104.0, 108.0])
    heard = Heard()
    resumed = job(reporter=heard, clock=lambda: next(times))
    for step in (50, 52, 54):
        resumed.progress(1, 2, step, 60, loss=0.5, samples_per_s=10.0)
    assert [progress.eta_s for progress in heard.sent] == [-1.0, 16.0, 12.0]


def test_batches_hold_every_row_once_and_like_lengths_together() -> None:
    lengths = [(i * 37) % 101 for i in range(1003)]
    made = script.batches(lengths, size=8, seed=5)
    assert sorted(row for batch in made for row in batch) == list(range(1003))
    assert sum(len(batch) != 8 for batch in made) == 1
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in made]
    assert sorted(spread)[len(spread) // 2] <= 3
    assert made == script.batches(lengths, size=8, seed=5)
    assert made != script.batches(lengths, size=8, seed=6)


def test_the_vocabulary_has_each_character_that_occurs_often_enough() -> None:
    found = script.vocabulary(["好好 É", "很e\u0301好"], min_count=2)
    assert "好" in found
    assert "很" not in found
    assert "\u0301" not in found
    assert len(set(found)) == len(found)
    assert found[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def test_the_learning_rate_warms_up_and_falls_to_almost_nothing() -> None:
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=0.0)
    rates = []
    for step in range(1, 101):
        script.set_rate(optimizer, script.Recipe(lr=1.0), step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert max(rates) == rates[9] == 1.0
    assert rates[-1] == pytest.approx(1 / 91)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_every_number_of_a_preset_can_be_given_on_its_own() -> None:
    recipe = script.recipe_of(script.arguments(["--preset", "chnsenticorp", "--epochs", "2", "--head-share", "0.5"]))
    assert (recipe.epochs, recipe.head_share, recipe.hidden) == (2, 0.5, 128)
    assert script.recipe_of(script.arguments([])) == script.PRESETS["sample"]


@pytest.mark.parametrize("argv", [["--epochs", "0"], ["--max-length", "2"], ["--precision", "fp8"], ["--batch", "-1"]])
def test_a_number_that_makes_no_sense_is_refused(argv: list[str]) -> None:
    with pytest.raises(CloisterError) as caught:
        script.recipe_of(script.arguments(argv))
    assert caught.value.code is Code.ARGUMENT_INVALID


def test_seeds_of_different_uses_differ() -> None:
    found = {script.derived(seed, *use) for seed in (1, 2) for use in (("a",), ("a", 1), ("a", 11), ("b",))}
    assert len(found) == 8
    assert all(0 <= seed < 2**63 for seed in found)
