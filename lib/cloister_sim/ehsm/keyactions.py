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
from cloister_sim.ehsm.wire import Answer, Call, Refused

_SUCCESS: Final = "success!"
_SUCCESSFUL: Final = "successful"
_TOKEN_LIFE_MS: Final = DAY_MS


class KeyActions:
    """One method per action: raise Refused."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def create(self, call: Call) -> Answer:
        keyspec, origin = call.fields["keyspec"], call.fields["origin"]
        usage = core.require_usage(keyspec, call.fields.get("keyusage"))
        if origin == EXTERNAL:
            core.symmetric_size(keyspec)
        row = KeyRow(
            keyid=str(uuid.uuid4()),
            appid=call.appid,
            keyspec=keyspec,
            origin=origin,
            keyusage=usage,
            created_ms=call.now_ms,
            expires_ms=call.now_ms + ehsm.KEY_LIFE_DAYS * DAY_MS,
            enabled=True,
        )
        # RSA takes a while.
        material = await asyncio.to_thread(core.generate, keyspec) if origin == INTERNAL else None
        await self._vault.add_key(row, material)
        return Answer(200, _SUCCESS, {"keyid": row.keyid})

    async def encrypt(self, call: Call) -> Answer:
        key = await self._key(call)
        return _done(ciphertext=core.encrypt(key, call.fields["plaintext"], call.fields.get("aad", b"")))

    async def decrypt(self, call: Call) -> Answer:
        key = await self._key(call)
        return _done(plaintext=core.decrypt(key, call.fields["ciphertext"], call.fields.get("aad", b"")))

    async def generate_data_key(self, call: Call) -> Answer:
        secret, wrapped = await self._data_key(call)
        return _done(ciphertext=wrapped, plaintext=secret)

    async def generate_data_key_without_plaintext(self, call: Call) -> Answer:
        _, wrapped = await self._data_key(call)
        return _done(ciphertext=wrapped)

    async def export_data_key(self, call: Call) -> Answer:
        key = await self._key(call)
        target = await self._vault.material(call.appid, call.fields["ukeyid"], call.now_ms)
        try:
            data_key = core.decrypt(key, call.fields["olddatakey_base"], call.fields.get("aad", b""))
        except Refused:
            raise core.server_exception() from None
        return _done(newdatakey=core.asymmetric_encrypt(target, data_key, "EH_RSA_PKCS1_OAEP"))

    async def asymmetric_encrypt(self, call: Call) -> Answer:
        key = await self._key(call)
        return _done(ciphertext=core.asymmetric_encrypt(key, call.fields["plaintext"], call.fields["padding_mode"]))

    async def asymmetric_decrypt(self, call: Call) -> Answer:
        key = await self._key(call)
        return _done(plaintext=core.asymmetric_decrypt(key, call.fields["ciphertext"], call.fields["padding_mode"]))

    async def sign(self, call: Call) -> Answer:
        key = await self._key(call)
        return _done(signature=core.sign(key, call.fields["message"], **_how(call.fields)))

    async def verify(self, call: Call) -> Answer:
        key = await self._key(call)
        right = core.verify(key, call.fields["message"], call.fields["signature"], **_how(call.fields))
        return Answer(200, _SUCCESS, {"result": right})

    async def get_public_key(self, call: Call) -> Answer:
        key = await self._key(call)
        return Answer(200, _SUCCESS, {"keyid": call.fields["keyid"], "pubkey": core.public_key(key)})

    async def list(self, call: Call) -> Answer:
        listed = [
            {
                "keyid": row.keyid,
                "creationDate": row.created_ms,
                "expireTime": row.expires_ms,
                "alias": "",
                "keyspec": row.keyspec,
                "keyState": int(row.enabled),
            }
            for row in await self._vault.keys_of(call.appid)
        ]
        return Answer(200, _SUCCESSFUL, {"list": listed})

    async def enable(self, call: Call) -> Answer:
        await self._vault.set_enabled(call.appid, call.fields["keyid"], enabled=True)
        return Answer(200, _SUCCESSFUL, {})

    async def disable(self, call: Call) -> Answer:
        await self._vault.set_enabled(call.appid, call.fields["keyid"], enabled=False)
        return Answer(200, _SUCCESSFUL, {})

    async def delete(self, call: Call) -> Answer:
        await self._vault.delete_keys(call.appid, call.fields["keyid"])
        return Answer(200, _SUCCESSFUL, {})

    async def delete_all(self, call: Call) -> Answer:
        await self._vault.delete_keys(call.appid)
        return Answer(200, _SUCCESSFUL, {})

    async def get_parameters_for_import(self, call: Call) -> Answer:
        row, _ = await self._vault.key(call.appid, call.fields["keyid"], call.now_ms)
        if row.origin != EXTERNAL:
            raise Refused(500, "GetParametersForImport failed.", by_core=True)
        private = await asyncio.to_thread(core.generate, call.fields["keyspec"])
        await self._vault.set_import_key(row, private)
        wrapping = core.Material(call.fields["keyspec"], ENCRYPT_DECRYPT, private)
        token = {"keyid": row.keyid, "timestamp": call.now_ms}
        # The documented HMAC, which EHSM's token does not have.
        mac = hmac.digest(private, _token_text(token), "sha256")
        token_text = json.dumps(token | {"hmac": ehsm.encode(mac)}).encode()
        return Answer(
            200, _SUCCESS, {"pubkey": core.public_key(wrapping), "importToken": base64.b64encode(token_text).decode()}
        )

    async def import_key_material(self, call: Call) -> Answer:
        row, _ = await self._vault.key(call.appid, call.fields["keyid"], call.now_ms)
        private = await self._vault.import_key(row) if row.origin == EXTERNAL else None
        if private is None:
            raise Refused(500, "ImportKeyMaterial failed.", by_core=True)
        _require_token(call.fields["importToken"], row.keyid, private, call.now_ms)
        loaded = serialization.load_der_private_key(private, password=None)
        wrapping = core.Material(f"EH_RSA_{getattr(loaded, 'key_size', 0)}", ENCRYPT_DECRYPT, private)
        material = SecretBytes(
            core.asymmetric_decrypt(wrapping, call.fields["key_material"], call.fields["padding_mode"])
        )
        if len(material) != core.symmetric_size(row.keyspec):
            raise Refused(500, "Import key failed.", by_core=True)
        await self._vault.set_material(row, material.reveal())
        return Answer(200, _SUCCESS, {"result": True})

    async def _key(self, call: Call) -> core.Material:
        return await self._vault.material(call.appid, call.fields["keyid"], call.now_ms)

    async def _data_key(self, call: Call) -> tuple[bytes, bytes]:
        row, _ = await self._vault.key(call.appid, call.fields["keyid"], call.now_ms)
        if row.origin != INTERNAL:
            raise core.server_exception()
        key = await self._key(call)
        return core.data_key(key, call.fields["keylen"], call.fields.get("aad", b""))


def _done(**results: bytes) -> Answer:
    return Answer(200, _SUCCESS, {name: ehsm.encode(value) for name, value in results.items()})


def _how(fields: dict[str, Any]) -> dict[str, Any]:
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
