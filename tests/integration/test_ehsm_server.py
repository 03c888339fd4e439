# SPDX-License-Identifier: Apache-2.0
"""The development server gives EHSM's answers to the clients that exist, over real HTTPS."""

from __future__ import annotations

import base64
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_sim.ehsm.server import EhsmServer
from cloister_sim.ehsm.service import Generation
from fakes.ehsm_clients import BigDlClient, SdkClient

DAY_MS = 86_400_000


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[EhsmServer]:
    async with EhsmServer(tmp_path / "ehsm") as running:
        yield running


@pytest.fixture
async def sdk(server: EhsmServer) -> AsyncIterator[SdkClient]:
    async with SdkClient(server) as client:
        await client.enroll()
        yield client


async def test_version_and_enrolment_need_no_signature(server: EhsmServer, sdk: SdkClient) -> None:
    assert (await sdk.get("GetVersion"))["result"]["version"] == "0.4.0"
    assert len(sdk.api_key) == 32
    assert not set(sdk.api_key) & set("IOlo")


async def test_a_data_key_opens_locally_with_the_layout_of_ehsm(sdk: SdkClient) -> None:
    key = await sdk.create("EH_AES_GCM_256")
    aad = os.urandom(48)
    made = await sdk.call("GenerateDataKey", {"keyid": key, "keylen": 32, "aad": b64(aad)})
    assert len(base64.b64decode(made["ciphertext"])) == 60
    opened = await sdk.call("Decrypt", {"keyid": key, "ciphertext": made["ciphertext"], "aad": b64(aad)})
    assert opened["plaintext"] == made["plaintext"]
    # Another AAD, key or byte does not open.
    other = await sdk.create("EH_AES_GCM_256")
    for keyid, ciphertext, bound in (
        (key, made["ciphertext"], b64(os.urandom(48))),
        (other, made["ciphertext"], b64(aad)),
        (key, b64(bytes(60)), b64(aad)),
    ):
        answer = await sdk.ask("Decrypt", {"keyid": keyid, "ciphertext": ciphertext, "aad": bound})
        assert answer == {
            "code": 400,
            "message": "Decryption failed, Please confirm that your parameters are correct.",
            "result": {},
        }


@pytest.mark.parametrize("keyspec", ["EH_AES_GCM_128", "EH_AES_GCM_192", "EH_AES_GCM_256", "EH_SM4_CTR", "EH_SM4_CBC"])
async def test_every_symmetric_kind_opens_what_it_encrypts(sdk: SdkClient, keyspec: str) -> None:
    key = await sdk.create(keyspec)
    for plaintext in (b"x", bytes(16), os.urandom(6000)):
        sealed = await sdk.call("Encrypt", {"keyid": key, "plaintext": b64(plaintext)})
        opened = await sdk.call("Decrypt", {"keyid": key, "ciphertext": sealed["ciphertext"]})
        assert base64.b64decode(opened["plaintext"]) == plaintext


