# SPDX-License-Identifier: Apache-2.0
"""The transit secrets engine of OpenBao and Vault as their API documentation describes it, over HTTPS.

Keys with versions, encryption with associated data, key configuration, rotation and deletion, health, and tokens that
live for a while. Errors have the statuses of the real ones: nearly everything is 400, a missing key included.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import ssl
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from aiohttp import web
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fakes.localhost_tls import server_context


@dataclass
class TransitKey:
    versions: list[bytes] = field(default_factory=lambda: [os.urandom(32)])
    min_decryption_version: int = 1
    deletion_allowed: bool = False


@dataclass
class Token:
    ttl: int = 3600
    creation_ttl: int = 3600
    renewable: bool = True
    renewals: int = 0


class ApiError(Exception):
    def __init__(self, status: int, *errors: str) -> None:
        super().__init__(*errors)
        self.status = status


class TransitServer:
    """One mount, in this event loop. What tests turn: `sealed`, `tokens`, `replies` (instead of its own, in order)."""

    def __init__(self, mount: str = "transit") -> None:
        self.mount = mount
        self.keys: dict[str, TransitKey] = {}
        self.token = "s.0123456789abcdef"
        self.tokens: dict[str, Token] = {self.token: Token()}
        self.sealed = False
        self.replies: list[Callable[[web.Request], Awaitable[web.StreamResponse]]] = []
        self.requests: list[str] = []
        self._directory = tempfile.TemporaryDirectory(prefix="transit-")
        self.directory = Path(self._directory.name)
        self.token_file = self.directory / "token"
        self.write_token(self.token)
        self._runner: web.AppRunner | None = None
        self._context: ssl.SSLContext | None = None
        self.ca_file = Path()
        self.port = 0

    @property
    def uri(self) -> str:
        """What the broker's configuration says."""
        address = f"https://127.0.0.1:{self.port}/{self.mount}"
        return f"transit:{address}?ca={self.ca_file}&token={self.token_file}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def start(self) -> None:
        """Listen, at the port of before if there was one, with the certificate of before."""
        if self._context is None:
            self._context, self.ca_file = server_context(self.directory)
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self._context).start()
        self.port = self._runner.addresses[0][1]

    async def __aexit__(self, *_: object) -> None:
        await self.stop()
        self._directory.cleanup()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def write_token(self, token: str) -> None:
        self.token_file.write_text(f"{token}\n")
        self.token_file.chmod(0o600)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path}")
        if self.replies:
            return await self.replies.pop(0)(request)
        try:
            return await self._route(request)
        except ApiError as error:
            return _json({"errors": list(error.args)}, status=error.status)

    async def _route(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if parts[:1] != ["v1"]:
            raise ApiError(404)
        if parts[1:] == ["sys", "health"]:
            body = {"initialized": True, "sealed": self.sealed, "standby": False}
            return _json(body, status=503 if self.sealed else 200)
        if self.sealed:
            raise ApiError(503, "Vault is sealed")
        token = self.tokens.get(request.headers.get("X-Vault-Token", ""))
        if token is None:
            raise ApiError(403, "permission denied")
        if parts[1:] == ["auth", "token", "lookup-self"]:
            lookup = {"ttl": token.ttl, "creation_ttl": token.creation_ttl, "renewable": token.renewable}
            return _json({"data": lookup})
        if parts[1:] == ["auth", "token", "renew-self"]:
            token.ttl = token.creation_ttl
            token.renewals += 1
            return _json({"auth": {"renewable": True, "lease_duration": token.ttl}})
        mount = self.mount.split("/")
        if parts[1 : 1 + len(mount)] != mount:
            raise ApiError(404, f'no handler for route "{"/".join(parts[1:])}". route entry not found.')
        body = await request.json() if request.body_exists else {}
        return self._transit(request.method, parts[1 + len(mount) :], body)

    def _transit(self, method: str, parts: list[str], body: dict[str, Any]) -> web.Response:
        match (method, *parts):
            case ("POST", "keys", name):
                return self._data(self._described(name, self.keys.setdefault(name, TransitKey())))
            case ("GET", "keys", name):
                if name not in self.keys:
                    raise ApiError(404)
                return self._data(self._described(name, self.keys[name]))
            case ("DELETE", "keys", name):
                if not self._key(name, "could not delete key; not found").deletion_allowed:
                    raise ApiError(400, f"error deleting policy {name}: deletion is not allowed for this key")
                del self.keys[name]
                return web.Response(status=204)
            case ("POST", "keys", name, "config"):
                return self._configure(name, body)
            case ("POST", "keys", name, "rotate"):
                self._key(name, "key not found").versions.append(os.urandom(32))
                return web.Response(status=204)
            case ("POST", "encrypt", name):
                if name not in self.keys:  # a token that may only update does not create keys by encrypting
                    raise ApiError(403, "1 error occurred:\n\t* permission denied\n\n")
                return self._encrypt(self.keys[name], body)
            case ("POST", "decrypt", name):
                return self._decrypt(self._key(name, "encryption key not found"), body)
        raise ApiError(404, "unsupported path")

    def _key(self, name: str, missing: str) -> TransitKey:
        if name not in self.keys:
            raise ApiError(400, missing)
        return self.keys[name]

    def _described(self, name: str, key: TransitKey) -> dict[str, Any]:
        return {
            "name": name,
            "type": "aes256-gcm96",
            "latest_version": len(key.versions),
            "min_decryption_version": key.min_decryption_version,
            "deletion_allowed": key.deletion_allowed,
            "exportable": False,
        }

    def _configure(self, name: str, body: dict[str, Any]) -> web.Response:
        key = self._key(name, f"no existing key named {name} could be found")
        oldest = max(1, body.get("min_decryption_version", key.min_decryption_version))
        if oldest > len(key.versions):
            raise ApiError(400, f"cannot set min decryption version of {oldest}, latest is {len(key.versions)}")
        key.min_decryption_version = oldest
        key.deletion_allowed = body.get("deletion_allowed", key.deletion_allowed)
        return self._data(self._described(name, key))

    def _encrypt(self, key: TransitKey, body: dict[str, Any]) -> web.Response:
        nonce = os.urandom(12)
        sealed = AESGCM(key.versions[-1]).encrypt(nonce, _bytes(body, "plaintext"), _bytes(body, "associated_data"))
        text = base64.b64encode(nonce + sealed).decode()
        return self._data({"ciphertext": f"vault:v{len(key.versions)}:{text}", "key_version": len(key.versions)})

    def _decrypt(self, key: TransitKey, body: dict[str, Any]) -> web.Response:
        product, version, text = body["ciphertext"].split(":", 2)
        number = int(version.removeprefix("v"))
        if product != "vault" or number > len(key.versions):
            raise ApiError(400, "invalid ciphertext: version is too new")
        if number < key.min_decryption_version:
            raise ApiError(400, "ciphertext or signature version is disallowed by policy (too old)")
        sealed = base64.b64decode(text)
        try:
            plain = AESGCM(key.versions[number - 1]).decrypt(sealed[:12], sealed[12:], _bytes(body, "associated_data"))
        except InvalidTag:
            raise ApiError(400, "invalid ciphertext: unable to decrypt") from None
        return self._data({"plaintext": base64.b64encode(plain).decode()})

    def _data(self, data: dict[str, Any]) -> web.Response:
        return _json({"request_id": "00000000-0000-0000-0000-000000000000", "data": data})


def _json(document: dict[str, Any], *, status: int = 200) -> web.Response:
    # Without the charset that aiohttp adds: the real ones have none, and `hvac` compares the whole value.
    return web.Response(body=json.dumps(document).encode(), headers={"Content-Type": "application/json"}, status=status)


def _bytes(body: dict[str, Any], member: str) -> bytes:
    try:
        return base64.b64decode(body.get(member, ""), validate=True)
    except binascii.Error:
        raise ApiError(400, f"failed to base64-decode {member}") from None
