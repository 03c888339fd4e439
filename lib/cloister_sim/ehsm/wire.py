# SPDX-License-Identifier: Apache-2.0
"""Requests and answers of the REST API, without their transport: JSON in, checked values out, and the other way.

Checks are in EHSM's order with one exception: who asks is authenticated before anything of the payload is looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from cloister import ehsm
from cloister.secret import SecretBytes

OPEN_ACTIONS: Final = frozenset({"GetVersion", "Enroll"})  # asked for by GET, without a signature
PAYLOAD_ACTIONS: Final = frozenset(
    {
        "CreateKey",
        "Encrypt",
        "Decrypt",
        "GenerateDataKey",
        "GenerateDataKeyWithoutPlaintext",
        "ExportDataKey",
        "AsymmetricEncrypt",
        "AsymmetricDecrypt",
        "Sign",
        "Verify",
        "GetPublicKey",
        "GetParametersForImport",
        "ImportKeyMaterial",
        "GenerateQuote",
        "VerifyQuote",
    }
)
# EHSM computes the HMAC by a call of 12,288 bytes, in which base64 of the signed text is the longest part by far.
_MAX_SIGNED_TEXT: Final = 9000  # bytes; measured at the real one, between 8,961 and 9,003
_TIMESTAMP: Final = re.compile(r"[0-9]{13}", re.ASCII)
_SIGNED: Final = ("appid", "nonce", "payload", "timestamp")


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes into the body; the HTTP status is 200 whatever the code says."""

    code: int
    message: Any  # a text, as a rule; absent when None
    result: Any

    def to_json(self) -> bytes:
        members: dict[str, Any] = {"code": self.code}
        if self.message is not None:
            members["message"] = self.message
        members["result"] = self.result
        return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, code: int, message: str | None, *, by_core: bool = False) -> None:
        super().__init__(message or "refused")
        # What the enclave refuses has null for a result, what the service in front of it refuses an empty object.
        self.answer = Answer(code, message, None if by_core else {})


def bad_request(message: str) -> Refused:
    return Refused(400, message)


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it was parsed, not yet authenticated."""

    action: str
    appid: str
    timestamp: str
    timestamp_ms: int
    nonce: str  # "" when there is none
    payload: Mapping[str, Any]
    sign: str
    signed: Mapping[str, Any]  # the members that the signature is over, as they came

    @property
    def text(self) -> bytes:
        """Return the signed text; raise Refused for one that EHSM cannot sign."""
        try:
            text = ehsm.canonical(self.signed).encode()
        except ValueError:
            raise bad_request("param type error") from None
        if len(text) > _MAX_SIGNED_TEXT:
            raise bad_request("Unexpected Error")
        return text


def parse_request(action: str, body: bytes, now_ms: int) -> Request:
    """Parse a POST's body; raise Refused."""
    try:
        members = json.loads(body.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
        json.dumps(members, ensure_ascii=False).encode()  # half a surrogate pair is no text that could be stored
    except (ValueError, RecursionError):
        raise bad_request("Invalid JSON") from None
    if not isinstance(members, dict):
        raise bad_request("Missing required parameters")
    appid, timestamp, sign = (members.get(name) for name in ("appid", "timestamp", "sign"))
    if not appid or not timestamp or not sign or (action in PAYLOAD_ACTIONS and members.get("payload") is None):
        raise bad_request("Missing required parameters")
    payload = members.get("payload", {})
    nonce = members.get("nonce", "")
    if not isinstance(appid, str) or not isinstance(timestamp, str) or not isinstance(sign, str):
        raise bad_request("param type error")
    # EHSM takes any nonce; as an array or object it would let a request be sent again.
    if not isinstance(payload, dict) or (not isinstance(nonce, str) and type(nonce) is not int):
        raise bad_request("param type error")
    if len(str(nonce)) > ehsm.MAX_NONCE:
        raise bad_request("Nonce length error")
    if len(timestamp) != 13:
        raise bad_request("Timestamp length error")
    if not _TIMESTAMP.fullmatch(timestamp) or abs(now_ms - int(timestamp)) >= ehsm.TIMESTAMP_WINDOW_MS:
        raise bad_request("Timestamp error")
    return Request(
        action=action,
        appid=appid,
        timestamp=timestamp,
        timestamp_ms=int(timestamp),
        nonce=str(nonce),
        payload=payload,
        sign=sign,
        signed={name: members[name] for name in _SIGNED if name in members},
    )


@dataclass(frozen=True, slots=True)
class Call:
    """An authentic request with its payload checked: what an action works on."""

    appid: str
    fields: dict[str, Any]
    now_ms: int
    api_key: SecretBytes


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _refuse_constant(text: str) -> None:
    raise ValueError(text)