@pytest.mark.parametrize("keyspec", ["EH_RSA_2048", "EH_EC_P224", "EH_EC_P256", "EH_EC_P256K", "EH_EC_P521", "EH_SM2"])
async def test_every_signing_kind_verifies_what_it_signs_and_nothing_else(sdk: SdkClient, keyspec: str) -> None:
    key = await sdk.create(keyspec, "EH_KEYUSAGE_SIGN_VERIFY")
    how = {
        "keyid": key,
        "message_type": "EH_RAW",
        "digest_mode": "EH_SM3" if keyspec == "EH_SM2" else "EH_SHA_256",
        "padding_mode": "EH_RSA_PKCS1_PSS" if "RSA" in keyspec else "EH_PAD_NONE",
    }
    signature = (await sdk.call("Sign", {**how, "message": b64(b"text")}))["signature"]
    assert (await sdk.call("Verify", {**how, "message": b64(b"text"), "signature": signature}))["result"] is True
    assert (await sdk.call("Verify", {**how, "message": b64(b"tex"), "signature": signature}))["result"] is False
    pem = (await sdk.call("GetPublicKey", {"keyid": key}))["pubkey"].encode()
    if keyspec == "EH_RSA_2048":
        assert pem.startswith(b"-----BEGIN RSA PUBLIC KEY-----")
        loaded = serialization.load_pem_public_key(pem)
        assert isinstance(loaded, rsa.RSAPublicKey)
        pss = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
        loaded.verify(base64.b64decode(signature), b"text", pss, hashes.SHA256())
    elif keyspec == "EH_EC_P256":
        loaded = serialization.load_pem_public_key(pem)
        assert isinstance(loaded, ec.EllipticCurvePublicKey)
        loaded.verify(base64.b64decode(signature), b"text", ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize(("keyspec", "mode"), [("EH_RSA_2048", "EH_RSA_PKCS1_OAEP"), ("EH_SM2", "EH_PAD_NONE")])
async def test_asymmetric_encryption_and_the_export_of_a_data_key(sdk: SdkClient, keyspec: str, mode: str) -> None:
    key, symmetric = await sdk.create(keyspec), await sdk.create("EH_AES_GCM_256")
    sealed = await sdk.call("AsymmetricEncrypt", {"keyid": key, "plaintext": b64(b"hello"), "padding_mode": mode})
    opened = await sdk.call("AsymmetricDecrypt", {"keyid": key, **sealed, "padding_mode": mode})
    assert base64.b64decode(opened["plaintext"]) == b"hello"
    made = await sdk.call("GenerateDataKey", {"keyid": symmetric, "keylen": 32, "aad": "test"})
    export = {"keyid": symmetric, "ukeyid": key, "olddatakey_base": made["ciphertext"], "aad": "test"}
    moved = await sdk.call("ExportDataKey", export)
    opened = await sdk.call(
        "AsymmetricDecrypt", {"keyid": key, "ciphertext": moved["newdatakey"], "padding_mode": mode}
    )
    assert opened["plaintext"] == made["plaintext"]
    assert (await sdk.ask("ExportDataKey", {**export, "aad": "dGVz"}))["code"] == 500


async def test_usages_are_kept_apart(sdk: SdkClient) -> None:
    sealing = await sdk.create("EH_RSA_2048")
    how = {"keyid": sealing, "message": "dGVz", "message_type": "EH_RAW", "digest_mode": "EH_SHA_256"}
    refused = {"code": 500, "message": "Server exception.", "result": None}
    assert await sdk.ask("Sign", {**how, "padding_mode": "EH_RSA_PKCS1"}) == refused
    assert await sdk.ask("Encrypt", {"keyid": sealing, "plaintext": "dGVz"}) == refused
    create = {"keyspec": "EH_AES_GCM_256", "origin": "EH_INTERNAL_KEY", "keyusage": "EH_KEYUSAGE_SIGN_VERIFY"}
    assert await sdk.ask("CreateKey", create) == refused
    assert await sdk.ask("CreateKey", {**create, "keyspec": "EH_HMAC"}) == refused


async def test_import_brings_a_key_once_with_its_own_token(sdk: SdkClient) -> None:
    key = await sdk.create("EH_AES_GCM_256", origin="EH_EXTERNAL_KEY")
    assert (await sdk.ask("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["code"] == 500
    parameters = await sdk.call("GetParametersForImport", {"keyid": key, "keyspec": "EH_RSA_2048"})
    public = serialization.load_pem_public_key(parameters["pubkey"].encode())
    assert isinstance(public, rsa.RSAPublicKey)
    material = os.urandom(32)
    wrapped = b64(public.encrypt(material, padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)))
    fill = {"keyid": key, "padding_mode": "EH_RSA_PKCS1_OAEP", "key_material": wrapped}
    forged = b64(f'{{"keyid": "{key}", "timestamp": 0, "hmac": "{b64(bytes(32))}"}}'.encode())
    assert (await sdk.ask("ImportKeyMaterial", {**fill, "importToken": forged}))["message"] == "ImportToken failed."
    done = await sdk.call("ImportKeyMaterial", {**fill, "importToken": parameters["importToken"]})
    assert done["result"] is True
    sealed = base64.b64decode((await sdk.call("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["ciphertext"])
    assert AESGCM(material).decrypt(sealed[-28:-16], sealed[:-28] + sealed[-16:], b"") == b"tes"
    # Neither asking for parameters nor importing again replaces it, which EHSM's would.
    assert (await sdk.ask("GetParametersForImport", {"keyid": key, "keyspec": "EH_RSA_2048"}))["code"] == 500
    again = await sdk.ask("ImportKeyMaterial", {**fill, "importToken": parameters["importToken"]})
    assert again["code"] == 500
    # An imported key makes no data keys, as at EHSM.
    assert (await sdk.ask("GenerateDataKey", {"keyid": key, "keylen": 32}))["code"] == 500


async def test_keys_are_listed_disabled_enabled_and_deleted(sdk: SdkClient) -> None:
    key = await sdk.create("EH_AES_GCM_256")
    (listed,) = (await sdk.call("ListKey"))["list"]
    assert listed["keyid"] == key
    assert listed["keyState"] == 1
    assert listed["expireTime"] - listed["creationDate"] == 365 * DAY_MS
    assert {"alias", "keyspec"} < listed.keys()
    await sdk.call("DisableKey", {"keyid": key})
    assert (await sdk.ask("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["message"] == "keyid is disabled"
    await sdk.call("EnableKey", {"keyid": key})
    await sdk.call("Encrypt", {"keyid": key, "plaintext": "dGVz"})
    await sdk.call("DeleteKey", {"keyid": key})
    await sdk.call("DeleteKey", {"keyid": key})
    assert (await sdk.ask("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["message"] == "keyid error"
    assert (await sdk.ask("EnableKey", {"keyid": key}))["message"] == "not find this keyid"
    assert (await sdk.call("ListKey"))["list"] == []


async def test_a_user_cannot_use_or_delete_the_key_of_another(server: EhsmServer, sdk: SdkClient) -> None:
    key = await sdk.create("EH_AES_GCM_256")
    async with SdkClient(server) as other:
        await other.enroll()
        assert (await other.ask("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["message"] == "appid error"
        await other.call("DeleteKey", {"keyid": key})
        await other.call("DeleteAllKey")
    await sdk.call("Encrypt", {"keyid": key, "plaintext": "dGVz"})


async def test_keys_vanish_ten_days_before_they_expire(tmp_path: Path) -> None:
    start = 1_700_000_000_000
    now = [start]
    async with EhsmServer(tmp_path / "ehsm", clock=lambda: now[0]) as server, SdkClient(server) as sdk:
        sdk.now = lambda: str(now[0])  # type: ignore[method-assign]
        await sdk.enroll()
        key = await sdk.create("EH_AES_GCM_256")
        now[0] = start + 355 * DAY_MS
        assert await server.service.sweep() == 0
        await sdk.call("Encrypt", {"keyid": key, "plaintext": "dGVz"})
        now[0] += 1
        assert await server.service.sweep() == 1
        assert (await sdk.ask("Encrypt", {"keyid": key, "plaintext": "dGVz"}))["message"] == "keyid error"
        # Unswept, it would have been refused a year after it was made.
        unswept = await sdk.create("EH_AES_GCM_256")
        now[0] += 365 * DAY_MS + 1
        assert (await sdk.ask("Encrypt", {"keyid": unswept, "plaintext": "dGVz"}))["message"] == "keyid expire"


async def test_secrets_have_versions_keys_and_a_way_back(sdk: SdkClient) -> None:
    key = await sdk.create("EH_AES_GCM_256")
    name = {"secretName": "db/password & more"}
    await sdk.call(
        "CreateSecret", {**name, "secretData": "eins 中文", "encryptionKeyId": key, "rotationInterval": "30d"}
    )
    assert "already exists" in (await sdk.ask("CreateSecret", {**name, "secretData": "x"}))["message"]
    await sdk.call("PutSecretValue", {**name, "secretData": "zwei"})
    assert (await sdk.call("GetSecretValue", name))["secretData"] == "zwei"
    first = await sdk.call("GetSecretValue", {**name, "versionId": 1})
    assert (first["secretData"], first["versionId"]) == ("eins 中文", 1)
    assert await sdk.call("GetSecretValue", {**name, "versionId": 9}) == {}
    assert (await sdk.call("ListSecretVersionIds", name))["totalCount"] == 2
    await sdk.call("UpdateSecretDesc", {**name, "description": "of the database"})
    described = await sdk.call("DescribeSecret", name)
    assert described["description"] == "of the database"
    assert described["nextRotationDate"] - described["createTime"] == 30 * DAY_MS
    assert "after 30 days" in (await sdk.ask("DeleteSecret", name))["message"]
    assert (await sdk.ask("GetSecretValue", name))["code"] == 400
    assert "plannedDeleteTime" in (await sdk.call("ListSecrets"))["secretList"][0]
    await sdk.call("RestoreSecret", name)
    assert (await sdk.call("GetSecretValue", name))["secretData"] == "zwei"
    await sdk.call("DeleteSecret", {**name, "forceDelete": "true"})
    assert (await sdk.call("ListSecrets"))["totalCount"] == 0
    # Without its key a secret does not open.
    await sdk.call("CreateSecret", {**name, "secretData": "x", "encryptionKeyId": key})
    await sdk.call("DeleteKey", {"keyid": key})
    assert (await sdk.ask("GetSecretValue", name))["message"] == "keyid error"


async def test_quotes_say_nothing_about_the_connection_and_verify_against_policies(sdk: SdkClient) -> None:
    made = await sdk.call("GenerateQuote", {"challenge": b64(b"challenge")})
    quote = base64.b64decode(made["quote"])
    assert made["challenge"] == b64(b"challenge")
    assert quote[48 + 320 : 48 + 384] == bytes(64)
    right = {"mr_enclave": quote[112:144].hex(), "mr_signer": quote[176:208].hex()}
    policy = (await sdk.call("UploadQuotePolicy", right))["policyId"]
    wrong = (await sdk.call("UploadQuotePolicy", {**right, "mr_signer": "0" * 64}))["policyId"]
    ask = {"quote": made["quote"], "nonce": "dGVz"}
    assert (await sdk.call("VerifyQuote", {**ask, "policyId": policy}))["result"] == 0
    assert (await sdk.ask("VerifyQuote", {**ask, "policyId": wrong}))["code"] == 500
    broken = {**ask, "quote": b64(quote[:200] + bytes([quote[200] ^ 1]) + quote[201:])}
    assert (await sdk.call("VerifyQuote", broken))["result"] == 0xA004
    assert (await sdk.call("GetQuotePolicy", {"policyId": policy}))["mr_enclave"] == right["mr_enclave"]


async def test_bigdls_client_gets_its_keys(server: EhsmServer) -> None:
    async with BigDlClient(server) as client:
        await client.enroll()
        primary = await client.primary_key()
        wrapped = await client.data_key(primary)
        plain = await client.data_key_plaintext(primary, wrapped)
        assert len(base64.b64decode(plain)) == 32
        assert await client.data_key_plaintext(primary, wrapped) == plain


async def test_everything_is_still_there_after_a_restart(tmp_path: Path) -> None:
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as sdk:
        await sdk.enroll()
        key = await sdk.create("EH_AES_GCM_256")
        sealed = await sdk.call("Encrypt", {"keyid": key, "plaintext": "dGVz"})
        certificate = server.certificate_file.read_bytes()
    async with EhsmServer(tmp_path / "ehsm") as server, SdkClient(server) as again:
        again.appid, again.api_key = sdk.appid, sdk.api_key
        assert server.certificate_file.read_bytes() == certificate
        assert (await again.call("Decrypt", {"keyid": key, **sealed}))["plaintext"] == "dGVz"


async def test_the_older_generation_knows_no_usage_and_no_nonce(tmp_path: Path) -> None:
    async with EhsmServer(tmp_path / "ehsm", generation=Generation.OLD) as server, SdkClient(server) as sdk:
        await sdk.enroll()
        assert (await sdk.get("GetVersion"))["result"]["version"] == "0.3.2"
        create = {"keyspec": "EH_AES_GCM_256", "origin": "EH_INTERNAL_KEY"}
        assert (await sdk.ask("CreateKey", {**create, "keyusage": "EH_KEYUSAGE_ENCRYPT_DECRYPT"}))["code"] == 500
        key = (await sdk.call("CreateKey", create))["keyid"]
        assert (await sdk.ask("GetPublicKey", {"keyid": key}))["code"] == 404
        moment = sdk.now()
        sdk.now = lambda: moment  # type: ignore[method-assign]
        await sdk.call("ListKey")
        assert "repeated" in (await sdk.ask("ListKey"))["message"]


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"keylen": 32}, "Missing required parameters, The keyid cannot be empty."),
        ({"keyid": 1, "keylen": 32}, "Parameter invalid, The keyid must be of string type."),
        ({"keyid": "a", "keylen": 32}, "Parameter invalid, The keyid length error."),
        ({"keyid": "A" * 36, "keylen": 32}, "Parameter invalid, The keyid format wrong."),
        ({"keyid": "K", "keylen": "32"}, "Parameter invalid, The keylen must be of integer type."),
        ({"keyid": "K", "keylen": True}, "Parameter invalid, The keylen must be of integer type."),
        ({"keyid": "K", "keylen": 1025}, "Parameter invalid, The keylen value must be less than or equal to 1024."),
        ({"keyid": "K", "keylen": -1}, "Parameter invalid, The keylen value must be greater than or equal to 1."),
        ({"keyid": "K", "keylen": 32, "aad": "a-b_"}, "Parameter invalid, The aad not a vailed base64 string."),
        ({"keyid": "K", "keylen": 32, "aad": "dGVzdB=="}, "Parameter invalid, The aad not a vailed base64 string."),
        ({"keyid": "K", "keylen": 32, "aad": "A" * 8196}, "Parameter invalid, The aad length error."),
        ({"keyid": "K", "keylen": 32}, "keyid error"),
    ],
)
async def test_a_wrong_payload_is_refused_in_ehsms_words(sdk: SdkClient, payload: Any, message: str) -> None:
    full = {name: "aac3e45a-d3dc-4791-89b6-4ada0e38e6ef" if value == "K" else value for name, value in payload.items()}
    # The reference signer writes booleans as Python does.
    if full["keylen"] is True:
        body = {"appid": sdk.appid, "nonce": "ab", "timestamp": sdk.now(), "payload": {**full, "keylen": "true"}}
        signature = sdk.signed(body)["sign"]
        answer = await sdk.send("GenerateDataKey", {**body, "payload": full, "sign": signature})
    else:
        answer = await sdk.ask("GenerateDataKey", full)
    assert (answer["code"], answer["message"]) == (400, message)
