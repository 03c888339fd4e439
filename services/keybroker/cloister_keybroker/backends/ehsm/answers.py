# SPDX-License-Identifier: Apache-2.0
"""EHSM's answers: outside bytes to checked values, and refusals to what they mean. Pure.

The HTTP status is 200 whatever happened; `code` says. `message` is a text, missing (unknown user) or an object (its
database is down); `result` is an object, null or missing. The texts are EHSM's own; what is not in the table below is
logged and shown to nobody: they come through a host that is not trusted.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn, Self

from cloister import ehsm

MAX_ANSWER: Final = 64 * 1024  # bytes; the longest that is asked for is a quote of 10 KiB
MAX_LIST: Final = 4 * 1024 * 1024  # bytes of ListKey: 10,000 keys of up to 300 bytes
MAX_KEYS: Final = 10_000  # in a list
_SHOWN: Final = 100  # characters of an unknown message in the log
_SUCCESS: Final = 200


class AnswerInvalid(Exception):
    """An answer that is none of EHSM's; the text is public."""


class Outcome(enum.Enum):
    """What a refusal means to a caller."""

    KEY_LOST = "key lost"
    KEY_DISABLED = "key disabled"
    KEY_EXPIRED = "key expired"
    NOT_OPENED = "not opened"
    CREDENTIALS = "credentials"
    CLOCK = "clock"
    REPEATED = "repeated"  # refused as a replay: nothing was done
    TROUBLE = "trouble"  # its database or core failed: whether something was done is open
    REQUEST = "request"  # it does not like the request
    UNKNOWN_ACTION = "unknown action"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why EHSM did not do it."""

    outcome: Outcome
    code: int
    message: str  # printable ASCII, for the log

    @property
    def undone(self) -> bool:
        """Nothing was changed, for sure."""
        return self.outcome is not Outcome.TROUBLE


_MEANINGS: Final = {
    "keyid error": Outcome.KEY_LOST,
    "not find this keyid": Outcome.KEY_LOST,
    "keyid is disabled": Outcome.KEY_DISABLED,
    "keyid expire": Outcome.KEY_EXPIRED,
    "Decryption failed, Please confirm that your parameters are correct.": Outcome.NOT_OPENED,
    "sign error": Outcome.CREDENTIALS,
    "appid error": Outcome.CREDENTIALS,
    "Timestamp error": Outcome.CLOCK,
    "Timestamp can't be repeated in 20 minutes": Outcome.REPEATED,
    "API Not Found": Outcome.UNKNOWN_ACTION,
    "Unexpected Error": Outcome.TROUBLE,
    "database error": Outcome.TROUBLE,
    "create cmk failed": Outcome.TROUBLE,
    "listKey failed": Outcome.TROUBLE,
    "deleteKey failed": Outcome.TROUBLE,
    "enableKey failed": Outcome.TROUBLE,
    "disableKey failed": Outcome.TROUBLE,
}


@dataclass(frozen=True, slots=True)
class Answer:
    """A well-formed answer."""

    code: int
    message: str | None  # None when it is missing or no text
    has_message: bool
    result: Mapping[str, Any] = field(repr=False)  # of Decrypt it holds a part

    @classmethod
    def parse(cls, data: bytes, *, limit: int = MAX_ANSWER) -> Self:
        """Parse a body; raise AnswerInvalid."""
        if len(data) > limit:
            raise AnswerInvalid(f"it is longer than {limit} bytes")
        try:
            members = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse)
        except (ValueError, RecursionError):
            raise AnswerInvalid("it is not JSON") from None
        code = members.get("code") if isinstance(members, dict) else None
        if type(code) is not int:  # true is an int in Python
            raise AnswerInvalid("it has no code")
        result = members.get("result")
        if result is not None and not isinstance(result, dict):
            raise AnswerInvalid("its result is not an object")
        message = members.get("message")
        return cls(code, message if isinstance(message, str) else None, "message" in members, result or {})

    @property
    def refusal(self) -> Refusal | None:
        """Why it was not done; None when it was."""
        if self.code == _SUCCESS:
            return None
        text = "".join(c for c in (self.message or "")[:_SHOWN] if c.isascii() and c.isprintable())
        return Refusal(self._outcome(), self.code, text)

    def _outcome(self) -> Outcome:
        if self.message in _MEANINGS:
            return _MEANINGS[self.message]
        if not self.has_message:
            return Outcome.CREDENTIALS  # an unknown user
        if self.message is None or self.code >= 500:
            return Outcome.TROUBLE
        return Outcome.REQUEST

    def text(self, name: str, *, most: int) -> str:
        """Return a text of the result; raise AnswerInvalid."""
        value = self.result.get(name)
        if not isinstance(value, str) or not 0 < len(value) <= most:
            raise AnswerInvalid(f"there is no {name} of up to {most} characters in its result")
        return value

    def octets(self, name: str, *, size: int | None = None, most: int = MAX_ANSWER) -> bytes:
        """Return bytes of the result, of this size or up to `most`; raise AnswerInvalid."""
        text = self.text(name, most=4 * ((size or most) // 3 + 1))
        try:
            data = ehsm.decode(text)
        except ValueError:
            raise AnswerInvalid(f"its {name} is not base64") from None
        if size is not None and len(data) != size:
            raise AnswerInvalid(f"its {name} has {len(data)} bytes, not {size}")
        return data

    def key_id(self) -> str:
        """Return the key id of the result; raise AnswerInvalid."""
        text = self.text("keyid", most=36)
        if not ehsm.is_key_id(text):
            raise AnswerInvalid("its keyid is not one")
        return text

    def keys(self) -> tuple[ListedKey, ...]:
        """Return the keys of ListKey; raise AnswerInvalid."""
        items = self.result.get("list")
        if not isinstance(items, list) or len(items) > MAX_KEYS:
            raise AnswerInvalid(f"there is no list of up to {MAX_KEYS} keys in its result")
        return tuple(ListedKey.of(item) for item in items)


@dataclass(frozen=True, slots=True)
class ListedKey:
    """A key of EHSM's list."""

    keyid: str
    created_ms: int  # by EHSM's clock
    enabled: bool

    @classmethod
    def of(cls, item: Any) -> Self:
        """Read an item of the list; raise AnswerInvalid."""
        members = item if isinstance(item, dict) else {}
        keyid, created, state = (members.get(name) for name in ("keyid", "creationDate", "keyState"))
        if not isinstance(keyid, str) or not ehsm.is_key_id(keyid) or type(created) is not int or created < 0:
            raise AnswerInvalid("an item of its list is not a key")
        return cls(keyid, created, state == 1)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _refuse(text: str) -> NoReturn:
    raise ValueError(text)
