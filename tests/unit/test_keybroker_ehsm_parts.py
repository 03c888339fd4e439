# SPDX-License-Identifier: Apache-2.0
"""The parts of the EHSM client that need no server: answers, circuit breaker, intents, options, clocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cloister.errors import CloisterError, Code
from cloister_keybroker.backends.ehsm.answers import Answer, AnswerInvalid, ListedKey, Outcome
from cloister_keybroker.backends.ehsm.breaker import Breaker
from cloister_keybroker.backends.ehsm.enclave import EnclavePolicy
from cloister_keybroker.backends.ehsm.failures import Undone, refusal_error
from cloister_keybroker.backends.ehsm.intents import Journal
from cloister_keybroker.backends.ehsm.options import EhsmOptions
from cloister_keybroker.backends.ehsm.skew import SkewWatch
from cloister_keybroker.backends.uri import BackendUri

K = "aac3e45a-d3dc-4791-89b6-4ada0e38e6ef"


def answer(code: int = 200, message: Any = "success!", result: Any = None, **more: Any) -> Answer:
    return Answer.parse(json.dumps({"code": code, "message": message, "result": result, **more}).encode())


# answers


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ({"code": 400, "message": "keyid error", "result": {}}, Outcome.KEY_LOST),
        ({"code": 400, "message": "not find this keyid", "result": {}}, Outcome.KEY_LOST),
        ({"code": 400, "message": "keyid is disabled", "result": {}}, Outcome.KEY_DISABLED),
        ({"code": 400, "message": "keyid expire", "result": {}}, Outcome.KEY_EXPIRED),
        ({"code": 400, "message": "sign error", "result": {}}, Outcome.CREDENTIALS),
        ({"code": 400, "result": {}}, Outcome.CREDENTIALS),  # an unknown appid
        ({"code": 400, "message": {}, "result": {}}, Outcome.TROUBLE),  # its database is down
        ({"code": 400, "message": None, "result": None}, Outcome.TROUBLE),
        ({"code": 400, "message": "database error"}, Outcome.TROUBLE),
        ({"code": 500, "message": "Server exception.", "result": None}, Outcome.TROUBLE),
        ({"code": 404, "message": "API Not Found", "result": {}}, Outcome.UNKNOWN_ACTION),
        ({"code": 400, "message": "Timestamp can't be repeated in 20 minutes"}, Outcome.REPEATED),
        ({"code": 400, "message": "Timestamp error"}, Outcome.CLOCK),
        ({"code": 400, "message": "Parameter invalid, The aad length error."}, Outcome.REQUEST),
        ({"code": 201, "message": "success!"}, Outcome.REQUEST),
    ],
)
def test_a_refusal_has_one_meaning(body: dict[str, Any], outcome: Outcome) -> None:
    refusal = Answer.parse(json.dumps(body).encode()).refusal
    assert refusal is not None
    assert refusal.outcome is outcome
    assert refusal.undone is (outcome is not Outcome.TROUBLE)


@pytest.mark.parametrize("message", ["success!", "anything", {}, None])
def test_success_is_the_code_whatever_the_message_says(message: Any) -> None:
    assert answer(message=message).refusal is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"<html></html>",
        b"\xff",
        b"{}",
        b'{"code": "200"}',
        b'{"code": true}',
        b'{"code": 200.0}',
        b'{"code": 200, "code": 400}',
        b'{"code": NaN}',
        b'{"code": 200, "result": []}',
        b'{"code": 200, "result": "x"}',
        b"[" * 20_000,
        b'{"code": 200}' + b" " * 70_000,
    ],
)
def test_what_is_no_answer_is_refused(body: bytes) -> None:
    with pytest.raises(AnswerInvalid):
        Answer.parse(body)


@pytest.mark.parametrize("value", [None, 1, "", "no base64", "dGVzdB==", "dGVzdA==", "A" * 10_000])
def test_a_result_of_another_form_is_refused(value: Any) -> None:
    found = answer(result={"plaintext": value, "keyid": value, "version": value})
    with pytest.raises(AnswerInvalid):
        found.octets("plaintext", size=32)
    with pytest.raises(AnswerInvalid):
        found.key_id()


@pytest.mark.parametrize(
    "item",
    [
        {},
        "x",
        {"keyid": K, "creationDate": "1", "keyState": 1},
        {"keyid": K.upper(), "creationDate": 1, "keyState": 1},
        {"keyid": K, "creationDate": -1, "keyState": 1},
        {"keyid": K, "creationDate": True, "keyState": 1},
    ],
)
def test_a_list_with_something_else_in_it_is_refused(item: Any) -> None:
    good = {"keyid": K, "creationDate": 1, "keyState": 0, "alias": ""}
    assert answer(result={"list": [good]}).keys() == (ListedKey(K, 1, enabled=False),)
    with pytest.raises(AnswerInvalid):
        answer(result={"list": [good, item]}).keys()


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["code", "message", "result", "keyid", "list"]), inner, max_size=4)
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_any_bytes_are_an_answer_or_refused_as_none(data: bytes) -> None:
    try:
        found = Answer.parse(data)
    except AnswerInvalid:
        return
    if found.refusal is not None:
        error = refusal_error("ehsm", found.refusal, None)
        assert error.code in {
            Code.CUSTODIAN_REFUSED,
            Code.CUSTODIAN_UNAVAILABLE,
            Code.CUSTODIAN_KEY_LOST,
            Code.KEY_DISABLED,
        }
        # Nothing of what came is shown to a caller.
        assert not found.message or len(found.message) < 4 or found.message not in str(error)


# circuit breaker


def test_the_circuit_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(threshold=3)
    for _ in range(2):
        assert not breaker.failed(0.0)
    breaker.succeeded()
    assert [breaker.failed(0.0) for _ in range(3)] == [False, False, True]
    assert breaker.is_open


def test_one_probe_at_a_time_closes_it_or_doubles_the_pause() -> None:
    breaker = Breaker(threshold=1, first_pause_s=1.0, longest_pause_s=3.0)
    breaker.failed(10.0)
    assert not breaker.may_probe(10.9)
    assert breaker.wait_s(10.25) == 0.75
    assert breaker.may_probe(11.0)
    assert not breaker.may_probe(11.0)
    breaker.failed(11.0)
    assert [breaker.may_probe(moment) for moment in (12.9, 13.0)] == [False, True]
    breaker.failed(13.0)
    assert breaker.wait_s(13.0) == 3.0  # the longest
    assert breaker.may_probe(16.0)
    breaker.gave_up_probe()
    assert breaker.may_probe(16.0)
    breaker.succeeded()
    assert not breaker.is_open
    assert not breaker.may_probe(17.0)


@given(st.lists(st.tuples(st.sampled_from(["fail", "good", "probe"]), st.floats(0, 5)), max_size=60))
def test_whatever_happens_a_probe_comes_within_the_longest_pause(events: list[tuple[str, float]]) -> None:
    breaker, now = Breaker(threshold=2, longest_pause_s=4.0), 0.0
    for event, step in events:
        now += step
        if event == "fail":
            breaker.failed(now)
        elif event == "good":
            breaker.succeeded()
        elif breaker.may_probe(now):
            breaker.failed(now)
    if breaker.is_open:
        assert breaker.may_probe(now + 4.0)


# intents


def test_an_intent_is_on_disk_until_it_is_settled(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "intents")
    intent = journal.begin(1_700_000_000_000)
    assert Journal(tmp_path / "intents").all() == [intent]
    known = journal.answered(intent, K)
    assert Journal(tmp_path / "intents").all() == [known]
    assert journal.orphaned(known, 5).orphaned_ms == 5
    journal.drop(known)
    journal.drop(known)
    assert journal.all() == []


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"started_ms": "1", "keyid": null, "orphaned_ms": null}'])
def test_a_damaged_intent_is_named_and_a_half_written_one_is_passed_over(tmp_path: Path, data: bytes) -> None:
    journal = Journal(tmp_path)
    (tmp_path / ".cloister-0123.partial").write_bytes(b"{")
    assert journal.all() == []
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(CloisterError) as caught:
        journal.all()
    assert caught.value.code is Code.STORE_DAMAGED


# options


@pytest.fixture
def credentials(tmp_path: Path) -> str:
    for name, text in (("appid", K), ("apikey", "44RPFy3SEqLbAahaP9PXSGQ6ABB6gctr")):
        (tmp_path / name).write_text(f"{text}\n")
        (tmp_path / name).chmod(0o600)
    return f"appid={tmp_path / 'appid'}&apikey={tmp_path / 'apikey'}"


def options(text: str) -> EhsmOptions:
    return EhsmOptions.of(BackendUri.parse(text))


def test_options_are_read_from_the_uri_and_the_files_it_names(credentials: str, tmp_path: Path) -> None:
    pin = "sha256:" + "ab" * 32
    found = options(f"ehsm:https://kms:9000?{credentials}&ca={tmp_path}/ca.pem&pin={pin},sha256:{'cd' * 32}")
    assert (found.name, found.url, found.appid) == ("ehsm", "https://kms:9000", K)
    assert len(found.pins) == 2
    assert "44RP" not in repr(found)


@pytest.mark.parametrize(
    "wrong",
    [
        "ehsm:https://kms:9000?CRED",  # nothing says who the server is
        "ehsm:http://kms:9000?CRED&ca=/ca.pem",
        "ehsm:https://kms:9000/ehsm?CRED&ca=/ca.pem",
        "ehsm:https://u:p@kms:9000?CRED&ca=/ca.pem",
        "ehsm:https://kms:9000?CRED&ca=ca.pem",
        "ehsm:https://kms:9000?CRED&pin=sha256:abcd",
        "ehsm:https://kms:9000?CRED&pin=ab",
        "ehsm:https://kms:9000?CRED&ca=/ca.pem&verify=no",
        "ehsm:https://kms:9000?CRED&ca=/ca.pem&server-name=a/b",
        "ehsm:https://kms:9000?ca=/ca.pem",
    ],
)
def test_what_would_not_be_safe_or_is_misspelt_is_refused(credentials: str, wrong: str) -> None:
    with pytest.raises(CloisterError) as caught:
        options(wrong.replace("CRED", credentials))
    assert caught.value.code is Code.CONFIG_INVALID
    assert "44RP" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "short", "with space in it and long", "ümlaut-ümlaut-ümlaut"])
def test_a_file_without_a_credential_is_refused_and_its_text_is_not_shown(
    credentials: str, tmp_path: Path, text: str
) -> None:
    (tmp_path / "apikey").write_text(text)
    with pytest.raises(CloisterError) as caught:
        options(f"ehsm:https://kms:9000?{credentials}&ca=/ca.pem")
    assert not text or text not in str(caught.value)


# clocks


def test_a_large_difference_of_clocks_is_told_every_ten_minutes() -> None:
    now = [0.0]
    watch = SkewWatch("ehsm", 60.0, monotonic=lambda: now[0])
    with capture_logs() as logs:
        watch.observe(None)
        watch.observe(59.0)
        assert logs == []
        watch.observe(-61.0)
        watch.observe(-61.0)
        now[0] = 601.0
        watch.observe(-61.0)
    assert [log["ahead_s"] for log in logs] == [-61, -61]
    assert watch.last_s == -61.0


def test_an_error_stays_what_it_was_when_it_is_marked_as_undone() -> None:
    error = CloisterError(Code.CUSTODIAN_BUSY, what="a", why="b", todo="c")
    assert str(Undone.of(error)) == str(error)


# enclave policy

POLICY = """apiVersion: cloister.dev/v1
kind: EhsmEnclavePolicy
spec:
  root: intel
  collateral: /var/lib/collateral
  enclave: {mr_enclave: ["%s"], min_isv_svn: 2}
  tcb: {status: [UpToDate]}
