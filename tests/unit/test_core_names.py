# SPDX-License-Identifier: Apache-2.0
"""Claims about the names of things: SPIFFE ids, key URIs, error codes."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister.errors import EXIT_CODE, GRPC_STATUS, CloisterError, Code, Kind, code_from_text
from cloister.identity import Role, SpiffeId, dns_name
from cloister.keyuri import KeyUri

IDS = {
    "spiffe://cloister.dev/service/attest": Role.ATTEST,
    "spiffe://cloister.dev/service/keybroker": Role.KEYBROKER,
    "spiffe://cloister.dev/service/trainer": Role.TRAINER,
    "spiffe://cloister.dev/service/gateway": Role.GATEWAY,
    "spiffe://cloister.dev/ns/a/job/j-1/rank/0": Role.RANK,
    "spiffe://cloister.dev/ns/a/model/m/backend/b0": Role.BACKEND,
    "spiffe://cloister.dev/ns/a/user/alice": Role.USER,
}


@pytest.mark.parametrize(("text", "role"), IDS.items())
def test_an_id_of_each_role_parses_and_prints_back(text: str, role: Role) -> None:
    spiffe_id = SpiffeId.parse(text)
    assert spiffe_id.role is role
    assert str(spiffe_id) == text
    assert spiffe_id.dns_name == dns_name(role, "cloister.dev")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "https://cloister.dev/service/attest",
        "spiffe://cloister.dev/service/rank",
        "spiffe://cloister.dev/service/attest/",
        "spiffe://cloister.dev/service/attest?x",
        "spiffe://CLOISTER.dev/service/attest",
        "spiffe:///service/attest",
        "spiffe://cloister.dev/ns/a/job/j/rank/01",
        "spiffe://cloister.dev/ns/a/job/j/rank/-1",
        "spiffe://cloister.dev/ns/a/job/j/rank/123456",
        "spiffe://cloister.dev/ns/A/user/x",
        "spiffe://cloister.dev/ns/../user/x",
        "spiffe://cloister.dev/ns/a/user/" + "x" * 64,
        "spiffe://cloister.dev/" + "x" * 3000,
    ],
)
def test_anything_else_is_no_id(text: str) -> None:
    with pytest.raises(CloisterError) as caught:
        SpiffeId.parse(text)
    assert caught.value.code is Code.CALLER_UNKNOWN


@given(st.text(max_size=80))
def test_arbitrary_text_is_an_id_or_a_clean_error(text: str) -> None:
    for parse in (SpiffeId.parse, KeyUri.parse):
        try:
            parsed = str(parse(text))
        except CloisterError:
            continue
        assert parsed == text


def test_a_key_uri_names_a_tenant_and_a_path() -> None:
    uri = KeyUri.parse("cloister-key://hospital-a/datasets/reviews.v1")
    assert (uri.tenant, uri.path) == ("hospital-a", "datasets/reviews.v1")


@pytest.mark.parametrize(
    "text",
    [
        "cloister-key://",
        "cloister-key://a",
        "cloister-key://a/",
        "cloister-key:///b",
        "cloister-key://a//b",
        "cloister-key://a/../b",
        "cloister-key://a/.b",
        "cloister-key://A/b",
        "cloister-key://a/b ",
        "cloister-key://a/" + "/".join("x" * 9),
        "key://a/b",
    ],
)
def test_anything_else_is_no_key_uri(text: str) -> None:
    with pytest.raises(CloisterError) as caught:
        KeyUri.parse(text)
    assert caught.value.code is Code.KEY_URI_INVALID


def test_error_codes_are_unique_and_every_kind_has_a_status_and_an_exit_code() -> None:
    numbers = [code.value.number for code in Code]
    assert len(numbers) == len(set(numbers)) == len(Code)
    assert set(GRPC_STATUS) == set(EXIT_CODE) == set(Kind)
    assert 0 not in EXIT_CODE.values()


@pytest.mark.parametrize("code", list(Code))
def test_a_code_is_found_by_its_text(code: Code) -> None:
    assert code_from_text(code.text) is code
    assert code.value.summary[0].islower()
    assert not code.value.summary.endswith(".")


def test_an_unknown_code_is_none_and_an_error_prints_three_lines() -> None:
    assert code_from_text("CLO-0") is None
    error = CloisterError(Code.DISK_FULL, what="what", why="why", todo="todo")
    assert str(error).splitlines() == ["CLO-1005: what", "why", "todo"]


def test_an_error_travels_between_processes_as_it_is() -> None:
    error = CloisterError(Code.DISK_FULL, what="w", why="y", todo="t", block="b")
    again = copy.copy(error)
    assert (again.code, again.what, again.why, again.todo, again.block) == (Code.DISK_FULL, "w", "y", "t", "b")
    rebuild, (_, *rest) = error.__reduce__()
    assert callable(rebuild)
    assert rebuild("CLO-99999", *rest).code is Code.INTERNAL  # of a newer release
