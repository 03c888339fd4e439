# SPDX-License-Identifier: Apache-2.0
"""What both ends of Intel EHSM-KMS's REST API agree on: the text that a request signs, its signature, base64, sizes.

A request is a JSON object; its signature is over a text made of the object's members, sorted, joined and not escaped,
by the rules of JavaScript: `canonical` is what EHSM computes from whatever a client sends. The rules lose information
(members that are empty or zero vanish, arrays look like objects, `&` and `=` are not escaped), so several objects can
have one text. `require_plain` is a subset in which nothing vanishes and no field runs into another; the broker's client
sends nothing else.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Final, TypeAlias

from cloister.secret import SecretBytes

JsonValue: TypeAlias = "str | int | float | bool | Sequence[JsonValue] | Mapping[str, JsonValue] | None"

MAX_DEPTH: Final = 32  # levels of objects; a request has two
TIMESTAMP_WINDOW_MS: Final = 600_000  # a request's time may be this far from the server's
REPLAY_WINDOW_MS: Final = 1_200_000  # a nonce and a timestamp are remembered this long
MAX_NONCE: Final = 64  # characters
MAX_BODY: Final = 102_400  # bytes of a request; more is HTTP 413
MAX_FIELD: Final = 8192  # characters of base64 in a plaintext, message or aad
MAX_CIPHERTEXT: Final = 8232  # characters of base64 in Decrypt's ciphertext
GCM_OVERHEAD: Final = 28  # bytes: IV (12) and tag (16) behind an AES-GCM ciphertext
KEY_LIFE_DAYS: Final = 365  # after which a key is refused as expired,
KEY_SWEPT_AFTER_DAYS: Final = 355  # and after which EHSM's nightly sweep deletes it for good

_BASE64: Final = re.compile(r"[A-Za-z0-9+/]+={0,2}", re.ASCII)
# None of the characters that separate members, and none that another encoding would change.
_PLAIN: Final = re.compile(r"[A-Za-z0-9+/=_.:-]+", re.ASCII)
_PLAIN_NONCE: Final = re.compile(r"[0-9a-f]{1,64}", re.ASCII)
_LARGEST_EXACT: Final = 2**53
_KEY_ID: Final = re.compile(r"[a-z0-9]{8}-[a-z0-9]{4}-[a-z0-9]{4}-[a-z0-9]{4}-[a-z0-9]{12}", re.ASCII)


def canonical(members: Mapping[str, JsonValue]) -> str:
    """Return the text that stands for an object; raise ValueError for one that is nested too deeply."""
    return _canonical(members, MAX_DEPTH)


def sign(api_key: SecretBytes, members: Mapping[str, JsonValue]) -> str:
    """Return base64(HMAC-SHA-256) over the text of a request's `appid`, `nonce`, `payload` and `timestamp`."""
    return base64.b64encode(hmac.digest(api_key.reveal(), _utf8(canonical(members)), "sha256")).decode()


def require_plain(members: Mapping[str, JsonValue]) -> None:
    """Raise ValueError for a request of whose text another sensible request could be made.

    Plain are strings of base64, hexadecimal, names and numbers, integers from 1 to 2**53, in `payload` or beside it.
    """
    for name, value in members.items():
        if isinstance(value, Mapping):
            if name != "payload":
                raise ValueError(f"{name} is an object")
            for inner, scalar in value.items():
                _require_plain_scalar(inner, scalar)
        else:
            _require_plain_scalar(name, value)
    nonce = members.get("nonce")
    if not isinstance(nonce, str) or not _PLAIN_NONCE.fullmatch(nonce):
        # `==` in a nonce lets it be sent again as an object.
        raise ValueError("the nonce is not lower-case hexadecimal")


def is_key_id(text: str) -> bool:
    """Say whether this has the form of EHSM's key and policy ids."""
    return _KEY_ID.fullmatch(text) is not None


def encode(data: bytes) -> str:
    """Return base64 as EHSM wants it: standard alphabet, padded."""
    return base64.b64encode(data).decode()


def decode(text: str) -> bytes:
    """Decode base64 strictly: standard alphabet, padded, no spare bits set. Raise ValueError for anything else."""
    if len(text) % 4 or not _BASE64.fullmatch(text):
        raise ValueError("not standard base64")
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError("not standard base64") from None
    if base64.b64encode(data).decode() != text:
        raise ValueError("base64 with spare bits set")
    return data


def _canonical(members: Mapping[str, JsonValue], depth: int) -> str:
    if not depth:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    parts = []
    # JavaScript sorts by UTF-16 code units.
    for name in sorted(members, key=lambda name: name.encode("utf-16-be", "surrogatepass")):
        value = members[name]
        if _is_dropped(value):
            continue
        parts.append(f"{name}={_text(value, depth)}")
    return "&".join(parts)


def _text(value: JsonValue, depth: int) -> str:
    if isinstance(value, str):
        return value
    if value is True:
        return "true"
    if isinstance(value, Mapping):
        return _canonical(value, depth - 1)
    if isinstance(value, Sequence):
        return _canonical({str(index): item for index, item in enumerate(value)}, depth - 1)
    if value is None or value is False:  # dropped before
        return ""
    return _number(value)


def _is_dropped(value: JsonValue) -> bool:
    """Say whether a member vanishes: null, "", false, 0, and arrays that read as an empty text."""
    if isinstance(value, str):
        return not value
    if isinstance(value, Mapping):
        return False
    if isinstance(value, Sequence):
        return _reads_empty(value)
    return not value


def _reads_empty(array: Sequence[JsonValue]) -> bool:
    """Say whether JavaScript writes an array as "": an empty one, or one that holds only nothing or such an array."""
    while array:
        if len(array) > 1:
            return False
        element = array[0]
        if element is None or element == "":
            return True
        if isinstance(element, str | Mapping) or not isinstance(element, Sequence):
            return False
        array = element
    return True


def _number(value: int | float) -> str:
    """Return a number as JavaScript writes it (ECMA-262, Number::toString); integers beyond 2**53 are rounded."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf if value > 0 else -math.inf
    if not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    # Python's repr and JavaScript agree on the digits, the shortest that read back, and differ in how to place them.
    negative, digits, exponent = Decimal(repr(number)).as_tuple()
    text = "".join(map(str, digits))
    point = len(text) + int(exponent)  # digits before the decimal point
    text = text.rstrip("0")
    sign_text = "-" if negative else ""
    if len(text) <= point <= 21:
        return sign_text + text.ljust(point, "0")
    if 0 < point <= 21:
        return f"{sign_text}{text[:point]}.{text[point:]}"
    if -6 < point <= 0:
        return f"{sign_text}0.{'0' * -point}{text}"
    fraction = f".{text[1:]}" if len(text) > 1 else ""
    return f"{sign_text}{text[0]}{fraction}e{'+' if point > 0 else '-'}{abs(point - 1)}"


def _require_plain_scalar(name: str, value: JsonValue) -> None:
    if not name.isascii() or not name.isalnum():
        raise ValueError("a member's name is not plain")
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return
    if type(value) is int and 1 <= value <= _LARGEST_EXACT:
        return
    raise ValueError(f"{name} is neither plain text nor a positive integer")


def _utf8(text: str) -> bytes:
    """Encode as Node does: half of a surrogate pair becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
