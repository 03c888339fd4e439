# SPDX-License-Identifier: Apache-2.0
"""Actions on keys: make, use, import, list, disable, delete."""

from __future__ import annotations

import asyncio
import base64
import hmac
import json
import uuid
from typing import Any, Final

from cryptography.hazmat.primitives import serialization

from cloister import ehsm
from cloister.secret import SecretBytes
from cloister_sim.ehsm import core
from cloister_sim.ehsm.fields import ENCRYPT_DECRYPT, EXTERNAL, INTERNAL
from cloister_sim.ehsm.vault import DAY_MS, KeyRow, Vault
from cloister_sim.ehsm.wire import Answer, Refused

_SUCCESS: Final = "success!"
_SUCCESSFUL: Final = "successful"
_TOKEN_LIFE_MS: Final = DAY_MS
Fields = dict[str, Any]


class KeyActions:
    """One method per action: checked fields in, answer out; raise Refused."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def create(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        keyspec, origin = fields["keyspec"], fields["origin"]
        usage = core.require_usage(keyspec, fields.get("keyusage"))
        if origin == EXTERNAL:
            core.symmetric_size(keyspec)
        row = KeyRow(
            keyid=str(uuid.uuid4()),
            appid=appid,
            keyspec=keyspec,
            origin=origin,
            keyusage=usage,
            created_ms=now_ms,
            expires_ms=now_ms + ehsm.KEY_LIFE_DAYS * DAY_MS,
            enabled=True,
        )
        # RSA takes a while.
        material = await asyncio.to_thread(core.generate, keyspec) if origin == INTERNAL else None
        await self._vault.add_key(row, material)
        return Answer(200, _SUCCESS, {"keyid": row.keyid})

    async def encrypt(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return _done(ciphertext=core.encrypt(key, fields["plaintext"], fields.get("aad", b"")))

    async def decrypt(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return _done(plaintext=core.decrypt(key, fields["ciphertext"], fields.get("aad", b"")))

    async def generate_data_key(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        secret, wrapped = await self._data_key(appid, fields, now_ms)
        return _done(ciphertext=wrapped, plaintext=secret)

    async def generate_data_key_without_plaintext(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        _, wrapped = await self._data_key(appid, fields, now_ms)
        return _done(ciphertext=wrapped)

    async def export_data_key(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        target = await self._vault.material(appid, fields["ukeyid"], now_ms)
        try:
            data_key = core.decrypt(key, fields["olddatakey_base"], fields.get("aad", b""))
        except Refused:
            raise core.server_exception() from None
        return _done(newdatakey=core.asymmetric_encrypt(target, data_key, "EH_RSA_PKCS1_OAEP"))

    async def asymmetric_encrypt(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return _done(ciphertext=core.asymmetric_encrypt(key, fields["plaintext"], fields["padding_mode"]))

    async def asymmetric_decrypt(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return _done(plaintext=core.asymmetric_decrypt(key, fields["ciphertext"], fields["padding_mode"]))

    async def sign(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return _done(signature=core.sign(key, fields["message"], **_how(fields)))

    async def verify(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return Answer(
            200, _SUCCESS, {"result": core.verify(key, fields["message"], fields["signature"], **_how(fields))}
        )

    async def get_public_key(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return Answer(200, _SUCCESS, {"keyid": fields["keyid"], "pubkey": core.public_key(key)})

    async def list(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        listed = [
            {
                "keyid": row.keyid,
                "creationDate": row.created_ms,
                "expireTime": row.expires_ms,
                "alias": "",
                "keyspec": row.keyspec,
                "keyState": int(row.enabled),
            }
            for row in await self._vault.keys_of(appid)
        ]
        return Answer(200, _SUCCESSFUL, {"list": listed})

    async def enable(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        await self._vault.set_enabled(appid, fields["keyid"], enabled=True)
        return Answer(200, _SUCCESSFUL, {})

    async def disable(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        await self._vault.set_enabled(appid, fields["keyid"], enabled=False)
        return Answer(200, _SUCCESSFUL, {})

    async def delete(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        await self._vault.delete_keys(appid, fields["keyid"])
        return Answer(200, _SUCCESSFUL, {})

    async def delete_all(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        await self._vault.delete_keys(appid)
        return Answer(200, _SUCCESSFUL, {})

    async def get_parameters_for_import(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        row, _ = await self._vault.key(appid, fields["keyid"], now_ms)
        if row.origin != EXTERNAL:
            raise Refused(500, "GetParametersForImport failed.", by_core=True)
        private = await asyncio.to_thread(core.generate, fields["keyspec"])
        await self._vault.set_import_key(row, private)
        wrapping = core.Material(fields["keyspec"], ENCRYPT_DECRYPT, private)
        token = {"keyid": row.keyid, "timestamp": now_ms}
        # The documented HMAC, which EHSM's token does not have.
        mac = hmac.digest(private, _token_text(token), "sha256")
        token_text = json.dumps(token | {"hmac": ehsm.encode(mac)}).encode()
        return Answer(
            200, _SUCCESS, {"pubkey": core.public_key(wrapping), "importToken": base64.b64encode(token_text).decode()}
        )

    async def import_key_material(self, appid: str, fields: Fields, now_ms: int) -> Answer:
        row, _ = await self._vault.key(appid, fields["keyid"], now_ms)
        private = await self._vault.import_key(row) if row.origin == EXTERNAL else None
        if private is None:
            raise Refused(500, "ImportKeyMaterial failed.", by_core=True)
        _require_token(fields["importToken"], row.keyid, private, now_ms)
        loaded = serialization.load_der_private_key(private, password=None)
        wrapping = core.Material(f"EH_RSA_{getattr(loaded, 'key_size', 0)}", ENCRYPT_DECRYPT, private)
        material = SecretBytes(core.asymmetric_decrypt(wrapping, fields["key_material"], fields["padding_mode"]))
        if len(material) != core.symmetric_size(row.keyspec):
            raise Refused(500, "Import key failed.", by_core=True)
        await self._vault.set_material(row, material.reveal())
        return Answer(200, _SUCCESS, {"result": True})

    async def _data_key(self, appid: str, fields: Fields, now_ms: int) -> tuple[bytes, bytes]:
        row, _ = await self._vault.key(appid, fields["keyid"], now_ms)
        if row.origin != INTERNAL:
            raise core.server_exception()
        key = await self._vault.material(appid, fields["keyid"], now_ms)
        return core.data_key(key, fields["keylen"], fields.get("aad", b""))


def _done(**results: bytes) -> Answer:
    return Answer(200, _SUCCESS, {name: ehsm.encode(value) for name, value in results.items()})


def _how(fields: Fields) -> dict[str, Any]:
    return {
        "digest_mode": fields["digest_mode"],
        "padding_mode": fields["padding_mode"],
        "prehashed": fields["message_type"] == "EH_DIGEST",
    }


def _token_text(token: dict[str, Any]) -> bytes:
    return json.dumps({name: token.get(name) for name in ("keyid", "timestamp")}).encode()


def _require_token(data: bytes, keyid: str, private: bytes, now_ms: int) -> None:
    """Require a token that was given out for this key with these parameters, not long ago."""
    try:
        token = json.loads(data)
        mac = ehsm.decode(token["hmac"])
        issued_ms = int(token["timestamp"])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise Refused(500, "ImportToken failed.", by_core=True) from None
    if token.get("keyid") != keyid or not hmac.compare_digest(mac, hmac.digest(private, _token_text(token), "sha256")):
        raise Refused(500, "ImportToken failed.", by_core=True)
    if not 0 <= now_ms - issued_ms <= _TOKEN_LIFE_MS:
        again = 'Try to send "GetParametersForImport" request again.'
        raise Refused(500, f"Token validity time is 24 hours. {again}", by_core=True)
