# SPDX-License-Identifier: Apache-2.0
"""The worker protocol: bytes agree with TorchServe's own code, and nothing malformed gets through."""

from __future__ import annotations

import socket
import struct
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloister_serving import otf


def _as_torchserve_reads(message: bytes) -> tuple[bytes, Any]:
    from ts.protocol.otf_message_handler import retrieve_msg

    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender = threading.Thread(target=ours.sendall, args=(message,))
        sender.start()
        command, value = retrieve_msg(theirs)
        sender.join()
        return bytes(command), value


def _reply(items: list[tuple[str, bytes]], *, code: int = 200, message: str = "Prediction success") -> bytes:
    """A reply as TorchServe's worker writes it."""
    from ts.context import Context, RequestProcessor
    from ts.protocol.otf_message_handler import create_predict_response

    context = Context("m", "/", {}, 1, None, "1")
    context.request_processor = [RequestProcessor({}) for _ in items]
    for i in range(len(items)):
        context.set_response_content_type(i, "application/json")
    ids = {i: request_id for i, (request_id, _) in enumerate(items)}
    return bytes(create_predict_response([body for _, body in items], ids, message, code, context=context))


def test_torchserve_reads_our_load_message(monkeypatch: pytest.MonkeyPatch) -> None:
    command, message = _as_torchserve_reads(
        otf.encode_load(name="reviews", path="/run/x", handler="h.py", batch_size=3)
    )
    assert command == b"L"
    assert (message["modelName"], message["modelPath"], message["handler"]) == (b"reviews", b"/run/x", b"h.py")
    assert message["batchSize"] == 3
    assert message["envelope"] == b""
    assert "gpu" not in message


def test_torchserve_reads_our_requests_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "false")
    body = '{"texts":["很好"]}'.encode()
    one = otf.InferRequest("r1", (otf.InferParameter("body", "application/json", body),), {"a": "b"})
    two = otf.InferRequest("r2", ())
    command, batch = _as_torchserve_reads(otf.encode_infer([one, two]))
    assert command == b"I"
    assert [request["requestId"] for request in batch] == [b"r1", b"r2"]
    assert batch[0]["headers"] == [{"name": b"a", "value": b"b"}]
    assert batch[0]["parameters"] == [{"name": "body", "contentType": "application/json", "value": body}]
    assert batch[1]["parameters"] == []


def test_we_read_the_replies_torchserve_writes() -> None:
    encoded = _reply([("r1", b"[1]"), ("r2", b"[2]")])
    found = otf.decode_reply(encoded + b"next")
    assert found is not None
    reply, size = found
    assert size == len(encoded)
    assert reply.code == 200
    assert [(item.request_id, item.body, item.status) for item in reply.items] == [
        ("r1", b"[1]", 200),
        ("r2", b"[2]", 200),
    ]
    assert reply.items[0].content_type == "application/json"


def test_we_read_the_answer_to_a_load() -> None:
    from ts.protocol.otf_message_handler import create_load_model_response

    found = otf.decode_reply(bytes(create_load_model_response(507, "System out of memory")))
    assert found is not None
    assert found[0] == otf.Reply(507, "System out of memory", ())


def test_a_reply_is_incomplete_until_its_last_byte() -> None:
    encoded = _reply([("r1", b"[1]")])
    assert all(otf.decode_reply(encoded[:n]) is None for n in range(len(encoded)))


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("a negative length", struct.pack("!ii", 200, -2)),
        ("a message beyond the limit", struct.pack("!ii", 200, 5000)),
        ("a text that is not UTF-8", struct.pack("!ii", 200, 1) + b"\xff"),
        ("a body beyond the limit", _reply([("r", b"")])[:-8] + struct.pack("!i", 1 << 30)),
    ],
)
def test_a_malformed_reply_is_refused_before_it_is_complete(what: str, data: bytes) -> None:
    with pytest.raises(otf.OtfError):
        otf.decode_reply(data)


def test_more_predictions_than_the_limit_are_refused() -> None:
    with pytest.raises(otf.OtfError, match="more than 2"):
        otf.decode_reply(_reply([(str(i), b"") for i in range(3)]), otf.OtfLimits(items=2))


def test_a_reply_that_never_ends_is_refused() -> None:
    limits = otf.OtfLimits(reply_bytes=1000, body_bytes=600)
    encoded = _reply([(str(i), b"x" * 500) for i in range(4)])
    assert otf.decode_reply(encoded[:900], limits) is None
    with pytest.raises(otf.OtfError, match="longer than 1000"):
        otf.decode_reply(encoded[:1001], limits)
    with pytest.raises(otf.OtfError, match="longer than 1000"):
        otf.decode_reply(encoded, limits)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_reply_incomplete_or_an_otf_error(data: bytes) -> None:
    try:
        found = otf.decode_reply(data)
    except otf.OtfError:
        return
    assert found is None or found[1] <= len(data)


@given(st.data())
def test_a_changed_byte_never_escapes_as_another_error(data: st.DataObject) -> None:
    encoded = bytearray(_reply([("r1", b"[1]"), ("r2", b"[2]")]))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] = data.draw(st.integers(0, 255))
    try:
        otf.decode_reply(encoded)
    except otf.OtfError:
        return
