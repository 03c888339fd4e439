# SPDX-License-Identifier: Apache-2.0
"""The development server reads any bytes into a request or one refusal, and lets none count twice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister import ehsm
from cloister_sim.ehsm.fields import FIELDS, read_payload
from cloister_sim.ehsm.replay import ReplayWindow, Seen
from cloister_sim.ehsm.wire import PAYLOAD_ACTIONS, Refused, parse_request

NOW = 1_700_000_000_000
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
BODY = st.fixed_dictionaries(
    {"appid": st.just("a") | JSON, "timestamp": st.just(str(NOW)) | JSON, "sign": st.just("s") | JSON},
    optional={
        "nonce": st.just("ab") | JSON,
        "payload": st.dictionaries(st.sampled_from(["keyid", "aad"]), JSON) | JSON,
    },
)


@given(
    st.sampled_from([*sorted(FIELDS), "ListKey"]), st.binary(max_size=60) | BODY.map(lambda b: json.dumps(b).encode())
)
def test_any_body_is_a_request_that_can_be_signed_or_refused_in_json(action: str, body: bytes) -> None:
    try:
        request = parse_request(action, body, NOW)
        assert request.text == ehsm.canonical(request.signed).encode()
        read_payload(action, request.payload)
    except Refused as refused:
        json.loads(refused.answer.to_json())
        return
    assert abs(request.timestamp_ms - NOW) < ehsm.TIMESTAMP_WINDOW_MS
    assert action not in PAYLOAD_ACTIONS or request.payload


@given(st.dictionaries(st.text(max_size=10), JSON, max_size=4), st.sampled_from(sorted(FIELDS)))
def test_any_payload_gives_fields_of_the_right_types_or_is_refused(payload: dict[str, Any], action: str) -> None:
    try:
        fields = read_payload(action, payload | {"keyid": "aac3e45a-d3dc-4791-89b6-4ada0e38e6ef"})
    except Refused:
        return
    assert fields.keys() <= FIELDS[action].keys()
    assert all(isinstance(value, str | bytes) or type(value) is int for value in fields.values())


REQUESTS = st.lists(
    st.builds(
        Seen,
        st.sampled_from("ab"),
        st.sampled_from("123"),
        st.sampled_from(["", "x", "y"]),
        st.sampled_from("pqrst"),
        st.integers(0, 3 * ehsm.REPLAY_WINDOW_MS),
    ),
    max_size=30,
)


@given(REQUESTS, st.booleans())
def test_the_window_does_what_the_rule_says(requests: list[Seen], nonce_counts: bool) -> None:
    window, taken = ReplayWindow(nonce_counts=nonce_counts), []
    for request in sorted(requests, key=lambda seen: seen.arrived_ms):
        known = [
            seen
            for seen in taken
            if seen.appid == request.appid and seen.arrived_ms >= request.arrived_ms - ehsm.REPLAY_WINDOW_MS
        ]
        refused = any(seen.sign == request.sign for seen in known) or (
            any(seen.timestamp == request.timestamp for seen in known)
            and (not nonce_counts or any(seen.nonce == request.nonce for seen in known))
        )
        if refused:
            with pytest.raises(Refused):
                window.remember(request)
        else:
            window.remember(request)
            taken.append(request)
    assert window.take_unsaved() == taken
    assert window.take_unsaved() == []
