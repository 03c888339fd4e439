# SPDX-License-Identifier: Apache-2.0
"""HTTPS answers become predictions or errors, and printed commands survive any text in them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, cast

import pytest

from cloister.cli import predict
from cloister.cli.session import Session
from cloister.cli.state import Stack, StateDirectory
from cloister.errors import CloisterError, Code

HOSTILE = 'it\'s; rm -rf $HOME `id` "x" \\ 好'


@pytest.fixture
def session(tmp_path: Path) -> Session:
    stack = Stack(
        supervisor_pid=1,
        started_unix_s=0.0,
        trust_domain="cloister.test",
        tenant="demo",
        user="spiffe://cloister.test/ns/demo/user/owner",
        endpoints={"gateway": {"grpc": "127.0.0.1:1", "https": "127.0.0.1:2"}},
        process_ids={},
        root_certificate="",
        collateral="",
        simulated=True,
        timings_s={},
    )
    return Session(StateDirectory(tmp_path / "with space"), stack, cast(Any, None))


def test_an_answer_is_its_predictions() -> None:
    document = {"model": "reviews", "predictions": [{"label": "positive", "probability": 0.9}]}
    assert predict._answer(200, json.dumps(document).encode()) == document


def test_an_error_of_the_gateway_keeps_its_code_and_words() -> None:
    error = {"code": "CLO-1601", "what": "no such model", "why": "y", "todo": "t", "request_id": "r"}
    with pytest.raises(CloisterError) as caught:
        predict._answer(404, json.dumps({"error": error}).encode())
    assert (caught.value.code, caught.value.what, caught.value.todo) == (Code.MODEL_NOT_FOUND, "no such model", "t")


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'"x"', b'{"error": "text"}', b'{"predictions": 1}', b"\xff"])
@pytest.mark.parametrize("status", [200, 502])
def test_any_other_answer_is_an_error_with_its_status(status: int, data: bytes) -> None:
    with pytest.raises(CloisterError, match=str(status)):
        predict._answer(status, data)


def test_the_curl_command_is_safe_to_paste(session: Session) -> None:
    words = shlex.split(predict.curl_command(session, "reviews", [HOSTILE]))
    assert words[0] == "curl"
    assert json.loads(words[words.index("-d") + 1]) == {"texts": [HOSTILE]}
    assert words[words.index("--resolve") + 1] == "gateway.cloister.test:2:127.0.0.1"
    assert words[-1] == "https://gateway.cloister.test:2/predictions/reviews"


def test_the_grpcurl_command_names_the_gateway_it_must_prove_to_be(session: Session) -> None:
    words = shlex.split(predict.grpcurl_command(session, "a.B/C", {"texts": [HOSTILE]}))
    assert words[words.index("-authority") + 1] == "gateway.cloister.test"
    assert json.loads(words[words.index("-d") + 1]) == {"texts": [HOSTILE]}
    assert "-d" not in shlex.split(predict.grpcurl_command(session, "list", None))


def test_a_models_name_cannot_leave_its_place_in_the_path(session: Session) -> None:
    assert "/predictions/..%2Fadmin%3Fx" in predict.curl_command(session, "../admin?x", ["t"])