""" % ("ab" * 32)


def test_an_enclave_policy_is_strict_unless_it_says_otherwise() -> None:
    policy = EnclavePolicy.parse(POLICY.encode())
    assert not policy.debug
    assert not policy.root.simulated
    assert policy.min_isv_svn == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("root: intel", "root: own"),
        ("root: intel", "root: simulated:root.pem"),
        ("/var/lib", "var/lib"),
        ("min_isv_svn: 2", "min_isv_svn: -1"),
        ("min_isv_svn: 2", "debug: maybe"),
        ("min_isv_svn: 2", "extra: 1"),
        ("[UpToDate]", "[Revoked]"),
        ("[UpToDate]", "[]"),
        ('mr_enclave: ["%s"], ' % ("ab" * 32), ""),
        (
            'mr_enclave: ["%s"]' % ("ab" * 32),
            'mr_signer: ["c30446b4be9baf0f69728423ea613ef81a63e72acf7439fa0549001fd5482835"]',
        ),
    ],
)
def test_an_enclave_policy_that_is_misspelt_or_protects_nothing_is_refused(old: str, new: str) -> None:
    assert old in POLICY
    with pytest.raises(CloisterError) as caught:
        EnclavePolicy.parse(POLICY.replace(old, new).encode())
    assert caught.value.code is Code.POLICY_INVALID
