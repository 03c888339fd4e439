# SPDX-License-Identifier: Apache-2.0
"""EHSM's actions as the custodian uses them, both generations of the API."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Final

from cloister import ehsm
from cloister.errors import CloisterError
from cloister.secret import SecretBytes
from cloister_keybroker.backends.ehsm.answers import MAX_LIST, Answer, AnswerInvalid, ListedKey, Outcome
from cloister_keybroker.backends.ehsm.calls import Ask, Calls, Kind, Request, probe_by_list
from cloister_keybroker.backends.ehsm.failures import Undone

_OLD: Final = "0.3."  # versions that know no key usage
_MAX_QUOTE: Final = 16 * 1024  # bytes; EHSM's own limit for quotes is 8 KiB
_MAX_VERSION: Final = 64  # characters


@dataclass(frozen=True, slots=True)
class _Canary:
    """What was unwrapped before and has to be again: a probe that goes all the way."""

    request: Request
    size: int
    digest: bytes  # SHA-256 of what came out


class EhsmClient:
    """Actions of one user of EHSM. All raise CloisterError."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._canary: _Canary | None = None
        calls.probe = self._probe

    async def aclose(self) -> None:
        await self._calls.aclose()

    async def create_key(self) -> str:
        """Make an AES-256-GCM key; return its id. Raise Undone when none was made for sure."""
        try:
            version = await self.version()
        except CloisterError as error:
            raise Undone.of(error) from None
        payload: dict[str, str | int] = {"keyspec": "EH_AES_GCM_256", "origin": "EH_INTERNAL_KEY"}
        if not version.startswith(_OLD):
            payload["keyusage"] = "EH_KEYUSAGE_ENCRYPT_DECRYPT"
        return await self._calls.call(Request("CreateKey", payload, again=False), Answer.key_id)

    async def encrypt(self, keyid: str, secret: SecretBytes, aad: bytes) -> bytes:
        """Wrap a secret, bound to `aad`; return its ciphertext (28 bytes longer)."""
        size = len(secret) + ehsm.GCM_OVERHEAD
        payload = {"keyid": keyid, "plaintext": ehsm.encode(secret.reveal()), "aad": ehsm.encode(aad)}
        return await self._calls.call(
            Request("Encrypt", payload), lambda answer: answer.octets("ciphertext", size=size)
        )

    async def decrypt(self, keyid: str, wrapped: bytes, aad: bytes) -> SecretBytes:
        """Open what `encrypt` made."""
        request, size = _decrypt(keyid, wrapped, aad), len(wrapped) - ehsm.GCM_OVERHEAD
        return await self._calls.call(request, lambda answer: SecretBytes(answer.octets("plaintext", size=size)))

    async def enable_key(self, keyid: str) -> None:
        await self._calls.call(Request("EnableKey", {"keyid": keyid}), _nothing)

    async def disable_key(self, keyid: str) -> None:
        await self._calls.call(Request("DisableKey", {"keyid": keyid}), _nothing)

    async def delete_key(self, keyid: str) -> None:
        """Delete a key for good; nothing happens when it is gone."""
        await self._calls.call(Request("DeleteKey", {"keyid": keyid}), _nothing)

    async def list_keys(self) -> tuple[ListedKey, ...]:
        """Return all keys of this user."""
        return await self._calls.call(Request("ListKey", limit=MAX_LIST), Answer.keys)

    async def version(self) -> str:
        """Return what EHSM calls itself. Asked anew every time: it may have been replaced meanwhile."""
        request = Request("GetVersion", signed=False)
        return await self._calls.call(request, lambda answer: answer.text("version", most=_MAX_VERSION))

    async def quote(self) -> bytes:
        """Return a quote of EHSM's enclave. It is bound to nothing: not to a challenge, not to the connection."""
        request = Request("GenerateQuote", {"challenge": ehsm.encode(secrets.token_bytes(32))})
        return await self._calls.call(request, lambda answer: answer.octets("quote", most=_MAX_QUOTE))

    def keep_canary(self, keyid: str, wrapped: bytes, aad: bytes, secret: SecretBytes) -> None:
        """Remember something that opens: the circuit closes again when it does."""
        digest = hashlib.sha256(secret.reveal()).digest()
        self._canary = _Canary(_decrypt(keyid, wrapped, aad), len(secret), digest)

    async def _probe(self, ask: Ask) -> None:
        canary = self._canary
        if canary is None:
            await probe_by_list(ask)
            return
        answer = await ask(canary.request)
        if answer.refusal is not None:
            # Its key may have been replaced since; that EHSM can tell is answer enough.
            if answer.refusal.outcome is Outcome.TROUBLE:
                raise AnswerInvalid("its database or its enclave fails")
            return
        opened = answer.octets("plaintext", size=canary.size)
        if not hmac.compare_digest(hashlib.sha256(opened).digest(), canary.digest):
            raise AnswerInvalid("it opens the canary as something else")


def _decrypt(keyid: str, wrapped: bytes, aad: bytes) -> Request:
    payload = {"keyid": keyid, "ciphertext": ehsm.encode(wrapped), "aad": ehsm.encode(aad)}
    return Request("Decrypt", payload, Kind.UNWRAP)


def _nothing(_: Answer) -> None:
    """The code says it all."""
