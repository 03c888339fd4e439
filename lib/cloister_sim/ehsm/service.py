# SPDX-License-Identifier: Apache-2.0
"""From an action's name and a body to an answer: authentication, replay window, dispatch. No transport."""

from __future__ import annotations

import enum
import hmac
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from cloister import ehsm
from cloister.secret import SecretBytes
from cloister_sim.ehsm import core
from cloister_sim.ehsm.fields import read_payload
from cloister_sim.ehsm.keyactions import KeyActions
from cloister_sim.ehsm.quoteactions import QuoteActions
from cloister_sim.ehsm.replay import ReplayWindow, Seen
from cloister_sim.ehsm.secretactions import SecretActions
from cloister_sim.ehsm.vault import Vault
from cloister_sim.ehsm.wire import OPEN_ACTIONS, Answer, Call, Refused, Request, bad_request, parse_request
from cloister_sim.platform import SimulatedPlatform

Clock = Callable[[], int]  # Unix milliseconds
Handler = Callable[[Call], Awaitable[Answer]]
PLATFORM: Final = "platform"  # below the server's directory: the platform whose root its quotes are under
COLLATERAL: Final = "collateral"  # and what they are verified with


class Generation(enum.StrEnum):
    """Which EHSM to be, as far as keys are concerned."""

    CURRENT = "0.4.0"
    # Before nonces, key usages, imports and public keys: what BigDL 2.2 to 2.4 deploys.
    OLD = "0.3.2"


_NEW_ACTIONS: Final = frozenset({"GetPublicKey", "GetParametersForImport", "ImportKeyMaterial"})


def system_clock() -> int:
    return time.time_ns() // 1_000_000


class EhsmService:
    """The application behind the port."""

    def __init__(self, vault: Vault, quotes: QuoteActions, clock: Clock, generation: Generation) -> None:
        self._vault = vault
        self._quotes = quotes
        self._clock = clock
        self._generation = generation
        self._replay = ReplayWindow(nonce_counts=generation is not Generation.OLD)
        keys, secrets = KeyActions(vault), SecretActions(vault)
        self._handlers: dict[str, Handler] = {
            "CreateKey": keys.create,
            "Encrypt": keys.encrypt,
            "Decrypt": keys.decrypt,
            "GenerateDataKey": keys.generate_data_key,
            "GenerateDataKeyWithoutPlaintext": keys.generate_data_key_without_plaintext,
            "ExportDataKey": keys.export_data_key,
            "AsymmetricEncrypt": keys.asymmetric_encrypt,
            "AsymmetricDecrypt": keys.asymmetric_decrypt,
            "Sign": keys.sign,
            "Verify": keys.verify,
            "GetPublicKey": keys.get_public_key,
            "GetParametersForImport": keys.get_parameters_for_import,
            "ImportKeyMaterial": keys.import_key_material,
            "ListKey": keys.list,
            "EnableKey": keys.enable,
            "DisableKey": keys.disable,
            "DeleteKey": keys.delete,
            "DeleteAllKey": keys.delete_all,
            "CreateSecret": secrets.create,
            "PutSecretValue": secrets.put_value,
            "GetSecretValue": secrets.get_value,
            "ListSecretVersionIds": secrets.list_versions,
            "ListSecrets": secrets.list,
            "DescribeSecret": secrets.describe,
            "UpdateSecretDesc": secrets.update_description,
            "DeleteSecret": secrets.delete,
            "RestoreSecret": secrets.restore,
            "GenerateQuote": quotes.generate,
            "VerifyQuote": quotes.verify,
            "UploadQuotePolicy": quotes.upload_policy,
            "GetQuotePolicy": quotes.get_policy,
        }
        if generation is Generation.OLD:
            for action in _NEW_ACTIONS:
                del self._handlers[action]

    @classmethod
    def open(
        cls, directory: Path, *, clock: Clock = system_clock, generation: Generation = Generation.CURRENT
    ) -> EhsmService:
        """Open or make a server's directory; raise CloisterError."""
        vault = Vault.open(directory)
        platform = SimulatedPlatform.create(directory / PLATFORM)
        quotes = QuoteActions(vault, platform, directory / COLLATERAL)
        service = cls(vault, quotes, clock, generation)
        service.publish_collateral()
        return service

    @property
    def now_ms(self) -> int:
        return self._clock()

    def publish_collateral(self) -> None:
        """Renew the collateral that quotes are verified with; daily."""
        self._quotes.publish()

    async def load(self) -> None:
        """Remember what was saved; before the first request."""
        self._replay.load(await self._vault.requests(self._clock()))

    async def save(self) -> None:
        """Put on disk which requests were seen; now and then, and before the end."""
        if seen := self._replay.take_unsaved():
            await self._vault.save_requests(seen, self._clock())

    async def close(self) -> None:
        await self.save()
        self._vault.close()

    async def sweep(self) -> int:
        """Delete keys that are ten days from their expiry; return how many. EHSM does it every night."""
        return await self._vault.sweep(self._clock())

    async def enroll(self) -> tuple[str, str]:
        """Make a user; return its appid and API key."""
        return await self._vault.enroll(self._clock())

    async def get(self, action: str) -> Answer:
        """Answer a GET."""
        try:
            if action == "GetVersion":
                return Answer(200, "success!", {"version": self._generation.value, "git_sha": "cloister"})
            if action == "Enroll":
                appid, api_key = await self.enroll()
                return Answer(200, "successful", {"appid": appid, "apikey": api_key})
        except Refused as refused:
            return refused.answer
        return _NOT_FOUND

    async def post(self, action: str, body: bytes) -> Answer:
        """Answer a POST."""
        if action in OPEN_ACTIONS:
            return _NOT_FOUND
        now_ms = self._clock()
        try:
            request = parse_request(action, body, now_ms)
            api_key = await self._authenticate(request, now_ms)
            fields = read_payload(action, request.payload)
            if self._generation is Generation.OLD and action == "CreateKey" and "keyusage" in request.payload:
                raise core.server_exception()  # a client of the current generation is noticed
            handler = self._handlers.get(action)
            return _NOT_FOUND if handler is None else await handler(Call(request.appid, fields, now_ms, api_key))
        except Refused as refused:
            return refused.answer

    async def _authenticate(self, request: Request, now_ms: int) -> SecretBytes:
        """Return the user's API key; raise Refused. Only an authentic request is remembered."""
        api_key = await self._vault.api_key(request.appid)
        if api_key is None:
            raise Refused(400, None)
        wanted = ehsm.encode(hmac.digest(api_key.reveal(), request.text, "sha256"))
        if not hmac.compare_digest(wanted.encode(), request.sign.encode(errors="replace")):
            raise bad_request("sign error")
        self._replay.remember(Seen(request.appid, request.timestamp, request.nonce, request.sign, now_ms))
        return api_key


_NOT_FOUND: Final = Answer(404, "API Not Found", {})
