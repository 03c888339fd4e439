# SPDX-License-Identifier: Apache-2.0
"""Clients of EHSM as others write them: the shape of requests is what counts, nothing here is our own client's code.

`SdkClient` does what Intel's Python SDK does: one request body for each call, path /ehsm/, members in no special
order. `BigDlClient` does what BigDL's key management does: no nonce, no key usage, `aad` always "test".
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import time
import uuid
from typing import Any

import aiohttp

from cloister_sim.ehsm.server import EhsmServer


class RawClient:
    """Send bodies; sign them with rules of its own, which are enough for flat payloads."""

    path = "/ehsm/"

    def __init__(self, server: EhsmServer) -> None:
        self._url = server.url
        self._tls = ssl.create_default_context(cafile=str(server.certificate_file))
        self._session: aiohttp.ClientSession | None = None
        self.appid = ""
        self.api_key = ""
        self.skew_ms = 0
        self._last_ms = 0

    async def __aenter__(self) -> Any:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._tls))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session
        await self._session.close()

    async def enroll(self) -> None:
        answer = await self.get("Enroll")
        assert "success" in answer["message"]
        self.appid, self.api_key = answer["result"]["appid"], answer["result"]["apikey"]

    async def get(self, action: str) -> dict[str, Any]:
        assert self._session
        async with self._session.get(f"{self._url}{self.path}?Action={action}") as response:
            return dict(json.loads(await response.read()))

    async def send(self, action: str, body: Any, *, method: str = "POST") -> dict[str, Any]:
        """Send a body as it is."""
        status, data = await self.raw(action, json.dumps(body).encode(), method=method)
        assert status == 200
        return dict(json.loads(data))

    async def raw(
        self, action: str, data: bytes, *, method: str = "POST", content_type: str = "application/json"
    ) -> tuple[int, bytes]:
        assert self._session
        url = f"{self._url}{self.path}?Action={action}"
        async with self._session.request(method, url, data=data, headers={"Content-Type": content_type}) as response:
            return response.status, await response.read()

    def now(self) -> str:
        # No millisecond twice: without a nonce a request would be taken for a replay.
        now_ms = int(time.time() * 1000) + self.skew_ms
        self._last_ms = self._last_ms + 1 if 0 <= self._last_ms - now_ms < 1000 else now_ms
        return str(self._last_ms)

    def signed(self, body: dict[str, Any]) -> dict[str, Any]:
        """Add the signature over sorted members, joined with "&"; a payload is flat."""

        def joined(members: dict[str, Any]) -> str:
            return "&".join(
                f"{name}={joined(value) if isinstance(value, dict) else value}"
                for name, value in sorted(members.items())
                if value != ""
            )

        digest = hmac.new(self.api_key.encode(), joined(body).encode(), hashlib.sha256).digest()
        return {**body, "sign": base64.b64encode(digest).decode()}


class SdkClient(RawClient):
    """A random nonce; every answer of success says so in its message."""

    async def call(self, action: str, payload: dict[str, Any] | None = None) -> Any:
        answer = await self.ask(action, payload)
        assert answer["code"] == 200, answer
        assert "success" in answer["message"].lower(), answer
        return answer["result"]

    async def ask(self, action: str, payload: dict[str, Any] | None = None) -> dict[str, Any]:
        body: dict[str, Any] = {"appid": self.appid, "nonce": uuid.uuid4().hex, "timestamp": self.now()}
        if payload is not None:
            body["payload"] = payload
        return await self.send(action, self.signed(body))

    async def create(self, keyspec: str, usage: str = "EH_KEYUSAGE_ENCRYPT_DECRYPT", **more: Any) -> str:
        payload = {"keyspec": keyspec, "origin": "EH_INTERNAL_KEY", "keyusage": usage, **more}
        return str((await self.call("CreateKey", payload))["keyid"])


class BigDlClient(RawClient):
    """Payload and members sorted, no nonce, aad "test", data keys of 32 bytes."""

    path = "/ehsm"

    async def call(self, action: str, payload: dict[str, Any]) -> Any:
        body = {"appid": self.appid, "payload": dict(sorted(payload.items())), "timestamp": self.now()}
        answer = await self.send(action, self.signed(body))
        assert answer["code"] == 200, answer
        return answer["result"]

    async def primary_key(self) -> str:
        payload = {"keyspec": "EH_AES_GCM_256", "origin": "EH_INTERNAL_KEY"}
        return str((await self.call("CreateKey", payload))["keyid"])

    async def data_key(self, primary: str) -> str:
        payload = {"aad": "test", "keyid": primary, "keylen": 32}
        return str((await self.call("GenerateDataKeyWithoutPlaintext", payload))["ciphertext"])

    async def data_key_plaintext(self, primary: str, wrapped: str) -> str:
        payload = {"aad": "test", "ciphertext": wrapped, "keyid": primary}
        return str((await self.call("Decrypt", payload))["plaintext"])
