# SPDX-License-Identifier: Apache-2.0
"""The gateway's decisions: who sees which model, on which cores, and what a request and an answer may be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import CloisterError, Code
from cloister_serving import router
from cloister_serving.router import ModelRecord, State

MODEL = ModelRecord(
    tenant="hospital-a",
    name="reviews",
    owner="spiffe://t/ns/hospital-a/user/alice",
    archive_digest=bytes(48),
    cores=(1,),
    created_unix_ms=0,
    state=State.READY,
)


def code_of(error: pytest.ExceptionInfo[CloisterError]) -> Code:
    return error.value.code


def test_a_ready_model_answers() -> None:
    assert router.route(MODEL, name="reviews") is MODEL


def test_a_model_that_is_not_there_is_not_found() -> None:
    with pytest.raises(CloisterError, match="you have no model reviews") as caught:
        router.route(None, name="reviews")
    assert code_of(caught) is Code.MODEL_NOT_FOUND


@pytest.mark.parametrize("state", [State.LOADING, State.FAILED])
def test_a_model_that_is_not_ready_is_unavailable(state: State) -> None:
    with pytest.raises(CloisterError) as caught:
        router.route(replace(MODEL, state=state, reason="the worker ended"), name="reviews")
    assert code_of(caught) is Code.BACKEND_DOWN


def test_a_plan_with_cores_of_its_own_for_gateway_and_backends_holds() -> None:
    router.check_core_plan(gateway_cores=[0], backend_cores=[1, 2], available={0, 1, 2, 3})


@pytest.mark.parametrize(
    ("gateway", "backend", "available", "text"),
    [
        ([0], [1], {0}, "no core 1"),
        ([0], [0], {0, 1}, "share core 0"),
        ([0, 1], [1], {0, 1}, "share core 1"),
        ([], [1], {0, 1}, "at least one core"),
        ([0], [], {0, 1}, "at least one core"),
    ],
)
def test_a_plan_that_this_machine_cannot_hold_is_refused(
    gateway: list[int], backend: list[int], available: set[int], text: str
) -> None:
    with pytest.raises(CloisterError, match=text) as caught:
        router.check_core_plan(gateway_cores=gateway, backend_cores=backend, available=available)
    assert code_of(caught) is Code.CORES_INSUFFICIENT


def test_a_backend_gets_the_core_with_the_fewest_models() -> None:
    assert router.choose_cores((), backend_cores=(1, 2), models=[MODEL]) == (2,)
    assert router.choose_cores((), backend_cores=(1, 2), models=[]) == (1,)
    failed = replace(MODEL, state=State.FAILED)
    assert router.choose_cores((), backend_cores=(1, 2), models=[failed]) == (1,)


def test_a_backend_gets_the_cores_it_asks_for_among_the_gateways() -> None:
    assert router.choose_cores((2, 1), backend_cores=(1, 2), models=[]) == (1, 2)
    with pytest.raises(CloisterError, match="core 0 is not a backend core") as caught:
        router.choose_cores((0,), backend_cores=(1, 2), models=[])
    assert code_of(caught) is Code.CORES_INSUFFICIENT


def test_a_core_takes_only_so_many_models() -> None:
    with pytest.raises(CloisterError, match="already serves 4"):
        router.choose_cores((), backend_cores=(1,), models=[MODEL] * 4)


def test_a_name_in_use_is_taken_until_its_model_failed() -> None:
    router.check_deployment("reviews", bytes(48), None)
    router.check_deployment("reviews", bytes(48), replace(MODEL, state=State.FAILED))
    with pytest.raises(CloisterError) as caught:
        router.check_deployment("reviews", bytes(48), MODEL)
    assert code_of(caught) is Code.MODEL_EXISTS


@pytest.mark.parametrize(("name", "digest"), [("../x", bytes(48)), ("", bytes(48)), ("A", bytes(48)), ("a", b"short")])
def test_a_deployment_out_of_form_is_refused(name: str, digest: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        router.check_deployment(name, digest, None)
    assert code_of(caught) is Code.ARGUMENT_INVALID


def test_texts_within_the_limits_are_taken() -> None:
    router.check_texts(["很好"])
    router.check_texts(["x" * router.MAX_TEXT_BYTES] + ["x"] * 255)


@pytest.mark.parametrize("texts", [[], ["x"] * 257, ["x", " \n"], ["好" * 22_000], ["\ud800"]])
def test_texts_out_of_bounds_are_refused(texts: list[str]) -> None:
    with pytest.raises(CloisterError) as caught:
        router.check_texts(texts)
    assert code_of(caught) is Code.ARGUMENT_INVALID


def test_a_json_body_gives_its_texts() -> None:
    assert router.texts_from_json(router.body_of(["很好", "b"])) == ["很好", "b"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"texts": "a"}', b'{"texts": [1]}', b'{"texts": ["a"], "x": 1}'])
def test_a_json_body_of_another_form_is_refused(body: bytes) -> None:
    with pytest.raises(CloisterError) as caught:
        router.texts_from_json(body)
    assert code_of(caught) is Code.ARGUMENT_INVALID


def test_an_answer_is_a_label_and_a_probability_for_each_text() -> None:
    (one,) = router.predictions_from(b'[{"label": "\xe5\xa5\xbd", "probability": 0.5}]', count=1)
    assert (one.label, one.probability) == ("好", 0.5)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"error",
        b"[]",
        b'[{"label": "a", "probability": 0.5}, {"label": "a", "probability": 0.5}]',
        b'[{"label": "a", "probability": NaN}]',
        b'[{"label": "a", "probability": 1.5}]',
        b'[{"label": 1, "probability": 0.5}]',
        b'[{"label": "\\ud800", "probability": 0.5}]',
        b"[" * 100_000,
        json.dumps([{"label": "a" * 300, "probability": 0.5}]).encode(),
    ],
)
def test_an_answer_of_another_form_is_refused(answer: bytes) -> None:
    with pytest.raises(ValueError):
        router.predictions_from(answer, count=1)


@given(st.binary(max_size=200))
def test_any_answer_is_predictions_or_a_value_error(answer: bytes) -> None:
    try:
        router.predictions_from(answer, count=1)
    except ValueError:
        return
