# SPDX-License-Identifier: Apache-2.0
"""Fuzz both ends of EHSM's API: any bytes are an answer or none; any body is a request or refused, and can be signed.

Run: python tests/fuzz/fuzz_ehsm.py
"""

from __future__ import annotations

import json
import sys

import atheris

with atheris.instrument_imports(include=["cloister.ehsm", "cloister_keybroker.backends.ehsm.answers", "cloister_sim"]):
    from cloister import ehsm
    from cloister_keybroker.backends.ehsm.answers import Answer, AnswerInvalid
    from cloister_sim.ehsm.fields import FIELDS, read_payload
    from cloister_sim.ehsm.wire import Refused, parse_request

_NOW_MS = 1_700_000_000_000
_ACTIONS = sorted(FIELDS)
_ANSWER = (
    b'{"code":200,"message":"success!","result":{"keyid":"aac3e45a-d3dc-4791-89b6-4ada0e38e6ef","plaintext":"dGVz"}}'
)
_REQUEST = (
    b'{"appid":"a","timestamp":"1700000000000","nonce":"ab","sign":"x",'
    b'"payload":{"keyid":"aac3e45a-d3dc-4791-89b6-4ada0e38e6ef","keylen":32,"aad":"dGVz"}}'
)


def one_input(data: bytes) -> None:
    """Read bytes as they are, and bytes written into something well formed."""
    read_answer(data)
    read_request(data, "GenerateDataKey")
    if len(data) > 3:
        place, cut, action = data[0], data[1], _ACTIONS[data[2] % len(_ACTIONS)]
        read_answer(_ANSWER[:place] + data[3:] + _ANSWER[place + cut :])
        read_request(_REQUEST[:place] + data[3:] + _REQUEST[place + cut :], action)


def read_answer(data: bytes) -> None:
    """Raise for anything but an answer or the one error."""
    try:
        answer = Answer.parse(data)
    except AnswerInvalid:
        return
    refusal = answer.refusal
    if (refusal is None) != (answer.code == 200) or (refusal and not refusal.message.isascii()):
        raise AssertionError("a refusal is not what it says")
    for read in (answer.key_id, answer.keys, lambda: answer.octets("plaintext", size=32)):
        try:
            read()
        except AnswerInvalid:
            continue


def read_request(data: bytes, action: str) -> None:
    """Raise for anything but a request or a refusal; what was parsed signs as what it is written as."""
    try:
        request = parse_request(action, data, _NOW_MS)
        text = request.text
        read_payload(action, request.payload)
    except Refused as refused:
        json.loads(refused.answer.to_json())
        return
    if text != ehsm.canonical(json.loads(json.dumps(request.signed))).encode():
        raise AssertionError("the signed text depends on how a request is written")


if __name__ == "__main__":
    read_answer(_ANSWER)
    read_request(_REQUEST, "GenerateDataKey")
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
