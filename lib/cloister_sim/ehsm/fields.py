# SPDX-License-Identifier: Apache-2.0
"""The members of each action's payload: types, sizes and forms, and the words in which EHSM refuses others."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cloister import ehsm
from cloister_sim.ehsm.wire import Refused, bad_request

KEYSPECS: Final = (
    "EH_AES_GCM_128",
    "EH_AES_GCM_192",
    "EH_AES_GCM_256",
    "EH_RSA_2048",
    "EH_RSA_3072",
    "EH_RSA_4096",
    "EH_EC_P224",
    "EH_EC_P256",
    "EH_EC_P256K",
    "EH_EC_P384",
    "EH_EC_P521",
    "EH_SM2",
    "EH_SM4_CTR",
    "EH_SM4_CBC",
    "EH_HMAC",
)
INTERNAL: Final = "EH_INTERNAL_KEY"
EXTERNAL: Final = "EH_EXTERNAL_KEY"
ENCRYPT_DECRYPT: Final = "EH_KEYUSAGE_ENCRYPT_DECRYPT"
SIGN_VERIFY: Final = "EH_KEYUSAGE_SIGN_VERIFY"
PADDINGS: Final = ("EH_PAD_NONE", "EH_RSA_PKCS1", "EH_RSA_PKCS1_PSS", "EH_RSA_PKCS1_OAEP")
DIGESTS: Final = ("EH_SHA_224", "EH_SHA_256", "EH_SHA_384", "EH_SHA_512", "EH_SM3")
MESSAGE_TYPES: Final = ("EH_RAW", "EH_DIGEST")
MAX_SECRET: Final = 4096  # characters
_MEASUREMENT: Final = re.compile(r"[0-9a-f]{64}", re.ASCII)

Check = Callable[[str, Any], Any]  # name and value in, checked value out; raises Refused


@dataclass(frozen=True, slots=True)
class Field:
    """A member of a payload. An optional one that is null or "" counts as absent."""

    check: Check
    required: bool = True


def read_payload(action: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of this action that are present, checked; others are ignored. Raise Refused."""
    found: dict[str, Any] = {}
    for name, field in FIELDS.get(action, {}).items():
        value = payload.get(name)
        if value is None or value == "":
            if field.required:
                raise bad_request(f"Missing required parameters, The {name} cannot be empty.")
            continue
        found[name] = field.check(name, value)
    return found


def _invalid(name: str, why: str) -> Refused:
    return bad_request(f"Parameter invalid, The {name} {why}")


def _text(most: int, least: int = 0) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise _invalid(name, "must be of string type.")
        if not least <= len(value) <= most:
            raise _invalid(name, "length error.")
        return value

    return check


def _base64(most: int) -> Check:
    text = _text(most)

    def check(name: str, value: Any) -> bytes:
        try:
            return ehsm.decode(text(name, value))
        except ValueError:
            raise _invalid(name, "not a vailed base64 string.") from None

    return check


def _key_id(name: str, value: Any) -> str:
    text: str = _text(36, 36)(name, value)
    if not ehsm.is_key_id(text):
        raise _invalid(name, "format wrong.")
    return text


def _choice(allowed: Collection[str]) -> Check:
    text = _text(64)

    def check(name: str, value: Any) -> str:
        if text(name, value) not in allowed:
            raise _invalid(name, "type is incorrect.")
        return str(value)

    return check


def _integer(least: int, most: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JavaScript has one kind of number
        if type(value) is not int:
            raise _invalid(name, "must be of integer type.")
        if value > most:
            raise _invalid(name, f"value must be less than or equal to {most}.")
        if value < least:
            raise _invalid(name, f"value must be greater than or equal to {least}.")
        return value

    return check


def _measurement(name: str, value: Any) -> str:
    text: str = _text(64, 64)(name, value)
    if not _MEASUREMENT.fullmatch(text.lower()):
        raise _invalid(name, "format wrong.")
    return text.lower()


_KEY: Final = {"keyid": Field(_key_id)}
_AAD: Final = {"aad": Field(_base64(ehsm.MAX_FIELD), required=False)}
_PADDING: Final = {"padding_mode": Field(_choice(PADDINGS))}
_BLOB: Final = Field(_base64(ehsm.MAX_FIELD))
_SIGNING: Final = {
    **_KEY,
    **_PADDING,
    "message": _BLOB,
    "message_type": Field(_choice(MESSAGE_TYPES)),
    "digest_mode": Field(_choice(DIGESTS)),
}
_NAME: Final = {"secretName": Field(_text(64, 1))}
_DESCRIPTION: Final = Field(_text(MAX_SECRET), required=False)
_SECRET: Final = {**_NAME, "secretData": Field(_text(MAX_SECRET, 1))}

FIELDS: Final[Mapping[str, Mapping[str, Field]]] = {
    # keyusage is optional: clients of version 0.3.2 send none.
    "CreateKey": {
        "keyspec": Field(_choice(KEYSPECS)),
        "origin": Field(_choice((INTERNAL, EXTERNAL))),
        "keyusage": Field(_text(64), required=False),
    },
    "Encrypt": {**_KEY, "plaintext": _BLOB, **_AAD},
    "Decrypt": {**_KEY, "ciphertext": Field(_base64(ehsm.MAX_CIPHERTEXT)), **_AAD},
    "GenerateDataKey": {**_KEY, "keylen": Field(_integer(1, 1024)), **_AAD},
    "GenerateDataKeyWithoutPlaintext": {**_KEY, "keylen": Field(_integer(1, 1024)), **_AAD},
    "ExportDataKey": {**_KEY, "ukeyid": Field(_key_id), "olddatakey_base": _BLOB, **_AAD},
    "AsymmetricEncrypt": {**_KEY, **_PADDING, "plaintext": _BLOB},
    "AsymmetricDecrypt": {**_KEY, **_PADDING, "ciphertext": _BLOB},
    "Sign": _SIGNING,
    "Verify": {**_SIGNING, "signature": _BLOB},
    "GetPublicKey": _KEY,
    "GetParametersForImport": {**_KEY, "keyspec": Field(_choice([spec for spec in KEYSPECS if "RSA" in spec]))},
    "ImportKeyMaterial": {**_KEY, **_PADDING, "key_material": _BLOB, "importToken": _BLOB},
    "EnableKey": _KEY,
    "DisableKey": _KEY,
    "DeleteKey": _KEY,
    "CreateSecret": {
        **_SECRET,
        "encryptionKeyId": Field(_key_id, required=False),
        "description": _DESCRIPTION,
        "rotationInterval": Field(_text(64), required=False),
    },
    "PutSecretValue": _SECRET,
    "GetSecretValue": {**_NAME, "versionId": Field(_integer(1, 2**31), required=False)},
    "ListSecretVersionIds": _NAME,
    "ListSecrets": {"secretName": Field(_text(64), required=False)},
    "DescribeSecret": _NAME,
    "UpdateSecretDesc": {**_NAME, "description": _DESCRIPTION},
    "DeleteSecret": {
        **_NAME,
        "recoveryPeriod": Field(_integer(1, 365), required=False),
        "forceDelete": Field(_text(64), required=False),
    },
    "RestoreSecret": _NAME,
    "GenerateQuote": {"challenge": Field(_base64(4096))},
    "VerifyQuote": {
        "quote": Field(_base64(10924)),
        "nonce": Field(_base64(ehsm.MAX_FIELD)),
        "policyId": Field(_key_id, required=False),
    },
    "UploadQuotePolicy": {"mr_enclave": Field(_measurement), "mr_signer": Field(_measurement)},
    "GetQuotePolicy": {"policyId": Field(_key_id)},
}
